"""Cross-attention of one decode step: our kernel against every SDPA backend, by batch.

    python benchmarks/decode_attention.py

Shapes of large-v3: 20 heads, 1500 frames, head dim 64, fp16. Microseconds a layer in a CUDA graph, caches rotated past
the L2. `ours_us` joins the splits of a head in a second launch, where there are any; `joined_us` has the head's last program
do it, for which the caller hands in counters. `floor_us` is the bytes of keys and values over the bandwidth measured in the
same run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from whisper_triton.benchmarks.harness import check, clones, measure, print_table, read_bandwidth, write_rows

from whisper_triton.kernels import decode_attention, decode_attention_reference

H, S, D = 20, 1500, 64
BATCHES = "1,2,3,4,5,6,7,8,10,12,14,16,20,24,28,32,40,48,56,64"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def bench(B: int, bandwidth: float) -> dict[str, object]:
    query = torch.randn(B, 1, H, D, device="cuda", dtype=torch.float16)
    key, value = (torch.randn(B, H, S, D, device="cuda", dtype=torch.float16) for _ in range(2))
    exact = decode_attention_reference(query[:1].double(), key[:1].double(), value[:1].double(), scale=0.125)
    stock = scaled_dot_product_attention(query[:1].transpose(1, 2), key[:1], value[:1], scale=0.125).transpose(1, 2)
    counters = torch.zeros(B * H, dtype=torch.int32, device="cuda")
    check("decode_attention", decode_attention(query, key, value, scale=0.125, read_ahead=True)[:1], exact, stock)
    joined = decode_attention(query, key, value, scale=0.125, read_ahead=True, counters=counters)
    check("decode_attention with counters", joined[:1], exact, stock)

    caches = clones([key, value])
    ahead = measure([lambda c=c: decode_attention(query, *c, scale=0.125, read_ahead=True) for c in caches])
    plain = measure([lambda c=c: decode_attention(query, *c, scale=0.125) for c in caches])
    joined = measure([lambda c=c: decode_attention(query, *c, scale=0.125, read_ahead=True, counters=counters) for c in caches])
    row: dict[str, object] = {
        "B": B,
        "ours_us": ahead[0],
        "spread_us": ahead[1],
        "not_ahead_us": plain[0],
        "joined_us": joined[0],
        "joined_spread_us": joined[1],
    }
    for name, backend in BACKENDS.items():
        with sdpa_kernel(backend):
            calls = [lambda c=c: scaled_dot_product_attention(query.transpose(1, 2), *c, scale=0.125) for c in caches]
            row[f"{name}_us"] = measure(calls)[0]
    size = key.nbytes + value.nbytes
    row["floor_us"] = size / bandwidth / 1e3
    row["ours_GB/s"] = size / ahead[0] / 1e3
    row["best_sdpa/ours"] = min(row[f"{name}_us"] for name in BACKENDS) / ahead[0]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default=BATCHES, help="batch sizes, separated by commas")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "rows" / "decode_attention.jsonl")
    args = parser.parse_args()
    bandwidth = read_bandwidth()
    rows = [bench(B, bandwidth) for B in map(int, args.batch.split(","))]
    print(f"read bandwidth {bandwidth:.0f} GB/s")
    print_table(rows)
    write_rows(args.output, [row | {"bandwidth_GB/s": bandwidth} for row in rows])


if __name__ == "__main__":
    main()
