"""`decode_attention` of one token over the cross caches of many heads, by paced asynchronous copies: see `_paced.py`.

As many programs as find room at once share out the pieces of all heads evenly, each a row of them, and go on from piece to
piece and from head to head: a place in shared memory is filled again as soon as it has been read. So as many bytes are on
their way at the end of a head as within it, and no wave of programs waits for the last of the one before (flash-decoding with
the even shares of stream-K, https://arxiv.org/abs/2301.03598). Each sequence has as many of the programs as the others, so that
its heads are split alike wherever in the batch it stands.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._dispatch import multiprocessors, triton
from ._paced import (
    async_load,
    attend_piece,
    commit_group,
    gl,
    gluon,
    launch_dependents,
    wait_for_previous,
    wait_group,
)
from ._paced_splits import hand_over, split_arguments

MIN_HEADS = 128  # in the batch, B * H
REGISTERS = 1 << 16  # of a multiprocessor: CUDA C++ Programming Guide, compute capability 9.0


@gluon.jit
def ask_for(
    i_piece,  # of all pieces of a sequence's heads
    end,
    place,
    keys,  # (the sequence's pointer, stride of a head, stride of a slot, places (PACE, NUM_WARPS, ROWS, HEAD_DIM))
    values,  # likewise
    S,
    offs_s,  # (NUM_WARPS, ROWS): of a piece
    offs_d,  # (1, 1, HEAD_DIM)
    NUM_PIECES: gl.constexpr,
):
    """Begins to copy a piece before `end` to its place: a group of copies, empty for a piece past them."""
    BLOCK_S: gl.constexpr = offs_s.shape[0] * offs_s.shape[1]
    key_cache_ptr, stride_kc_h, stride_kc_s, key_places = keys
    value_cache_ptr, stride_vc_h, stride_vc_s, value_places = values
    if i_piece < end:
        i_h, first_s = (i_piece // NUM_PIECES).to(gl.int64), i_piece % NUM_PIECES * BLOCK_S
        mask = (first_s + offs_s < S)[:, :, None]
        rows = (first_s + offs_s).to(gl.int64)[:, :, None]
        key_ptrs = key_cache_ptr + i_h * stride_kc_h + rows * stride_kc_s + offs_d
        value_ptrs = value_cache_ptr + i_h * stride_vc_h + rows * stride_vc_s + offs_d
        # Past S: zeros.
        async_load(key_places.index(place), key_ptrs, mask=mask, eviction_policy="evict_first")
        async_load(value_places.index(place), value_ptrs, mask=mask, eviction_policy="evict_first")
    commit_group()


@gluon.jit
def _paced_stream_kernel(
    query_ptr,  # (B, 1, H, D) fp16/bf16
    key_cache_ptr,  # (B, H, S, D)
    value_cache_ptr,  # (B, H, S, D)
    partial_ptr,  # (B, H, MAX_SPLITS * NUM_WARPS, D) fp32
    max_ptr,  # (B, H, MAX_SPLITS * NUM_WARPS) fp32
    sum_ptr,  # (B, H, MAX_SPLITS * NUM_WARPS) fp32
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
    NUM_PIECES: gl.constexpr,  # of a head
    MAX_SPLITS: gl.constexpr,  # the most programs that share a head
    BLOCK_SPLITS: gl.constexpr,  # the power of two from MAX_SPLITS * NUM_WARPS on
    PACE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    ROWS: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    launch_dependents()
    # (warp, row, D), as in `_paced_append.py`: a thread reads back only what it has copied itself, and each row of the pieces
    # has a softmax state of its own, which is joined with the others where a head ends, or the program's share of it.
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 256 // HEAD_DIM, HEAD_DIM // 8], [NUM_WARPS, 1, 1], [2, 1, 0])
    LAYOUT_ROWS: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0])
    BLOCK_S: gl.constexpr = ROWS * NUM_WARPS
    dtype: gl.constexpr = key_cache_ptr.dtype.element_ty
    i_program, num_programs, total = gl.program_id(0), gl.num_programs(0), H * NUM_PIECES  # of a sequence
    i_b = gl.program_id(1).to(gl.int64)
    start, end = i_program * total // num_programs, (i_program + 1) * total // num_programs
    offs_w = gl.arange(0, NUM_WARPS, layout=gl.SliceLayout(1, LAYOUT_ROWS))
    offs_r = gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT_ROWS))
    offs_s = offs_w[:, None] * ROWS + offs_r[None, :]
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT)))
    offs_3d = gl.expand_dims(gl.expand_dims(offs_d, 0), 0)
    keys = gl.allocate_shared_memory(dtype, [PACE, NUM_WARPS, ROWS, HEAD_DIM], SHARED)
    values = gl.allocate_shared_memory(dtype, [PACE, NUM_WARPS, ROWS, HEAD_DIM], SHARED)
    key_pieces = (key_cache_ptr + i_b * stride_kc_b, stride_kc_h, stride_kc_s, keys)
    value_pieces = (value_cache_ptr + i_b * stride_vc_b, stride_vc_h, stride_vc_s, values)
    if HAS_ENDED:
        S = gl.where(gl.load(ended_ptr + i_b) == 0, S, 0)
    for i in gl.static_range(PACE):
        ask_for(start + i, end, i, key_pieces, value_pieces, S, offs_s, offs_3d, NUM_PIECES)
    wait_for_previous()  # the cross cache does not change during a step; the query has just been written

    first_head, last_head = start // NUM_PIECES, (end - 1) // NUM_PIECES
    query_ptr += i_b * stride_q_b
    q_next = gl.load(query_ptr + first_head * stride_q_h + offs_d)
    for i_head in range(first_head, last_head + 1):
        q = gl.expand_dims(gl.expand_dims(q_next.to(gl.float32) * qk_scale, 0), 0)
        # Early, so that no head waits for its query.
        q_next = gl.load(query_ptr + gl.minimum(i_head + 1, last_head) * stride_q_h + offs_d)
        m = gl.full([NUM_WARPS, ROWS], float("-inf"), gl.float32, layout=LAYOUT_ROWS)
        l = gl.zeros([NUM_WARPS, ROWS], gl.float32, layout=LAYOUT_ROWS)
        acc = gl.zeros([NUM_WARPS, ROWS, HEAD_DIM], gl.float32, layout=LAYOUT)
        for i_piece in range(gl.maximum(start, i_head * NUM_PIECES), gl.minimum(end, (i_head + 1) * NUM_PIECES)):
            wait_group(PACE - 1)
            place = (i_piece - start) % PACE
            k = keys.index(place).load(LAYOUT).to(gl.float32)
            v = values.index(place).load(LAYOUT).to(gl.float32)
            ask_for(i_piece + PACE, end, place, key_pieces, value_pieces, S, offs_s, offs_3d, NUM_PIECES)
            is_key = (i_piece - i_head * NUM_PIECES) * BLOCK_S + offs_s < S
            m, l, acc = attend_piece(q, k, v, is_key, m, l, acc)

        m_w = gl.max(m, axis=1)
        alpha = gl.exp2(m - gl.where(m_w == float("-inf"), 0.0, m_w)[:, None])
        head_begin = ((i_head * NUM_PIECES + 1) * num_programs - 1) // total  # the first of the head's programs
        num_splits = ((i_head + 1) * NUM_PIECES * num_programs - 1) // total - head_begin + 1
        # Rounded products, as in `_paced_append.py`: lanes that hold the same sum would else differ in its last bit.
        l_w, o_w = gl.sum(gl.fma(l, alpha, 0.0), axis=1), gl.sum(gl.fma(acc, alpha[:, :, None], 0.0), axis=1)
        hand_over(
            m_w, l_w, o_w, i_program - head_begin, num_splits, i_b * H + i_head, partial_ptr, max_ptr,
            sum_ptr, out_ptr, counter_ptr, HAS_ENDED, HEAD_DIM, MAX_SPLITS, BLOCK_SPLITS, NUM_WARPS,
        )  # fmt: skip


class StreamTiles(NamedTuple):
    """Warps a program, keys of a piece for each warp, pieces on their way, programs a multiprocessor."""

    num_warps: int
    ROWS: int
    PACE: int
    PROGRAMS: int


# Up to so many heads in the batch: large-v3 has 160 of 8 rows and 320 of 16.
MEASURED_STREAM_TILES = ((159, StreamTiles(4, 8, 6, 4)), (319, StreamTiles(2, 8, 6, 8)))
STREAM_TILES_OF_MANY = StreamTiles(4, 16, 2, 4)


def choose_stream_tiles(num_heads: int, D: int) -> StreamTiles | None:
    """Tiles for so many heads in the batch, or None where `paced_attention` is faster: few pieces a program are not worth what
    begins and ends it.

    Measured on one NVIDIA H200, in steps of large-v3 of 2 to 32 rows and of medium of 2 and 8, fp16, 2026-11-29, with D = 64
    (with another D pieces have as many bytes).
    """
    if num_heads < MIN_HEADS:
        return None
    tiles = next((tiles for heads, tiles in MEASURED_STREAM_TILES if heads >= num_heads), STREAM_TILES_OF_MANY)
    return tiles._replace(ROWS=tiles.ROWS * 64 // D)


def paced_stream(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    qk_scale: float,
    counters: torch.Tensor,
    ended: torch.Tensor | None,
    tiles: StreamTiles,
) -> torch.Tensor:
    """Launches `_paced_stream_kernel`, where `covers_attention`; arguments and result are those of `paced_attention`."""
    (B, _, H, _), S = query.shape, key_cache.shape[2]
    num_warps, rows, pace, programs = tiles
    pieces = triton.cdiv(S, num_warps * rows)
    grid = min(H * pieces, max(1, programs * multiprocessors(query.device) // B))  # of a sequence
    splits = min(pieces, triton.cdiv(pieces - 1, H * pieces // grid) + 1)
    out, arguments = split_arguments(query, key_cache, value_cache, qk_scale, counters, ended, splits, num_warps)
    _paced_stream_kernel[(grid, B)](
        **arguments,
        NUM_PIECES=pieces,
        MAX_SPLITS=splits,
        PACE=pace,
        ROWS=rows,
        maxnreg=min(255, REGISTERS // (32 * num_warps * programs) // 8 * 8),  # so that all programs find room
    )
    return out
