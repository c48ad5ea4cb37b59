"""Writing keys and values into a static cache: our one launch against what the stock static layer runs.

    python benchmarks/update_kv_cache.py

By default the shapes of large-v3: 20 heads, head dim 64, fp16; T new tokens as (B, T, H, D) views. T = 1500, all frames, is
the cross cache, once a window. Microseconds a layer in a CUDA graph, caches rotated; only T = 1500 touches enough to pass the
L2, so only it has a floor. Stock copies the transposed states, then runs arange, add, two index_copy_ and the position's add_;
`compiled` is stock's under torch.compile.
"""

from __future__ import annotations

import torch
from whisper_triton.benchmarks.harness import Place, Row
from whisper_triton.benchmarks.models import Shape, shapes_on
from whisper_triton.benchmarks.tasks import measure_named, parser_for

from whisper_triton.kernels import update_kv_cache


def stock_write(
    key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, position: torch.Tensor
) -> None:
    """What a static layer of transformers runs for states (B, T, H, D); its position stays, so that replays are the same."""
    slots = torch.arange(key.shape[1], device=key.device) + position
    key_cache.index_copy_(2, slots, key.transpose(1, 2))
    value_cache.index_copy_(2, slots, value.transpose(1, 2))
    position.add_(0)


def copy_and_write(key: torch.Tensor, value: torch.Tensor, *cache: torch.Tensor) -> None:
    """With the states copied as a projection's are, whose heads stand before its tokens only after a copy."""
    stock_write(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key, value)), *cache)


def bench_tokens(place: Place, shape: Shape, B: int, T: int) -> Row:
    S = shape.frames if shape.frames == T else shape.slots
    states = [place.randn(B, T, shape.heads, shape.head_dim) for _ in range(2)]
    caches = [place.randn(B, shape.heads, S, shape.head_dim) for _ in range(2)]
    position = torch.tensor(S - T, device=place.device)
    compiled = place.compile(copy_and_write)
    results = []
    for write in (copy_and_write, update_kv_cache, compiled):
        written = [c.clone() for c in caches]
        write(*states, *written, position)
        results.append(written)
    for result in results[1:]:
        if not all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True)):
            raise SystemExit(f"update_kv_cache is wrong at {B=}, {T=}")

    # For few tokens a call touches too little to pass the L2 with any number of caches, and its time is the launch's.
    is_large = shape.frames == T
    touched = 4 * states[0].nbytes
    rotated = place.clones([*states, *caches], touched if is_large else None)

    def time(write: object) -> tuple[float, float]:
        return place.measure([lambda c=c: write(*c, position) for c in rotated])

    ours_us, stock_us = time(update_kv_cache), time(copy_and_write)
    return {
        "benchmark": "update_kv_cache",
        "B": B,
        "T": T,
        "ours_us": ours_us[0],
        "spread_us": ours_us[1],
        "stock_us": stock_us[0],
        "compiled_us": time(compiled)[0],
        "floor_us": place.floor_us(touched) if is_large else None,
        "ours_GB/s": touched / ours_us[0] / 1e3,
        "stock/ours": stock_us[0] / ours_us[0],
    }


def bench(place: Place, shape: Shape, B: int) -> list[Row]:
    return [bench_tokens(place, shape, B, T) for T in (1, 4, shape.frames)]


def main() -> None:
    measure_named(parser_for(__doc__, "large-v3").parse_args(), "update_kv_cache", {"update_kv_cache": bench}, shapes_on)


if __name__ == "__main__":
    main()
