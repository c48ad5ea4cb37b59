"""project_cross_kv: what lands in the caches of all layers, and that nothing else changes."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    DTYPES,
    MARGIN,
    assert_close_as_pytorch,
    canaries,
    captured,
    dtype_name,
    lay_out,
    storage,
    twin,
)

from whisper_triton.kernels import CrossTable, cross_table, project_cross_kv, project_cross_kv_reference

module = sys.modules["whisper_triton.kernels.project_cross_kv"]
CAPABILITIES = ((0, 0), (8, 0), (9, 0))


class Sizes(NamedTuple):
    """Layers, sequences, frames, heads, head dim, width of the encoder's states."""

    L: int
    B: int
    S: int
    H: int
    D: int
    C: int

    def __str__(self) -> str:
        return "-".join(f"{name}{size}" for name, size in zip(self._fields, self, strict=True))


WHISPER = (Sizes(1, 1, 130, 6, 64, 192),)
# A row more than a tile, one frame, heads that no tile holds whole, widths that end inside a tile, the decoder's not the
# encoder's.
ODD = (
    Sizes(2, 3, 43, 4, 80, 96),
    Sizes(1, 2, 1, 2, 32, 48),
    Sizes(2, 1, 65, 4, 96, 100),
    Sizes(3, 2, 70, 3, 128, 33),
)
LARGE = (
    Sizes(4, 1, 1500, 20, 64, 1280),
    Sizes(2, 8, 1500, 16, 64, 1024),
    Sizes(2, 3, 1500, 6, 64, 384),
    Sizes(2, 3, 129, 4, 80, 320),
)


def arguments(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, *, layout: str = "contiguous", shift: int = 0, bias: bool = True
) -> tuple[torch.Tensor, CrossTable]:
    """Encoder states and a table, caches full of canaries; `shift` moves weights off their 16 bytes."""
    L, B, S, H, D, C = sizes

    def weight(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, device=device) / C**0.5
        buffer = canaries(values.numel() + 2 * MARGIN, dtype=dtype, device=device)
        return buffer[MARGIN + shift : MARGIN + shift + values.numel()].view(shape).copy_(values)

    def cache() -> torch.Tensor:
        values = canaries(B, H, S, D, dtype=dtype, device=device)
        return lay_out(values, layout)

    states = lay_out(torch.randn(1, B, S, C, device=device).to(dtype), layout)[0]
    key_weights, value_weights = ([weight(H * D, C) for _ in range(L)] for _ in range(2))
    biases = [weight(H * D) for _ in range(L)] if bias else None
    return states, cross_table(key_weights, value_weights, biases, *([cache() for _ in range(L)] for _ in range(2)))


def projected(states: torch.Tensor, table: CrossTable, dtype: torch.dtype) -> list[torch.Tensor]:
    """All layers' keys, then all layers' values, as PyTorch computes them in `dtype`."""
    B, H, S, D = table.key_caches[0].shape
    biases = [None] * len(table.key_weights) + (table.value_biases or [None] * len(table.key_weights))
    weights = zip(table.key_weights + table.value_weights, biases, strict=True)
    return [
        F.linear(states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).view(B, S, H, D).transpose(1, 2)
        for weight, bias in weights
    ]


def assert_projects(states: torch.Tensor, table: CrossTable) -> None:
    """Kernel and reference fill the caches as near to float64 as PyTorch, and leave all memory around them alone."""
    caches = table.key_caches + table.value_caches
    stock, exact = projected(states, table, states.dtype), projected(states, table, torch.float64)
    inputs = [states, *table.key_weights, *table.value_weights, *table.value_biases]
    before = [storage(tensor) for tensor in inputs]
    untouched = []
    for cache in caches:
        margins = twin(cache)
        margins.fill_(0)
        untouched.append((storage(margins), storage(cache)))
    for project in (project_cross_kv_reference, project_cross_kv):
        assert project(states, table) is None
        for cache, wanted, pytorch, (margins, old) in zip(caches, exact, stock, untouched, strict=True):
            assert_close_as_pytorch(cache.clone(), wanted, pytorch)
            inside = margins == 0  # no canary's bits are 0
            assert torch.equal(storage(cache)[~inside], old[~inside]), project.__name__
            cache.fill_(torch.nan)
    for tensor, bits in zip(inputs, before, strict=True):
        assert torch.equal(storage(tensor), bits)


