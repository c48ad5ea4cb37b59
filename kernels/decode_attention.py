"""Attention of few new tokens over a static cache, the keys split over programs (flash-decoding).

    out[b, t, h] = softmax(scale * query[b, t, h] . key_cache[b, h, :n].T) @ value_cache[b, h, :n]

with n = kv_length[b] for the last query token and one less for each token before it (`is_causal`), or n = kv_length[b]
for all of them. The cache is (B, H, S, D), the query (B, T, H, D) and so is the result, which `out_proj` reads as
(B, T, H * D): no transposed copy on either side. Slots from kv_length on are never read.

At batch 1 the H heads of Whisper cannot fill the chip, so each head's keys are cut into NUM_SPLITS chunks, one a program; a
second tiny kernel merges the partial softmax states in a fixed order, or, with `counters`, the last of a head's programs
does. The split depends on shapes alone, so results do not depend on the run or on the other rows of the batch. Method:
flash-decoding, https://pytorch.org/blog/flash-decoding/.

Bytes moved: 2 * B * H * n * D elements (each key and value once).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._attend import (
    attend_few,
    attend_one,
    fit_registers,
    load_keys_values,
    merge_rows,
    normalise,
    safe_max,
)
from ._checks import check_attention, check_caches, check_counters, check_ended, check_positions, check_states
from ._dispatch import pdl_handover, pdl_options, register, tl, triton
from ._paced import give_up
from ._paced_attention import covers_attention, paced_attention

LOG2E = 1.4426950408889634


def decode_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_length: torch.Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = True,
    read_ahead: bool = False,
    counters: torch.Tensor | None = None,
    ended: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `decode_attention` computes, in PyTorch: fp32 inside, float64 throughout for float64 inputs."""
    B, T, _, _ = query.shape
    S = key_cache.shape[2]
    if kv_length is None and ended is None and (T == 1 or not is_causal):
        return attend_reference(query, key_cache, value_cache, None, scale)
    length = torch.full((B, 1), S, device=query.device) if kv_length is None else kv_length.reshape(-1, 1).expand(B, 1)
    tokens = torch.arange(T, device=query.device)
    limit = length.clamp(max=S) + (tokens - (T - 1)) * is_causal
    return attend_reference(query, key_cache, value_cache, forget_ended(limit, ended), scale)


def forget_ended(limit: torch.Tensor, ended: torch.Tensor | None) -> torch.Tensor:
    """Slots that queries see (B, T): none for sequences that have ended."""
    return limit if ended is None else limit.masked_fill(ended[:, None] != 0, 0)


def attend_reference(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, limit: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention of (B, T, H, D) over (B, H, S, D) in which query t of row b sees the slots before `limit[b, t]`, or all."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if limit is None:
        scores = query.transpose(1, 2).to(dtype) @ key_cache.to(dtype).transpose(2, 3) * scale
        return (scores.softmax(-1) @ value_cache.to(dtype)).transpose(1, 2).to(query.dtype).contiguous()
    slots = torch.arange(key_cache.shape[2], device=query.device)
    visible = slots < limit[:, None, :, None]  # (B, 1, T, S)
    used = visible.any(2)[..., None]  # (B, 1, S, 1): an unused slot may hold anything, NaN too
    scores = query.transpose(1, 2).to(dtype) @ key_cache.to(dtype).masked_fill(~used, 0).transpose(2, 3) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible, 0)  # no key at all: 0, not NaN
    out = weights @ value_cache.to(dtype).masked_fill(~used, 0)
    return out.transpose(1, 2).to(query.dtype).contiguous()


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


@triton.jit
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
        length = tl.minimum(tl.load(kv_length_ptr + i_b * stride_l_b).to(tl.int64), S).to(tl.int32)
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


@triton.jit
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


class Tiles(NamedTuple):
    """How a launch is cut: keys a tile, programs a head, warps a program, stages of the load pipeline."""

    BLOCK_S: int
    NUM_SPLITS: int
    num_warps: int
    num_stages: int


# One query token, fp16, D = 64, 1500 keys: measured by benchmarks/tune_attention.py on one H100 80GB HBM3, 2026-11-23.
# Up to so many heads in the batch (B * H): keys a tile, programs in all (0: one a head), warps a program.
MEASURED_TILES = (
    (30, 128, 240, 4),
    (70, 64, 480, 2),
    (100, 128, 240, 4),
    (140, 32, 720, 2),
    (180, 32, 960, 1),
    (264, 128, 0, 4),
    (300, 32, 1400, 2),
    (360, 32, 1920, 1),
    (520, 64, 0, 4),
    (600, 32, 2240, 2),
    (720, 32, 0, 4),
    (1040, 64, 0, 4),
    (1200, 32, 2400, 2),
)
MANY_HEADS = (128, 0, 4)
# Where the last program of a head joins its splits, in the decoder's step; measured by benchmarks/tune_step.py on the same GPU,
# 2026-11-24, at 20 and 160 heads (there beside slower linear layers than the present ones). Up to so many heads in the batch:
# keys a tile, programs a head, warps a program.
MEASURED_JOINED_TILES = (
    (30, 256, 6, 8),
    (180, 128, 12, 4),
)


