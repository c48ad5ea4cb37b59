"""`decode_attention` of one token over a cross cache that comes by paced asynchronous copies: see `_paced.py`.

A program has a part of one head's keys, all of which find room in its shared memory; for many heads see `_paced_stream.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._dispatch import triton
from ._paced import (
    MIN_WIDTH,
    PACED_HEAD_DIMS,
    ROWS,
    are_aligned,
    async_load,
    commit_group,
    gl,
    gluon,
    has_paced_copies,
    launch_dependents,
    prefer_shared_memory,
    wait_for_previous,
    wait_group,
)
from ._paced_splits import hand_over, split_arguments


@gluon.jit
def _paced_attention_kernel(
    query_ptr,  # (B, 1, H, D) fp16/bf16
    key_cache_ptr,  # (B, H, S, D)
    value_cache_ptr,  # (B, H, S, D)
    partial_ptr,  # (B, H, NUM_SPLITS * NUM_WARPS, D) fp32
    max_ptr,  # (B, H, NUM_SPLITS * NUM_WARPS) fp32
    sum_ptr,  # (B, H, NUM_SPLITS * NUM_WARPS) fp32
    out_ptr,  # (B, 1, H, D)
    counter_ptr,  # (B, H) int32, 0 before and after: programs of a head that are done
    ended_ptr,  # (B,) int; not read unless HAS_ENDED
    qk_scale,
    stride_q_b,
    stride_q_h,
    stride_kc_b,
    stride_kc_h,
    stride_kc_s,
    stride_vc_b,
    stride_vc_h,
    stride_vc_s,
    H,
    S,
    HAS_ENDED: gl.constexpr,
    NUM_SPLITS: gl.constexpr,
    BLOCK_SPLITS: gl.constexpr,  # the power of two from NUM_SPLITS * NUM_WARPS on
    PACE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_S: gl.constexpr,
    ROWS: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    launch_dependents()
    # (warp, row, D): each warp has keys of its own, and a softmax state, which is joined with the others at the very end.
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 256 // HEAD_DIM, HEAD_DIM // 8], [NUM_WARPS, 1, 1], [2, 1, 0])
    LAYOUT_ROWS: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0])
    NUM_PIECES: gl.constexpr = BLOCK_S // (ROWS * NUM_WARPS)
    dtype: gl.constexpr = key_cache_ptr.dtype.element_ty
    i_split = gl.program_id(0)
    i_h = gl.program_id(1).to(gl.int64)
    i_b = gl.program_id(2).to(gl.int64)
    offs_w = gl.arange(0, NUM_WARPS, layout=gl.SliceLayout(1, LAYOUT_ROWS))
    offs_r = gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT_ROWS))
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT)))
    offs_3d = gl.expand_dims(gl.expand_dims(offs_d, 0), 0)
    first_s = i_split * BLOCK_S + offs_w[:, None] * ROWS + offs_r[None, :]
    key_cache_ptr += i_b * stride_kc_b + i_h * stride_kc_h
    value_cache_ptr += i_b * stride_vc_b + i_h * stride_vc_h
    if HAS_ENDED:
        S = gl.where(gl.load(ended_ptr + i_b) == 0, S, 0)

    keys, values = (), ()
    for i in gl.static_range(2 * NUM_PIECES):
        offs_s = first_s + i % NUM_PIECES * (ROWS * NUM_WARPS)
        mask = (offs_s < S)[:, :, None]
        piece = gl.allocate_shared_memory(dtype, [NUM_WARPS, ROWS, HEAD_DIM], SHARED)
        if i < NUM_PIECES:
            ptrs = key_cache_ptr + (offs_s.to(gl.int64) * stride_kc_s)[:, :, None] + offs_3d
            async_load(piece, ptrs, mask=mask, eviction_policy="evict_first")
            keys = keys + (piece,)  # noqa: RUF005
        else:
            ptrs = value_cache_ptr + (offs_s.to(gl.int64) * stride_vc_s)[:, :, None] + offs_3d
            async_load(piece, ptrs, mask=mask, eviction_policy="evict_first")  # past S: zeros
            values = values + (piece,)  # noqa: RUF005
        commit_group()
        wait_group(PACE - 1)
    wait_for_previous()  # the cross cache does not change during a step; the query has just been written

    q = gl.load(query_ptr + i_b * stride_q_b + i_h * stride_q_h + offs_d).to(gl.float32) * qk_scale
    q = gl.expand_dims(gl.expand_dims(q, 0), 0)
    wait_group(0)
    scores = ()
    m = gl.full([NUM_WARPS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, LAYOUT_ROWS))
    for i in gl.static_range(NUM_PIECES):
        score = gl.sum(q * keys[i].load(LAYOUT).to(gl.float32), axis=2)
        score = gl.where(first_s + i * (ROWS * NUM_WARPS) < S, score, float("-inf"))
        scores = scores + (score,)  # noqa: RUF005
        m = gl.maximum(m, gl.max(score, axis=1))
    safe_m = gl.where(m == float("-inf"), 0.0, m)  # a warp past the last key
    l = gl.zeros([NUM_WARPS, ROWS], gl.float32, layout=LAYOUT_ROWS)
    acc = gl.zeros([NUM_WARPS, ROWS, HEAD_DIM], gl.float32, layout=LAYOUT)
    for i in gl.static_range(NUM_PIECES):
        p = gl.exp2(scores[i] - safe_m[:, None])
        l += p
        acc += p[:, :, None] * values[i].load(LAYOUT).to(gl.float32)
    hand_over(
        m, gl.sum(l, axis=1), gl.sum(acc, axis=1), i_split, NUM_SPLITS, i_b * H + i_h, partial_ptr, max_ptr, sum_ptr, out_ptr,
        counter_ptr, HAS_ENDED, HEAD_DIM, NUM_SPLITS, BLOCK_SPLITS, NUM_WARPS,
    )  # fmt: skip


class AttentionTiles(NamedTuple):
    """Keys a program, warps a program, pieces of `ROWS` keys a warp on their way."""

    BLOCK_S: int
    num_warps: int
    PACE: int


def choose_attention_tiles(B: int) -> AttentionTiles:
    """Tiles for B sequences. Measured in steps of large-v3, fp16: of 1 and 8 rows on one H100 80GB HBM3, 2026-11-25; of 2 and 4
    on one NVIDIA H200, 2026-11-29, and not on an H100. Three have those of four.
    """
    if 1 < B <= 4:
        return AttentionTiles(96, 2 if B == 2 else 4, 2)
    return AttentionTiles(128, 4, 4 if B == 1 else 2)


MAX_HEADS = 640  # in the batch, B * H: more of them have not been measured


def covers_attention(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> bool:
    """Whether `_paced_attention_kernel` takes these and is the faster one; from shapes, strides and the device alone."""
    B, T, H, D = query.shape
    return (
        T == 1
        and B * H <= MAX_HEADS
        and H * D >= MIN_WIDTH
        and D in PACED_HEAD_DIMS
        and 512 < key_cache.shape[2] <= 2048  # a self cache is shorter, and its kernel another; more have not been measured
        and has_paced_copies(query.device, query.dtype)
        and are_aligned(key_cache, value_cache)
    )


def paced_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    qk_scale: float,
    counters: torch.Tensor,
    ended: torch.Tensor | None,
) -> torch.Tensor:
    """Launches `_paced_attention_kernel` where it `covers_attention`, over all slots; returns (B, 1, H, D).

    `qk_scale` is for a softmax in base 2; `counters` and `ended` as in `decode_attention`.
    """
    B, _, H, _ = query.shape
    tiles = choose_attention_tiles(B)
    splits = triton.cdiv(key_cache.shape[2], tiles.BLOCK_S)
    out, arguments = split_arguments(query, key_cache, value_cache, qk_scale, counters, ended, splits, tiles.num_warps)
    kernel = _paced_attention_kernel[(splits, H, B)](
        **arguments,
        NUM_SPLITS=splits,
        PACE=tiles.PACE,
        BLOCK_S=tiles.BLOCK_S,
        ROWS=ROWS,
    )
    if B == 1:
        prefer_shared_memory(kernel)
    return out
