"""`append_attention` of one token whose cached keys and values come by paced asynchronous copies: see `_paced.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._arguments import cache_arguments, position_arguments
from ._paced import (
    PACED_HEAD_DIMS,
    SHARED_MEMORY,
    are_aligned,
    async_load,
    attend_piece,
    barrier,
    commit_group,
    gl,
    gluon,
    has_paced_copies,
    launch_dependents,
    prefer_shared_memory,
    wait_for_previous,
    wait_group,
)


@gluon.jit
def ask_for(
    i_piece,
    end,
    key_ptrs,  # (NUM_WARPS, ROWS, HEAD_DIM): of piece 0
    value_ptrs,
    stride_kc_s,  # 64 bits, as stride_vc_s
    stride_vc_s,
    offs_s,  # (NUM_WARPS, ROWS): of piece 0
    keys,  # (PACE, NUM_WARPS, ROWS, HEAD_DIM)
    values,
    BLOCK_S: gl.constexpr,
    PACE: gl.constexpr,
):
    """Begins to copy a piece's slots before `end` to its place of `PACE`: a group of copies, empty for a piece past them."""
    first_s = i_piece * BLOCK_S
    if first_s < end:
        mask = (first_s + offs_s < end)[:, :, None]
        async_load(keys.index(i_piece % PACE), key_ptrs + first_s * stride_kc_s, mask=mask)
        async_load(values.index(i_piece % PACE), value_ptrs + first_s * stride_vc_s, mask=mask)
    commit_group()


