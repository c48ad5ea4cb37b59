"""Seeds of rows that are sampled: by what rows hear. What `generate` makes of them is tested in test_decode_loop.py."""

from __future__ import annotations

import pytest
import torch

from whisper_triton.streams import RandomStreams


def seeds_of(rows: torch.Tensor, attempt: int = 0) -> list[int]:
    torch.manual_seed(1)
    streams = RandomStreams()
    for _ in range(attempt + 1):
        streams.hear(rows)
        heard = streams.next_attempt()
    return streams.seeds(heard, torch.zeros(len(rows), 1, 1)).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_bit_and_an_order_make_another_seed(dtype: torch.dtype) -> None:
    row = torch.randn(1, 8, 30).to(dtype)
    rows = row.repeat(242, 1, 1)
    for i in range(240):
        rows[i].view(-1)[i] = torch.nextafter(rows[i].view(-1)[i], torch.tensor(torch.inf, dtype=dtype))
    rows[240] = rows[240].flip(1)
    seeds = seeds_of(rows)
    assert len(set(seeds)) == 242
    # As of random numbers: all bits are as often set as not.
    bits = torch.tensor([[seed >> bit & 1 for bit in range(64)] for seed in seeds]).float()
    assert (bits.mean(0) - 0.5).abs().max() < 0.15
    assert seeds_of(rows.transpose(1, 2).contiguous().transpose(1, 2)[5:6]) == seeds[5:6]


def test_equal_rows_are_told_apart_by_how_many_came_before() -> None:
    one, other = torch.randn(2, 1, 8, 30)
    first, second, third = seeds_of(one.repeat(3, 1, 1))
    assert len({first, second, third}) == 3
    assert seeds_of(torch.cat([one, other, one])) == [first, seeds_of(other)[0], second]


def test_attempts_differ_and_begin_anew_with_a_window() -> None:
    rows = torch.randn(2, 8, 30)
    assert len({*seeds_of(rows), *seeds_of(rows, 1), *seeds_of(rows, 2)}) == 6
    torch.manual_seed(1)
    streams, found = RandomStreams(), []
    for _ in range(2):
        streams.begin_window()
        for _ in range(2):
            streams.hear(rows)
            found.append(streams.seeds(streams.next_attempt(), rows).tolist())
    assert found == [seeds_of(rows), seeds_of(rows, 1)] * 2


def test_what_was_heard_before_is_not_taken_for_what_is_decoded_now() -> None:
    streams, rows = RandomStreams(), torch.randn(2, 8, 30)
    streams.hear(rows)
    streams.next_attempt()
    assert streams.next_attempt() == (None, 1)