def choose_tiles(B: int, T: int, H: int, S: int, D: int, itemsize: int, joins: bool = False) -> Tiles:
    """Tiles from shapes alone (never from values: the split of the keys is part of the result's rounding).

    `itemsize`: bytes an element; `joins`: the splits are joined in the same launch. A tile of wider rows than the measured ones
    holds fewer keys, so that it fits the same registers.
    """
    BLOCK_S, programs, num_warps = next((tiles for heads, *tiles in MEASURED_TILES if heads >= B * H), MANY_HEADS)
    if joins:
        few = next(((keys, n * B * H, warps) for heads, keys, n, warps in MEASURED_JOINED_TILES if heads >= B * H), None)
        BLOCK_S, programs, num_warps = few or (BLOCK_S, programs, num_warps)
    if S <= 512:  # a self cache: too few keys to be worth the second launch that joins the splits
        BLOCK_S, programs, num_warps = 128, 0, 4
    if T > 1:
        BLOCK_S, num_warps = 32, 4
    BLOCK_S = max(16, BLOCK_S * 128 // (triton.next_power_of_2(D) * itemsize))
    splits = max(1, min(programs // (B * H), S // 64, triton.cdiv(S, BLOCK_S)))
    return Tiles(BLOCK_S, splits, num_warps, num_stages=2)


def _launch(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_length: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    read_ahead: bool,
    counters: torch.Tensor | None = None,
    ended: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    B, T, H, D = query.shape
    S = key_cache.shape[2]
    joins = counters is not None and T == 1
    if joins and read_ahead and kv_length is None and tiles is None and covers_attention(query, key_cache, value_cache):
        try:
            return paced_attention(query, key_cache, value_cache, scale * LOG2E, counters, ended)
        except Exception as error:
            give_up(error, query.device)
    tiles = tiles or choose_tiles(B, T, H, S, D, query.element_size(), joins)
    NUM_SPLITS = tiles.NUM_SPLITS
    tile = fit_registers(tiles.BLOCK_S, tiles.num_warps, query, key_cache, value_cache)
    pdl = pdl_options(query.device)
    out = query.new_empty((B, T, H, D))
    partial = maxima = sums = out
    if NUM_SPLITS > 1:
        partial = torch.empty((B, H, T, NUM_SPLITS, D), dtype=torch.float32, device=query.device)
        maxima, sums = torch.empty((2, B, H, T, NUM_SPLITS), dtype=torch.float32, device=query.device).unbind()
    _decode_attention_kernel[(NUM_SPLITS, H, B)](
        query_ptr=query,
        key_cache_ptr=key_cache,
        value_cache_ptr=value_cache,
        kv_length_ptr=query if kv_length is None else kv_length,
        ended_ptr=query if ended is None else ended,
        out_ptr=partial,
        max_ptr=maxima,
        sum_ptr=sums,
        joined_ptr=out,
        counter_ptr=counters if joins else query,
        qk_scale=scale * LOG2E,
        stride_q_b=query.stride(0),
        stride_q_t=query.stride(1),
        stride_q_h=query.stride(2),
        stride_kc_b=key_cache.stride(0),
        stride_kc_h=key_cache.stride(1),
        stride_kc_s=key_cache.stride(2),
        stride_vc_b=value_cache.stride(0),
        stride_vc_h=value_cache.stride(1),
        stride_vc_s=value_cache.stride(2),
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
        num_stages=tiles.num_stages,
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


def _run_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_length: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    read_ahead: bool,
    counters: torch.Tensor | None,
    ended: torch.Tensor | None,
) -> torch.Tensor:
    return decode_attention_reference(query, key_cache, value_cache, kv_length, scale=scale, is_causal=is_causal, ended=ended)


def _fake(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_length: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    read_ahead: bool,
    counters: torch.Tensor | None,
    ended: torch.Tensor | None,
) -> torch.Tensor:
    return query.new_empty(query.shape)


# Not declared as mutated: the counters are after a call what they were before it.
_op = register(
    "decode_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor? kv_length, float scale, bool is_causal,"
    " bool read_ahead, Tensor? counters, Tensor? ended) -> Tensor",
    kernel=_launch,
    reference=_run_reference,
    fake=_fake,
)


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_length: torch.Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = True,
    read_ahead: bool = False,
    counters: torch.Tensor | None = None,
    ended: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attends from T new tokens to a static cache; nothing is mutated.

    Args:
        query: (B, T, H, D), T from 1 to 16, D one of 32, 64, 80, 96, 128; fp32, fp16 or bf16; any strides with a dense
            last dimension, as all tensors here.
        key_cache, value_cache: (B, H, S, D), the query's dtype.
        kv_length: int64 or int32 on the same device, 0-dim or (B,): how many slots hold keys, the T new tokens' own
            included. None: all S, as in the cross cache. A length past S counts as S.
        scale: multiplies the scores, in fp32. Whisper scales its query in the model's dtype and passes 1.0.
        is_causal: each of the T tokens sees one slot less than the next (self-attention). False: all see kv_length slots.
        read_ahead: promises that the caches and kv_length were written before the kernel that precedes this call was
            launched without dependent launch (as PyTorch's all are). They are then read while that kernel still runs.
            True of a cross cache from the second step of a window on. No effect before compute capability 9.0.
        counters: (B * H,) int32 zeros on the same device, or more of them. With them the splits of one token (T = 1) are
            joined by each head's last program instead of by a second launch. They are zeros again afterwards; two calls
            that may run at the same time must not share them.
        ended: (B,) int64 or int32 on the same device: sequences whose number is not 0 have ended. None of their keys is
            read, and what is returned for them is 0. With `read_ahead` it may be read as early as the caches.

    Returns:
        (B, T, H, D), contiguous, the query's dtype: what `out_proj` reads as (B, T, H * D). A query that sees no key
        gives 0.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit.
    """
    check_states(query=query, key_cache=key_cache, value_cache=value_cache)
    check_caches(query, key_cache, value_cache)
    check_attention(query)
    if kv_length is not None:
        check_positions("kv_length", kv_length, query.shape[0], query.device)
    if counters is not None:
        check_counters(counters, query.shape[0] * query.shape[2], query.device)
    check_ended(ended, query.shape[0], query.device)
    return _op(query, key_cache, value_cache, kv_length, scale, is_causal, read_ahead, counters, ended)
