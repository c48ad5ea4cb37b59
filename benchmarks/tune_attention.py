"""Which tiles suit decode_attention and append_attention on this GPU: prints the best few a shape, all rows to a file.

    python benchmarks/tune_attention.py --output rows.jsonl

The tables in kernels/decode_attention.py and kernels/append_attention.py are set from its output.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from harness import measure, num_buffers, read_bandwidth, write_rows
from torch.nn.attention import SDPBackend, sdpa_kernel
from whisper_triton.kernels.append_attention import Tiles as AppendTiles
from whisper_triton.kernels.append_attention import _launch as launch_append
from whisper_triton.kernels.decode_attention import Tiles as DecodeTiles
from whisper_triton.kernels.decode_attention import _launch as launch_decode

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
H, D = 20, 64


def best(rows: list[dict], count: int = 4) -> list[dict]:
    return sorted(rows, key=lambda row: row["us"])[:count]


def attempt(calls: list[Callable[[], object]]) -> float:
    try:
        return measure(calls, replays=12)[0]
    except Exception as error:  # a tile that does not fit is not a candidate
        print(f"    {type(error).__name__}: {str(error)[:100]}", flush=True)
        return float("inf")


def compile_ahead(jobs: list[Callable[[], object]]) -> None:
    """Compiles in threads what the measurements below launch; the results go to Triton's cache."""

    def run(job: Callable[[], object]) -> None:
        try:
            job()
        except Exception:
            pass  # reported when it is measured

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(run, jobs))
    torch.cuda.synchronize()


def tune_decode(S: int, batches: list[int]) -> list[dict]:
    rows = []
    shapes = [
        (b, w, n) for b, w, n in itertools.product((16, 32, 64, 128, 256), (1, 2, 4, 8), (1,)) if 8 <= b * D // (32 * w) <= 64
    ]
    tiny = [torch.randn(2, H, S, D, device="cuda", dtype=torch.float16) for _ in range(2)]
    q = torch.randn(2, 1, H, D, device="cuda", dtype=torch.float16)
    compile_ahead(
        [
            lambda t=t, s=s: launch_decode(q, *tiny, None, 1.0, True, True, DecodeTiles(t[0], s, *t[1:]))
            for t in shapes
            for s in (1, 4)
        ]
    )
    for B in batches:
        size = 2 * B * H * S * D * 2
        caches = [
            [torch.randn(B, H, S, D, device="cuda", dtype=torch.float16) for _ in range(2)]
            for _ in range(num_buffers(size, at_most=40))
        ]
        q = torch.randn(B, 1, H, D, device="cuda", dtype=torch.float16)
        found = []
        for splits in {
            1: (6, 8, 10, 12, 13, 16, 18, 24),
            2: (3, 4, 5, 6, 8, 12),
            4: (2, 3, 4, 5, 6),
            8: (1, 2, 3, 4, 5, 6, 8),
            16: (1, 2, 3, 4),
        }.get(B, (1, 2, 3, 4)):
            for b, w, n in shapes:
                tiles = DecodeTiles(b, splits, w, n)
                us = attempt([lambda c=c: launch_decode(q, *c, None, 1.0, True, True, tiles) for c in caches])
                found.append(
                    {"op": "decode_attention", "B": B, "S": S, "tiles": list(tiles), "us": us, "GB/s": size / us / 1e3}
                )
        for name, backend in BACKENDS.items():
            with sdpa_kernel(backend):
                us = attempt(
                    [
                        lambda c=c: torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), *c, scale=1.0)
                        for c in caches
                    ]
                )
            rows.append({"op": f"sdpa {name}", "B": B, "S": S, "us": us, "GB/s": size / us / 1e3})
            print(f"cross B={B} sdpa {name}: {us:.2f} us", flush=True)
        for row in best(found):
            print(f"cross B={B} {row['tiles']}: {row['us']:.2f} us {row['GB/s']:.0f} GB/s", flush=True)
        rows += found
        del caches
    return rows


def tune_append(batches: list[int]) -> list[dict]:
    rows, S = [], 448
    shapes = [
        (b, w, n)
        for b, w, n in itertools.product((16, 32, 64, 128, 256), (1, 2, 4, 8, 16), (1,))
        if 8 <= b * D // (32 * w) <= 64
    ]
    for B, length in itertools.product(batches, (20, 100, 440)):
        size = 2 * B * H * S * D * 2
        caches = [
            [torch.randn(B, H, S, D, device="cuda", dtype=torch.float16) for _ in range(2)]
            for _ in range(num_buffers(size, at_most=64))
        ]
        q, k, v, out = (torch.randn(B, 1, H, D, device="cuda", dtype=torch.float16) for _ in range(4))
        position = torch.tensor(length, device="cuda")
        found = []
        for tiles in itertools.starmap(AppendTiles, shapes):
            us = attempt([lambda c=c: launch_append(q, k, v, *c, position, out, 1.0, tiles) for c in caches])
            found.append({"op": "append_attention", "B": B, "length": length, "tiles": list(tiles), "us": us})
        for row in best(found):
            print(f"append B={B} length={length} {row['tiles']}: {row['us']:.2f} us", flush=True)
        rows += found
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("tune_attention.jsonl"))
    args = parser.parse_args()
    print(f"read bandwidth {read_bandwidth():.0f} GB/s")
    rows = tune_decode(1500, [1, 2, 4, 8, 16, 32, 64]) + tune_append([1, 8])
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
