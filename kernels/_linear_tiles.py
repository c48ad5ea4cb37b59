"""How a launch of `skinny_linear` is cut: the measured tables, by shapes, and what each kernel takes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._paced import MIN_WIDTH, MIN_WIDTH_OF_FEW
from ._paced_linear import covers_linear
from ._paced_rows import BLOCK_K, MAX_BLOCK_B, covers_rows

MANY_OUTPUTS = 16384  # as only an LM head has them


class Tiles(NamedTuple):
    """How a launch is cut: output columns a program, programs that share a column's K, warps a program, on which cores."""

    BLOCK_N: int
    SPLIT_K: int
    num_warps: int
    USE_DOT: bool = False  # tensor cores, from two rows on
    PACE: int = 0  # chunks of K on their way at a time, in the kernels with paced copies; 0: all, in the plain one
    PROGRAMS: int = 0  # a multiprocessor, which go on from tile to tile, on tensor cores; 0: each has one


def choose_tiles(B: int, N: int, K: int, parts: int, has_norm: bool, has_copies: bool = False) -> Tiles:
    """Tiles from shapes alone, and from what surrounds the product: `parts` weights at once, a layer norm before it.

    `has_copies`: paced copies are to be had, which some of these shapes take. K can be split where nothing but a bias and a
    residual surrounds the product. Those of the plain kernel were measured on one H100 80GB HBM3, large-v3, fp16, by
    benchmarks/tune_step.py, but for the projections with a residual of one row, whose tile a search over neighbouring links
    found: one row 2026-11-24, its LM head 2026-11-29, several 2026-11-22 at batch 8.
    """
    paced = choose_paced_tiles(B, N, K, parts, has_norm) if has_copies else None
    if paced is not None and covers(paced, B, N, K, has_norm):
        return paced
    if B > 1:
        if N > MANY_OUTPUTS:
            return Tiles(32, 1, 4, True)
        if K > 2048 and K % 1024 == 0 and parts == 1 and not has_norm:
            return Tiles(64, K // 1024, 8, True)
        if K > 2048:  # wider than any Whisper: small enough for shared memory
            return Tiles(16, 1, 8, True)
        return Tiles(64 if N > 2048 and parts == 1 else 32, 1, 8, True)
    if N > MANY_OUTPUTS:
        return Tiles(16, 1, 4)
    if K > 2048:
        return Tiles(4, 1, 4)
    if parts == 3:
        return Tiles(4, 1, 2)
    if N > K:
        return Tiles(16, 1, 4)
    return Tiles(4, 1, 4) if has_norm else Tiles(8, 1, 4)


def choose_paced_tiles(B: int, N: int, K: int, parts: int, has_norm: bool) -> Tiles | None:
    """Tiles of the kernels with paced copies, or None where the plain one is as fast or nothing has been measured.

    Measured on one H100 80GB HBM3, fp16, as benchmarks/tune_step.py does, tiles and paces together: large-v3 at batch 1 and 8,
    2026-11-29, at 16 and 32, 2026-11-25, with what came out tried in medium at 1, 2 and 8. On one NVIDIA H200, 2026-11-29,
    and not on an H100 since: large-v3 at 2 and 4 (3 has most of 4's), fc2 of one row, eight once more; the LM head in turbo at
    1 to 32, medium, small and base at 1, 2 and 8.
    """
    if B > 32:
        return None
    if N > MANY_OUTPUTS:
        if K < MIN_WIDTH:
            return Tiles(32, 1, 4, True, max(1, K // BLOCK_K), PROGRAMS=4) if 4 < B <= 8 else None
        return Tiles(32, 1, 8, True, K // BLOCK_K, PROGRAMS=2) if B > 16 else Tiles(16, 1, 4, True, K // BLOCK_K, PROGRAMS=4)
    if min(N, K) < (MIN_WIDTH_OF_FEW if 1 < B <= 4 else MIN_WIDTH):
        return None
    if B == 1:
        if K > 2048:
            return Tiles(4, 1, 2, PACE=4)
        if parts == 3:
            return Tiles(8, 1, 2, PACE=2)
        return Tiles(16 if N > K else 8, 1, 4, PACE=2)
    has_few_rows, has_many_rows = B <= 4, B > 16
    if K > 2048:
        return Tiles(32, 4, 4, True, 2) if parts == 1 and not has_norm else None
    if parts == 3:
        return Tiles(64, 1, 8, True, 2) if has_many_rows else Tiles(32, 1, 4, True, 3)
    if N > K:
        return Tiles(32 if has_few_rows else 64, 1, 8 if has_many_rows else 4, True, 1)
    if has_norm:
        if has_few_rows:
            return Tiles(32 if B == 2 else 16, 1, 8, True, 5)
        return None if has_many_rows else Tiles(32, 1, 4, True, 3)
    return Tiles(16, 1, 4, True, 1) if has_few_rows else Tiles(32, 1, 4, True, 4 if has_many_rows else 2)


def covers(tiles: Tiles, B: int, N: int, K: int, has_norm: bool) -> bool:
    """Whether the kernels with paced copies take these shapes in these tiles."""
    BLOCK_N, SPLIT_K, num_warps, use_dot, _, PROGRAMS = tiles
    if use_dot:
        return covers_rows(B, K, has_norm, BLOCK_N, SPLIT_K, num_warps, PROGRAMS)
    return covers_linear(N, K, has_norm, BLOCK_N, SPLIT_K, num_warps)


def fits_tiles(width: int) -> bool:
    """Whether `width` is a power of two from 16 on, or the sum of two: so are all widths of Whisper."""
    tail = width & (width - 1)
    return width % 16 == 0 and width > 0 and tail & (tail - 1) == 0


def check_tiles(tiles: Tiles, x: torch.Tensor, can_split: bool, is_bare: bool) -> None:
    """Of what a caller chose, for x (B, K).

    can_split: one weight, and nothing but a bias and a residual around the product; is_bare: one weight, without bias, GELU and
    residual.

    Raises:
        ValueError: tiles that no kernel takes.
    """
    (B, K), SPLIT_K = x.shape, tiles.SPLIT_K
    if any(number < 1 or number & (number - 1) for number in (tiles.BLOCK_N, tiles.num_warps)):
        raise ValueError(f"BLOCK_N and num_warps must be powers of two, got {tiles}")
    if SPLIT_K < 1 or min(tiles.PACE, tiles.PROGRAMS) < 0:
        raise ValueError(f"SPLIT_K must be at least 1, PACE and PROGRAMS at least 0, got {tiles}")
    if tiles.num_warps > 32 or (16 if tiles.USE_DOT else tiles.num_warps) > tiles.BLOCK_N:
        raise ValueError(f"32 warps are the most, and BLOCK_N must be as many, or 16 for tensor cores, got {tiles}")
    if (B > 1 or tiles.USE_DOT) and x.dtype == torch.float32:
        raise ValueError(f"tensor cores, which several rows take, would round fp32 to tf32, got {B} rows and {tiles}")
    if B > 1 and not tiles.USE_DOT:
        raise ValueError(f"several rows, {B} here, take tensor cores, got {tiles}")
    if K % SPLIT_K or not fits_tiles(K // SPLIT_K):
        raise ValueError(f"K = {K} in {SPLIT_K} parts is no sum of two powers of two from 16 on")
    if SPLIT_K > 1 and not can_split:
        raise ValueError("only a plain linear layer can have its K split")
    if tiles.PROGRAMS > 0 and not (tiles.PACE > 0 and tiles.USE_DOT and SPLIT_K == 1 and B <= MAX_BLOCK_B):
        raise ValueError(
            f"programs go on from tile to tile by paced copies on tensor cores, over all of K, of up to {MAX_BLOCK_B} rows, got"
            f" {B} and {tiles}"
        )
    if tiles.PROGRAMS > 0 and not is_bare:
        raise ValueError(f"only a product of one weight, without bias, GELU and residual, has {tiles.PROGRAMS=} programs go on")
