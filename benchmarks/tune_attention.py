"""Which tiles suit decode_attention and append_attention on this GPU: prints the best few a shape, all rows to a file.

    python benchmarks/tune_attention.py

`MEASURED_TILES` in kernels/decode_attention.py and `choose_tiles` in kernels/append_attention.py are set from its output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from whisper_triton.benchmarks.harness import clones, measure, parse_args, write_rows
from whisper_triton.kernels.append_attention import Tiles as AppendTiles
from whisper_triton.kernels.append_attention import _launch as launch_append
from whisper_triton.kernels.decode_attention import Tiles as DecodeTiles
from whisper_triton.kernels.decode_attention import _launch as launch_decode

H, D = 20, 64
BATCHES = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
# Keys a tile and warps a program, where a thread holds 8 to 64 elements of a tile.
CUTS = [
    (keys, warps)
    for keys, warps in itertools.product((16, 32, 64, 128, 256), (1, 2, 4, 8))
    if 8 <= keys * D // (32 * warps) <= 64
]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float16)


def compile_ahead(calls: list[Callable[[], object]]) -> None:
    """Compiles in threads what is measured below: Triton keeps the results."""

    def compile_one(call: Callable[[], object]) -> None:
        with suppress(Exception):  # the measurement meets it again and raises it
            call()

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(compile_one, calls))
    torch.cuda.synchronize()


def best(rows: list[dict[str, object]]) -> None:
    for row in sorted(rows, key=lambda row: row["us"])[:5]:
        print({key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}, flush=True)


def tune_decode(B: int) -> list[dict[str, object]]:
    query, caches = randn(B, 1, H, D), clones([randn(B, H, 1500, D) for _ in range(2)])
    most = max(6, 480 // (B * H))
    rows = []
    for (keys, warps), splits in itertools.product(CUTS, sorted({1, 2, 3, 4, 5, 6, most // 2, most})):
        tiles = DecodeTiles(keys, splits, warps, 2)
        us, _ = measure([lambda c=c, t=tiles: launch_decode(query, *c, None, 1.0, True, True, None, t) for c in caches], 12)
        rows.append({"op": "decode_attention", "B": B, "tiles": list(tiles), "us": us})
    best(rows)
    return rows


def tune_append(B: int, length: int) -> list[dict[str, object]]:
    query, key, value, out = (randn(B, 1, H, D) for _ in range(4))
    caches = clones([randn(B, H, 448, D) for _ in range(2)], touched=2 * B * H * length * D * 2)
    position = torch.tensor(length - 1, device="cuda")
    rows = []
    for keys, warps in CUTS:
        tiles = AppendTiles(keys, warps, 2)
        calls = [lambda c=c, t=tiles: launch_append(query, key, value, *c, position, out, 1.0, True, t) for c in caches]
        rows.append({"op": "append_attention", "B": B, "length": length, "tiles": list(tiles), "us": measure(calls, 12)[0]})
    best(rows)
    return rows


def main() -> None:
    args = parse_args(__doc__, "tune_attention.jsonl")
    q, k = randn(2, 1, H, D), randn(2, H, 1500, D)
    compile_ahead(
        [
            lambda c=c, s=s: launch_decode(q, k, k, None, 1.0, True, True, None, DecodeTiles(c[0], s, c[1], 2))
            for c in CUTS
            for s in (1, 4)
        ]
    )
    rows = [row for B in BATCHES for row in tune_decode(B)]
    rows += [row for B, length in itertools.product((1, 8, 32), (20, 100, 440)) for row in tune_append(B, length)]
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