@gluon.jit
def _paced_append_kernel(
    query_ptr,  # (B, 1, H, D) fp16/bf16
    key_ptr,  # (B, 1, H, D)
    value_ptr,  # (B, 1, H, D)
    key_cache_ptr,  # (B, H, S, D)
    value_cache_ptr,  # (B, H, S, D)
    cache_position_ptr,  # () or (B,) int
    ended_ptr,  # (B,) int; not read unless HAS_ENDED
    out_ptr,  # (B, 1, H, D) contiguous
    qk_scale,
    stride_q_b,
    stride_q_h,
    stride_k_b,
    stride_k_h,
    stride_v_b,
    stride_v_h,
    stride_kc_b,
    stride_kc_h,
    stride_kc_s,
    stride_vc_b,
    stride_vc_h,
    stride_vc_s,
    stride_cp_b,
    H,
    S,
    HAS_ENDED: gl.constexpr,
    READ_AHEAD: gl.constexpr,  # position and cached tokens may be read before the previous kernel has finished
    PACE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_S: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    launch_dependents()
    if not READ_AHEAD:
        wait_for_previous()
    # (warp, row, D). A thread reads back from shared memory what it copied there itself and nothing else: no barrier is needed
    # after its wait for its own copies nor before it refills a place that it has read. (Triton puts one there all the same.)
    ROWS: gl.constexpr = BLOCK_S // NUM_WARPS
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 256 // HEAD_DIM, HEAD_DIM // 8], [NUM_WARPS, 1, 1], [2, 1, 0])
    LAYOUT_ROWS: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    LAYOUT_JOIN: gl.constexpr = gl.BlockedLayout([NUM_WARPS, 1], [1, 32], [1, NUM_WARPS], [1, 0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[2, 1, 0])
    SHARED_OUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    SHARED_ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    dtype: gl.constexpr = key_cache_ptr.dtype.element_ty
    i_h = gl.program_id(0).to(gl.int64)
    i_b = gl.program_id(1).to(gl.int64)
    position = gl.load(cache_position_ptr + i_b * stride_cp_b).to(gl.int64)
    end = gl.minimum(gl.maximum(position, 0), S).to(gl.int32)  # of the keys that are in the cache already
    if HAS_ENDED:
        end = gl.where(gl.load(ended_ptr + i_b) == 0, end, 0)
    offs_w = gl.arange(0, NUM_WARPS, layout=gl.SliceLayout(1, LAYOUT_ROWS))
    offs_r = gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT_ROWS))
    offs_s = offs_w[:, None] * ROWS + offs_r[None, :]
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    # Before the wait, since all that follows it waits for them too.
    query_ptr += i_b * stride_q_b + i_h * stride_q_h
    key_ptr += i_b * stride_k_b + i_h * stride_k_h
    value_ptr += i_b * stride_v_b + i_h * stride_v_h
    key_cache_ptr += i_b * stride_kc_b + i_h * stride_kc_h
    value_cache_ptr += i_b * stride_vc_b + i_h * stride_vc_h
    # 64 bits for where a piece begins, 32 within it.
    key_ptrs = key_cache_ptr + (offs_s * stride_kc_s)[:, :, None] + offs_d[None, None, :]
    value_ptrs = value_cache_ptr + (offs_s * stride_vc_s)[:, :, None] + offs_d[None, None, :]
    stride_kc_s, stride_vc_s = stride_kc_s.to(gl.int64), stride_vc_s.to(gl.int64)
    keys = gl.allocate_shared_memory(dtype, [PACE, NUM_WARPS, ROWS, HEAD_DIM], SHARED)
    values = gl.allocate_shared_memory(dtype, [PACE, NUM_WARPS, ROWS, HEAD_DIM], SHARED)
    # Before the pieces are done with, so that they lie beside them, and no warp overwrites what another still reads.
    warp_m = gl.allocate_shared_memory(gl.float32, [NUM_WARPS], SHARED_ROW)
    warp_l = gl.allocate_shared_memory(gl.float32, [NUM_WARPS], SHARED_ROW)
    warp_o = gl.allocate_shared_memory(gl.float32, [NUM_WARPS, HEAD_DIM], SHARED_OUT)
    for i in gl.static_range(PACE):
        ask_for(i, end, key_ptrs, value_ptrs, stride_kc_s, stride_vc_s, offs_s, keys, values, BLOCK_S, PACE)
    if READ_AHEAD:
        wait_for_previous()

    q = gl.load(query_ptr + offs_d).to(gl.float32)[None, None, :] * qk_scale
    k_new = gl.load(key_ptr + offs_d)
    v_new = gl.load(value_ptr + offs_d)
    mask_new = (position >= 0) & (position < S) & (offs_d < HEAD_DIM)
    gl.store(key_cache_ptr + position * stride_kc_s + offs_d, k_new, mask=mask_new)
    gl.store(value_cache_ptr + position * stride_vc_s + offs_d, v_new, mask=mask_new)
    # A softmax state a row of the pieces, to be joined at the very end. The new token is where the first row starts from.
    is_first = offs_s == 0
    m = gl.where(is_first, gl.sum(q * k_new.to(gl.float32)[None, None, :], axis=2), float("-inf"))
    l = gl.where(is_first, 1.0, 0.0)
    acc = gl.where(is_first[:, :, None], v_new.to(gl.float32)[None, None, :], 0.0)
    for i in range(gl.cdiv(end, BLOCK_S)):
        wait_group(PACE - 1)  # PACE + i groups are committed: the first i + 1 are complete
        k = keys.index(i % PACE).load(LAYOUT).to(gl.float32)
        v = values.index(i % PACE).load(LAYOUT).to(gl.float32)
        ask_for(i + PACE, end, key_ptrs, value_ptrs, stride_kc_s, stride_vc_s, offs_s, keys, values, BLOCK_S, PACE)
        is_key = i * BLOCK_S + offs_s < end
        m, l, acc = attend_piece(q, k, v, is_key, m, l, acc)

    m_w = gl.max(m, axis=1)
    alpha = gl.exp2(m - gl.where(m_w == float("-inf"), 0.0, m_w)[:, None])
    warp_m.store(m_w)
    # Several threads store the same sum, which must not differ in its last bit. So their products are rounded here: of one that
    # is added to a neighbour's right away LLVM makes an FMA, which rounds only the neighbour's.
    warp_l.store(gl.sum(gl.fma(l, alpha, 0.0), axis=1))
    warp_o.store(gl.sum(gl.fma(acc, alpha[:, :, None], 0.0), axis=1))
    barrier()  # the only exchange between warps
    weight = warp_m.load(gl.SliceLayout(1, LAYOUT_JOIN))
    weight = gl.exp2(weight - gl.max(weight, axis=0))  # finite: the new token is always seen
    total = gl.sum(warp_l.load(gl.SliceLayout(1, LAYOUT_JOIN)) * weight, axis=0)
    out = gl.sum(warp_o.load(LAYOUT_JOIN) * weight[:, None], axis=0) / total
    columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT_JOIN))
    gl.store(out_ptr + (i_b * H + i_h) * HEAD_DIM + columns, out.to(dtype))


