"""`decode_attention` on any GPU: a program reads its keys and values tile by tile into registers."""

from __future__ import annotations

import torch

from ._arguments import cache_arguments
from ._attend import attend_few, attend_one, fit_registers, load_keys_values, merge_rows, normalise, safe_max
from ._dispatch import pdl_handover, pdl_options, tl, triton


@triton.jit
def join_splits(
    partial_ptr,
    max_ptr,
    sum_ptr,
    row,
    num_splits,
    BLOCK_SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One query's result (BLOCK_D,) from the partial ones, in a fixed order."""
    offs_i = tl.arange(0, BLOCK_SPLITS)
    offs_d = tl.arange(0, BLOCK_D)
    mask_i = offs_i < num_splits
    mask = mask_i[:, None] & (offs_d < HEAD_DIM)[None, :]
    row = row * num_splits + offs_i
    # From the L2: other programs have just written them.
    m_i = tl.load(max_ptr + row, mask=mask_i, other=float("-inf"), cache_modifier=".cg")
    l_i = tl.load(sum_ptr + row, mask=mask_i, other=0.0, cache_modifier=".cg")
    acc = tl.load(partial_ptr + row[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0, cache_modifier=".cg")
    _, l, o = merge_rows(m_i, l_i, acc)
    return normalise(l, o)


@triton.jit(do_not_specialize_on_alignment=("T", "S"))  # a build for all lengths
def _decode_attention_kernel(
    query_ptr,  # (B, T, H, D) fp16/bf16/fp32
    key_cache_ptr,  # (B, H, S, D)
    value_cache_ptr,  # (B, H, S, D)
    kv_length_ptr,  # () or (B,) int; not read unless HAS_LENGTH
    ended_ptr,  # (B,) int; not read unless HAS_ENDED
    out_ptr,  # (B, T, H, D), or partial (B, H, T, num_splits, D) fp32 if IS_SPLIT
    max_ptr,  # partial (B, H, T, num_splits) fp32; this and sum_ptr not used unless IS_SPLIT
    sum_ptr,  # partial (B, H, T, num_splits) fp32
    joined_ptr,  # (B, T, H, D); this and counter_ptr not used unless JOINS
    counter_ptr,  # (B, H) int32, 0 before and after: programs of a head that are done
    qk_scale,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_kc_b,
    stride_kc_h,
    stride_kc_s,
    stride_vc_b,
    stride_vc_h,
    stride_vc_s,
    stride_l_b,
    T,
    H,
    S,
    num_splits,
    HAS_LENGTH: tl.constexpr,
    HAS_ENDED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    JOINS: tl.constexpr,  # the last program of a head joins its splits, which are so many as a power of two or fewer; 0: none
    IS_ONE_TILE: tl.constexpr,  # a program's keys are one tile
    READ_AHEAD: tl.constexpr,  # all but the query may be read before the previous kernel has finished
    USE_PDL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,  # 1, or a tensor-core tile for T > 1
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    if not READ_AHEAD:
        pdl_handover(USE_PDL)
    i_split = tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM

    length = S
    if HAS_LENGTH:
        length = tl.load(kv_length_ptr + i_b * stride_l_b).to(tl.int64)
        length = tl.minimum(tl.maximum(length, 0), S).to(tl.int32)
    if HAS_ENDED:
        length = tl.where(tl.load(ended_ptr + i_b) == 0, length, 0)
    chunk = tl.cdiv(tl.cdiv(length, num_splits), BLOCK_S) * BLOCK_S
    start = i_split * chunk
    end = tl.minimum(start + chunk, length)

    query_ptr += i_b * stride_q_b + i_h * stride_q_h
    key_ptr = key_cache_ptr + i_b * stride_kc_b + i_h * stride_kc_h
    value_ptr = value_cache_ptr + i_b * stride_vc_b + i_h * stride_vc_h
    row = (i_b * H + i_h) * T  # of the partial results
    if BLOCK_T == 1:
        k, v = load_keys_values(
            key_ptr, value_ptr, stride_kc_s, stride_vc_s, start, end, HEAD_DIM, BLOCK_S, BLOCK_D, IS_STREAMED=True
        )
        if READ_AHEAD:
            pdl_handover(USE_PDL)
        q = tl.load(query_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32) * qk_scale
        m_i = tl.full((BLOCK_S,), float("-inf"), tl.float32)
        l_i = tl.zeros((BLOCK_S,), tl.float32)
        acc = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
        if IS_ONE_TILE:
            m_i = tl.where(start + tl.arange(0, BLOCK_S) < end, tl.sum(q[None, :] * k.to(tl.float32), axis=1), float("-inf"))
            m = tl.max(m_i, axis=0)
            p = tl.exp2(m_i - safe_max(m))
            l, o = tl.sum(p, axis=0), tl.sum(p[:, None] * v.to(tl.float32), axis=0)
        else:
            m_i, l_i, acc = attend_one(
                q, k, v, key_ptr, value_ptr, stride_kc_s, stride_vc_s, start, end, m_i, l_i, acc,
                HEAD_DIM, BLOCK_S, BLOCK_D, IS_STREAMED=True,
            )  # fmt: skip
            m, l, o = merge_rows(m_i, l_i, acc)
        if not IS_SPLIT:
            tl.store(out_ptr + (i_b * H + i_h) * HEAD_DIM + offs_d, normalise(l, o).to(out_ptr.dtype.element_ty), mask=mask_d)
        else:
            tl.store(out_ptr + (row * num_splits + i_split) * HEAD_DIM + offs_d, o, mask=mask_d)
            tl.store(max_ptr + row * num_splits + i_split, m)
            tl.store(sum_ptr + row * num_splits + i_split, l)
            if JOINS > 0:
                tl.debug_barrier()  # all threads' stores come before the count that tells of them
                counter_ptr += i_b * H + i_h
                if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_splits - 1:
                    tl.store(counter_ptr, 0)
                    o = join_splits(out_ptr, max_ptr, sum_ptr, row, num_splits, JOINS, HEAD_DIM, BLOCK_D)
                    tl.store(joined_ptr + row * HEAD_DIM + offs_d, o.to(joined_ptr.dtype.element_ty), mask=mask_d)
    else:
        if READ_AHEAD:
            pdl_handover(USE_PDL)
        offs_t = tl.arange(0, BLOCK_T)
        mask_q = (offs_t < T)[:, None] & mask_d[None, :]
        q = tl.load(query_ptr + offs_t[:, None] * stride_q_t + offs_d[None, :], mask=mask_q, other=0.0)
        limit = tl.zeros((BLOCK_T,), tl.int32) + length
        if IS_CAUSAL:
            limit += offs_t - (T - 1)
        m_i = tl.full((BLOCK_T,), float("-inf"), tl.float32)
        l_i = tl.zeros((BLOCK_T,), tl.float32)
        acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        m_i, l_i, acc = attend_few(
            q, limit, qk_scale, key_ptr, value_ptr, stride_kc_s, stride_vc_s, start, end, m_i, l_i, acc,
            HEAD_DIM, BLOCK_S, BLOCK_D, IS_STREAMED=True,
        )  # fmt: skip
        mask_t = offs_t < T
        if not IS_SPLIT:
            out_row = (i_b * T + offs_t[:, None]) * H + i_h
            out = normalise(l_i[:, None], acc).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + out_row * HEAD_DIM + offs_d[None, :], out, mask=mask_q)
        else:
            partial = (row + offs_t) * num_splits + i_split
            tl.store(out_ptr + partial[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=mask_q)
            tl.store(max_ptr + partial, m_i, mask=mask_t)
            tl.store(sum_ptr + partial, l_i, mask=mask_t)


@triton.jit(do_not_specialize_on_alignment=("T",))
def _merge_splits_kernel(
    partial_ptr,  # (B, H, T, num_splits, D) fp32
    max_ptr,  # (B, H, T, num_splits) fp32
    sum_ptr,  # (B, H, T, num_splits) fp32
    out_ptr,  # (B, T, H, D)
    T,
    H,
    num_splits,
    USE_PDL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pdl_handover(USE_PDL)
    i_h = tl.program_id(0).to(tl.int64)
    i_t = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    row = (i_b * H + i_h) * T + i_t
    out = join_splits(partial_ptr, max_ptr, sum_ptr, row, num_splits, BLOCK_SPLITS, HEAD_DIM, BLOCK_D)
    out_row = (i_b * T + i_t) * H + i_h
    tl.store(out_ptr + out_row * HEAD_DIM + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < HEAD_DIM)


def plain_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_length: torch.Tensor | None,
    qk_scale: float,
    is_causal: bool,
    read_ahead: bool,
    counters: torch.Tensor | None,
    ended: torch.Tensor | None,
    BLOCK_S: int,
    NUM_SPLITS: int,
    num_warps: int,
    num_stages: int,
) -> torch.Tensor:
    """Launches `_decode_attention_kernel`, and `_merge_splits_kernel` where no head's last program joins its splits.

    `qk_scale` is for a softmax in base 2; the rest is as in `decode_attention`. Returns (B, T, H, D).
    """
    B, T, H, D = query.shape
    S = key_cache.shape[2]
    joins = counters is not None and T == 1
    tile = fit_registers(BLOCK_S, num_warps, query, key_cache, value_cache)
    pdl = pdl_options(query.device)
    out = query.new_empty((B, T, H, D))
    partial = maxima = sums = out
    if NUM_SPLITS > 1:
        partial = torch.empty((B, H, T, NUM_SPLITS, D), dtype=torch.float32, device=query.device)
        maxima, sums = torch.empty((2, B, H, T, NUM_SPLITS), dtype=torch.float32, device=query.device).unbind()
    _decode_attention_kernel[(NUM_SPLITS, H, B)](
        query_ptr=query,
        **cache_arguments(key_cache, value_cache),
        kv_length_ptr=query if kv_length is None else kv_length,
        ended_ptr=query if ended is None else ended,
        out_ptr=partial,
        max_ptr=maxima,
        sum_ptr=sums,
        joined_ptr=out,
        counter_ptr=counters if joins else query,
        qk_scale=qk_scale,
        stride_q_b=query.stride(0),
        stride_q_t=query.stride(1),
        stride_q_h=query.stride(2),
        stride_l_b=kv_length.stride(0) if kv_length is not None and kv_length.dim() else 0,
        T=T,
        H=H,
        S=S,
        num_splits=NUM_SPLITS,
        HAS_LENGTH=kv_length is not None,
        HAS_ENDED=ended is not None,
        IS_CAUSAL=is_causal,
        IS_SPLIT=NUM_SPLITS > 1,
        JOINS=triton.next_power_of_2(NUM_SPLITS) if joins and NUM_SPLITS > 1 else 0,
        IS_ONE_TILE=triton.cdiv(S, NUM_SPLITS) <= tile["BLOCK_S"],
        READ_AHEAD=read_ahead,
        HEAD_DIM=D,
        BLOCK_T=1 if T == 1 else 16,
        BLOCK_D=triton.next_power_of_2(D),
        num_stages=num_stages,
        **tile,
        **pdl,
    )
    if NUM_SPLITS > 1 and not joins:
        _merge_splits_kernel[(H, T, B)](
            partial_ptr=partial,
            max_ptr=maxima,
            sum_ptr=sums,
            out_ptr=out,
            T=T,
            H=H,
            num_splits=NUM_SPLITS,
            HEAD_DIM=D,
            BLOCK_SPLITS=triton.next_power_of_2(NUM_SPLITS),
            # At 32 the result would pass through shared memory, several threads writing an element there.
            BLOCK_D=max(64, triton.next_power_of_2(D)),
            num_warps=1,
            **pdl,
        )
    return out
