"""Writing keys and values into a static cache: our one launch against what the stock static layer runs.

    python benchmarks/update_kv_cache.py

Shapes of large-v3: 20 heads, head dim 64, fp16; T new tokens as (B, T, H, D) views. T = 1500 is the cross cache, once a
window. Microseconds a layer in a CUDA graph, caches rotated; only T = 1500 touches enough to pass the L2, so only it has a
floor. Stock copies the transposed states, then runs arange, add, two index_copy_ and the position's add_.
"""

from __future__ import annotations

import itertools

import torch
from whisper_triton.benchmarks.harness import clones, measure, parse_args, print_table, read_bandwidth, write_rows

from whisper_triton.kernels import update_kv_cache

H, D = 20, 64


def stock_layer(key, value, key_cache, value_cache, position):
    slots = torch.arange(key.shape[1], device="cuda") + position
    key_cache.index_copy_(2, slots, key.transpose(1, 2).contiguous())
    value_cache.index_copy_(2, slots, value.transpose(1, 2).contiguous())
    position.add_(0)  # the stock layer's in-place step, kept still here so that every replay writes the same slots


def bench(B: int, T: int, bandwidth: float) -> dict[str, object]:
    S = 1500 if T == 1500 else 448
    states = [torch.randn(B, T, H, D, device="cuda", dtype=torch.float16) for _ in range(2)]
    caches = [torch.randn(B, H, S, D, device="cuda", dtype=torch.float16) for _ in range(2)]
    position = torch.tensor(S - T, device="cuda")
    ours, stock = [c.clone() for c in caches], [c.clone() for c in caches]
    update_kv_cache(*states, *ours, position)
    stock_layer(*states, *stock, position)
    if not all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True)):
        raise SystemExit(f"update_kv_cache is wrong at {B=}, {T=}")

    # For few tokens a call touches too little to pass the L2 with any number of caches, and its time is the launch's.
    rotated = clones([*states, *caches], None if T < 1500 else 4 * states[0].nbytes)
    ours_us = measure([lambda c=c: update_kv_cache(*c, position) for c in rotated])
    stock_us = measure([lambda c=c: stock_layer(*c, position) for c in rotated])
    return {
        "B": B,
        "T": T,
        "ours_us": ours_us[0],
        "spread_us": ours_us[1],
        "stock_us": stock_us[0],
        "floor_us": 4 * states[0].nbytes / bandwidth / 1e3 if T == 1500 else None,
        "ours_GB/s": 4 * states[0].nbytes / ours_us[0] / 1e3,
        "stock/ours": stock_us[0] / ours_us[0],
    }


def main() -> None:
    args = parse_args(__doc__, "update_kv_cache.jsonl")
    bandwidth = read_bandwidth()
    rows = [bench(B, T, bandwidth) for B, T in itertools.product((1, 8), (1, 4, 1500))]
    print_table(rows)
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