# Triton's interpreter multiplies bfloat16 tiles wrongly.
BFLOAT16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16], ids=dtype_name)
@pytest.mark.parametrize("sizes", WHISPER + ODD, ids=str)
def test_all_layers_are_filled_and_nothing_else(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
    assert_projects(*arguments(sizes, dtype, device))


@pytest.mark.parametrize(("layout", "shift"), [("swapped", 0), ("fused", 1), ("sliced", 0)])
def test_any_strides_and_addresses(layout: str, shift: int, device: torch.device) -> None:
    states, table = arguments(ODD[0], torch.float16, device, layout=layout, shift=shift)
    assert table.is_aligned == (shift == 0 and layout != "sliced")
    assert_projects(states, table)


def test_values_may_have_no_bias(device: torch.device) -> None:
    assert_projects(*arguments(ODD[0], torch.float32, device, bias=False))


def test_tensors_that_have_moved_are_refused_in_a_capture(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    states, table = arguments(ODD[1], torch.float32, device)
    moved = table._replace(key_caches=[cache.clone() for cache in table.key_caches])
    before = [storage(cache) for cache in moved.key_caches + moved.value_caches]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="have moved"):
        module._launch(states, *moved)
    assert all(
        torch.equal(storage(cache), old) for cache, old in zip(moved.key_caches + moved.value_caches, before, strict=True)
    )


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_tiles_of_every_gpu_compute_the_same(capability, itemsize, device, monkeypatch) -> None:
    monkeypatch.setattr(module, "capability", lambda device: capability)
    dtype = torch.float16 if itemsize == 2 else torch.float32
    assert_projects(*arguments(Sizes(1, 2, 70, 4, 64, 64), dtype, device))


def test_a_frame_does_not_depend_on_the_others(device: torch.device) -> None:
    states, table = arguments(Sizes(2, 3, 43, 2, 32, 64), torch.float32, device)
    project_cross_kv(states, table)
    before = [cache[1].clone() for cache in table.key_caches + table.value_caches]
    states[0] = torch.nan
    states[2] *= 3
    project_cross_kv(states, table)
    for cache, row in zip(table.key_caches + table.value_caches, before, strict=True):
        assert torch.equal(cache[1], row)


def test_the_op_keeps_the_rules_of_torch_library(device: torch.device) -> None:
    states, table = arguments(Sizes(2, 1, 5, 2, 32, 16), torch.float32, device)
    project_cross_kv(states, table)  # what comes out must compare equal, so no NaN before
    torch.library.opcheck(torch.ops.whisper_triton.project_cross_kv.default, (states, *table))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_is_traced_without_a_graph_break(backend: str, device: torch.device) -> None:
    """AOT autograd hands the op copies of what it writes, to which the table does not point."""
    states, table = arguments(Sizes(2, 1, 5, 2, 32, 16), torch.float32, device)
    caches = [*table.key_caches, *table.value_caches]

    def fill() -> torch.Tensor:
        project_cross_kv(states, table)
        return torch.stack(caches) + 1

    wanted = fill()
    for cache in caches:
        cache.fill_(torch.nan)
    assert torch.equal(torch.compile(fill, fullgraph=True, backend=backend)(), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lists: lists[3].pop(), r"as many of each .* \[2, 2, 2, 1, 2\]"),
        (lambda lists: [tensors.clear() for tensors in lists], r"at least one"),
        (lambda lists: lists[4].__setitem__(1, lists[4][1].half()), r"value_cache 1 is torch\.float16"),
        (lambda lists: lists[4].__setitem__(1, lists[4][1][:, :, 1:]), r"caches must all have shape \(2, 2, 5, 32\)"),
        (lambda lists: lists[0].__setitem__(0, lists[0][0].T), r"is wanted, contiguous, got \(16, 64\), strides \(1, 16\)"),
        (lambda lists: lists[2].__setitem__(0, lists[2][0][1:]), r"\(64,\) is wanted, contiguous, got \(63,\)"),
        (lambda lists: lists[1].__setitem__(0, lists[1][0].half()), r"torch\.float16 on .* does not go with .*float32"),
    ],
)
def test_a_bad_table_is_refused(change, message: str, device: torch.device) -> None:
    _, table = arguments(Sizes(2, 2, 5, 2, 32, 16), torch.float32, device)
    lists = [list(tensors) for tensors in table[:5]]
    change(lists)
    with pytest.raises(ValueError, match=message):
        cross_table(*lists)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:1], r"must be \(2, 5, 16\) .* got \(1, 5, 16\)"),
        (lambda x: x.half(), r"got \(2, 5, 16\) torch\.float16"),
        (lambda x: x.new_empty(2, 16, 5).transpose(1, 2), r"dense in its last dimension, got strides \(80, 1, 5\)"),
    ],
)
def test_bad_encoder_states_are_refused_and_the_caches_stay_as_they_were(change, message: str, device: torch.device) -> None:
    states, table = arguments(Sizes(2, 2, 5, 2, 32, 16), torch.float32, device)
    before = [storage(cache) for cache in table.key_caches + table.value_caches]
    with pytest.raises(ValueError, match=message):
        project_cross_kv(change(states), table)
    for cache, bits in zip(table.key_caches + table.value_caches, before, strict=True):
        assert torch.equal(storage(cache), bits)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_large_models(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> None:
    assert_projects(*arguments(sizes, dtype, device))


@pytest.mark.gpu
def test_caches_past_two_to_the_31_elements(device: torch.device) -> None:
    states, table = arguments(Sizes(1, 64, 18000, 20, 96, 64), torch.float16, device)
    project_cross_kv(states, table)
    last = states[-1:], table._replace(key_caches=[table.key_caches[0][-1:]], value_caches=[table.value_caches[0][-1:]])
    for cache, wanted in zip((table.key_caches[0], table.value_caches[0]), projected(*last, torch.float64), strict=True):
        assert_close_as_pytorch(cache[-1:], wanted, wanted.half())


@pytest.mark.gpu
def test_a_captured_graph_follows_the_encoder_states(device: torch.device) -> None:
    states, table = arguments(LARGE[2], torch.float16, device)
    graph, _ = captured(lambda: project_cross_kv(states, table))
    for _ in range(3):
        states.normal_()
        graph.replay()
        exact, stock = projected(states, table, torch.float64), projected(states, table, states.dtype)
        for cache, wanted, pytorch in zip(table.key_caches + table.value_caches, exact, stock, strict=True):
            assert_close_as_pytorch(cache, wanted, pytorch)