class PacedTiles(NamedTuple):
    """Keys a piece, warps a program, pieces on their way: all powers of two but the last."""

    BLOCK_S: int
    num_warps: int
    PACE: int


def choose_append_tiles(B: int) -> PacedTiles:
    """Tiles for B sequences. Measured on one H100 80GB HBM3, as benchmarks/tune_step.py does, in steps of large-v3 of 1 and 8
    rows at positions 64 and 420, fp16, 2026-11-29.

    For one row larger pieces, of 64 keys, gain 4 % of a step at 420 and cost 1 % at 64, which more steps are near. At 16 and 32
    rows what came out at 8 is as fast as the plain kernel, within 1 %.
    """
    return PacedTiles(32, 4, 4) if B == 1 else PacedTiles(64, 4, 2)


def covers_append(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, tiles: PacedTiles) -> bool:
    """Whether `_paced_append_kernel` takes these: one token, rows of whole 16-byte copies, each thread's its own, no more
    shared memory than there is.
    """
    _, T, _, D = query.shape
    BLOCK_S, num_warps, PACE = tiles
    return (
        T == 1
        and D in PACED_HEAD_DIMS
        and has_paced_copies(query.device, query.dtype)
        and are_aligned(key_cache, value_cache)
        and num_warps in (1, 2, 4, 8, 16)
        and BLOCK_S.bit_count() == 1
        and 256 * num_warps <= BLOCK_S * D
        and PACE >= 1
        and 4 * PACE * BLOCK_S * D + 4 * num_warps * (D + 8) <= SHARED_MEMORY  # pieces, what warps exchange and its alignment
    )


def paced_append(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    out: torch.Tensor,
    qk_scale: float,
    read_ahead: bool,
    ended: torch.Tensor | None,
    tiles: PacedTiles,
) -> None:
    """Launches `_paced_append_kernel`. out: (B, 1, H, D), is written.

    `qk_scale` is for a softmax in base 2; `read_ahead` and `ended` as in `append_attention`.

    Raises:
        ValueError: what `covers_append` does not cover; the caches are then untouched.
    """
    if not covers_append(query, key_cache, value_cache, tiles):
        raise ValueError(
            "paced copies are for one fp16 or bf16 token on an H100 or H200, caches that begin and go on at multiples of 16 and"
            f" whole pieces that fit its memory (`covers_append` in _paced_append.py), got {tuple(query.shape)} {query.dtype}"
            f" on {query.device}, caches with strides {key_cache.stride()} and {value_cache.stride()}, {tiles}"
        )
    B, _, H, D = query.shape
    kernel = _paced_append_kernel[(H, B)](
        query_ptr=query,
        key_ptr=key,
        value_ptr=value,
        **cache_arguments(key_cache, value_cache),
        **position_arguments(cache_position),
        ended_ptr=cache_position if ended is None else ended,
        out_ptr=out,
        qk_scale=qk_scale,
        stride_q_b=query.stride(0),
        stride_q_h=query.stride(2),
        stride_k_b=key.stride(0),
        stride_k_h=key.stride(2),
        stride_v_b=value.stride(0),
        stride_v_h=value.stride(2),
        H=H,
        S=key_cache.shape[2],
        HAS_ENDED=ended is not None,
        READ_AHEAD=read_ahead,
        PACE=tiles.PACE,
        HEAD_DIM=D,
        BLOCK_S=tiles.BLOCK_S,
        NUM_WARPS=tiles.num_warps,
        num_warps=tiles.num_warps,
        launch_pdl=True,
    )
    if B == 1:
        prefer_shared_memory(kernel)
