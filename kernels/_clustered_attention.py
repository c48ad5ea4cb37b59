"""`decode_attention` of one token over the cross caches of few heads, a cluster of programs a head: see `_clustered_cross.py`.

A cluster's programs join their softmax states through shared memory, so that one launch does what takes two otherwise, or
counters that the caller keeps.
"""

from __future__ import annotations

import torch

from ._arguments import cache_arguments
from ._cluster import BARRIERS, NUM_CTAS, covers_heads, launch_clusters
from ._clustered_cross import MAX_KEYS, CrossTiles, _clustered_cross_kernel, shared_bytes
from ._clustered_linear import BLOCK_K
from ._dispatch import triton
from ._paced import MIN_WIDTH, ROWS, SHARED_MEMORY

# In the batch, B * H. Measured as benchmarks/decode_attention.py does on one NVIDIA H200, with the 20 heads of large-v3, fp16,
# 2026-11-29: 3.2 us instead of 4.2 at batch 1, 5.4 (7.4) at 2, 8.6 (8.8) at 3, 10.3 (10.9) at 4, but 20.5 (18.0) at 8.
MAX_HEADS = 80
MIN_KEYS = 513  # a self cache is shorter
TILES = CrossTiles(4, 4)


def covers_clusters(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> bool:
    """Whether clusters take these and are the faster way; from shapes, strides and the device alone."""
    B, T, H, D = query.shape
    S = key_cache.shape[2]
    return (
        T == 1
        and B * H <= MAX_HEADS
        and H * D >= MIN_WIDTH
        and MIN_KEYS <= S <= MAX_KEYS
        and covers_heads(query, (key_cache, value_cache), TILES.num_warps)
        and shared_bytes(0, S, D, TILES) <= SHARED_MEMORY
        and S * max(key_cache.stride(2), value_cache.stride(2)) < 1 << 31
    )


def clustered_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    qk_scale: float,
    ended: torch.Tensor | None,
    read_ahead: bool,
) -> torch.Tensor:
    """Launches `_clustered_cross_kernel` where it `covers_clusters`, over all slots; returns (B, 1, H, D).

    `qk_scale` is for a softmax in base 2; `ended` and `read_ahead` as in `decode_attention`.
    """
    B, H, S, D = key_cache.shape
    out = query.new_empty(B, 1, H, D)
    launch_clusters(
        _clustered_cross_kernel,
        (H, B),
        TILES.num_warps,
        B == 1,
        x_ptr=query,
        weight_ptr=query,
        bias_ptr=query,
        norm_weight_ptr=query,
        norm_bias_ptr=query,
        **cache_arguments(key_cache, value_cache),
        out_ptr=out,
        ended_ptr=query if ended is None else ended,
        scale=1.0,
        eps=0.0,
        qk_scale=qk_scale,
        stride_x_b=query.stride(0),
        stride_x_h=query.stride(2),
        H=H,
        S=S,
        HAS_PROJECTION=False,
        HAS_ENDED=ended is not None,
        READ_AHEAD=read_ahead,
        K=0,
        HEAD_DIM=D,
        NUM_PIECES=triton.cdiv(S, NUM_CTAS * TILES.num_warps * ROWS),
        PACE=TILES.PACE,
        BLOCK_K=BLOCK_K,
        ROWS=ROWS,
        BARRIERS_SIZE=BARRIERS,
    )
    return out
