"""Self-attention of one decode step, write and attend: our one launch against what the stock static layer runs.

    python benchmarks/append_attention.py

Shapes of large-v3: 20 heads, 448 slots, head dim 64, fp16. Microseconds a layer in a CUDA graph, caches rotated past the
L2. Stock is arange, add, two index_copy_, the position's add_, and SDPA over all slots with a mask (made once a step).
"""

from __future__ import annotations

import itertools

import torch
from torch.nn.functional import scaled_dot_product_attention
from whisper_triton.benchmarks.harness import check, clones, measure, parse_args, print_table, write_rows

from whisper_triton.kernels import append_attention, append_attention_reference

H, S, D = 20, 448, 64


def stock_layer(query, key, value, key_cache, value_cache, position, mask):
    slots = torch.arange(1, device="cuda") + position
    key_cache.index_copy_(2, slots, key.transpose(1, 2))
    value_cache.index_copy_(2, slots, value.transpose(1, 2))
    position.add_(0)  # the stock layer's in-place step, kept still here so that every replay sees the same length
    return scaled_dot_product_attention(query.transpose(1, 2), key_cache, value_cache, attn_mask=mask, scale=0.125)


def bench(B: int, length: int) -> dict[str, object]:
    query, key, value = (torch.randn(B, 1, H, D, device="cuda", dtype=torch.float16) for _ in range(3))
    caches = [torch.randn(B, H, S, D, device="cuda", dtype=torch.float16) for _ in range(2)]
    position = torch.tensor(length - 1, device="cuda")
    mask = (torch.arange(S, device="cuda") < length).view(1, 1, 1, S)
    exact = append_attention_reference(
        query.double(), key.double(), value.double(), *(c.double() for c in caches), position, scale=0.125
    )
    stock = stock_layer(query, key, value, *(c.clone() for c in caches), position, mask).transpose(1, 2)
    ours = append_attention(query, key, value, *(c.clone() for c in caches), position, scale=0.125)
    check("append_attention", ours, exact, stock)

    touched = 2 * B * H * length * D * 2  # of a call of ours; stock's SDPA reads all slots
    rotated = clones(caches, touched)
    ours_us = measure([lambda c=c: append_attention(query, key, value, *c, position, scale=0.125) for c in rotated])
    stock_us = measure([lambda c=c: stock_layer(query, key, value, *c, position, mask) for c in rotated])
    return {
        "B": B,
        "length": length,
        "ours_us": ours_us[0],
        "spread_us": ours_us[1],
        "stock_us": stock_us[0],
        "MB": touched / 1e6,
        "ours_GB/s": touched / ours_us[0] / 1e3,
        "stock/ours": stock_us[0] / ours_us[0],
    }


def main() -> None:
    args = parse_args(__doc__, "append_attention.jsonl")
    rows = [bench(B, length) for B, length in itertools.product((1, 8, 32), (20, 100, 200, 448))]
    print_table(rows)
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
