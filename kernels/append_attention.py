"""Self-attention of a decode step: writes the new keys and values into the cache and attends, in one launch.

    key_cache[b, h, p + t] = key[b, t, h]; value_cache likewise, p = cache_position[b]
    out[b, t, h] = softmax(scale * query[b, t, h] . key_cache[b, h, : p + t + 1].T) @ value_cache[b, h, : p + t + 1]

One program a head and sequence: it keeps the new tokens' keys and values in registers, writes them once and never reads
them back, so no other program waits for them. Self caches of Whisper hold at most 448 slots, too few to be worth a split
over programs. Layouts: states (B, T, H, D), caches (B, H, S, D), result (B, T, H, D) as `out_proj` reads it.
The kernel here is for any GPU; for one token of a wide model on an H100 or H200, beside kernels like it in a decoder's step,
`_paced_append.py` has another.

Bytes moved: 2 * B * H * (p + T) * D elements read, 2 * B * H * T * D written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._arguments import cache_arguments, position_arguments
from ._attend import (
    attend_few,
    attend_one,
    attend_tile,
    fit_registers,
    load_keys_values,
    merge_rows,
    normalise,
)
from ._checks import check_apart, check_attention, check_caches, check_ended, check_positions, check_states
from ._dispatch import pdl_handover, pdl_options, register, tl, triton
from ._paced import MIN_WIDTH, are_aligned, give_up, has_paced_copies
from ._paced_append import HEAD_DIMS, PacedTiles, choose_append_tiles, paced_append
from .decode_attention import LOG2E, attend_reference, forget_ended
from .update_kv_cache import update_kv_cache_reference


def append_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    *,
    scale: float,
    read_ahead: bool = False,
    ended: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `append_attention` computes, in PyTorch: `update_kv_cache`, then causal `decode_attention`."""
    _check(query, key, value, key_cache, value_cache, cache_position, ended, is_reference=True)
    update_kv_cache_reference(key, value, key_cache, value_cache, cache_position)
    B, T = query.shape[:2]
    limit = (cache_position.reshape(-1, 1) + torch.arange(1, T + 1, device=query.device)).expand(B, -1)
    return attend_reference(query, key_cache, value_cache, forget_ended(limit, ended), scale)


@triton.jit(do_not_specialize_on_alignment=("T", "S"))  # a build for all lengths
def _append_attention_kernel(
    query_ptr,  # (B, T, H, D) fp16/bf16/fp32
    key_ptr,  # (B, T, H, D)
    value_ptr,  # (B, T, H, D)
    key_cache_ptr,  # (B, H, S, D)
    value_cache_ptr,  # (B, H, S, D)
    cache_position_ptr,  # () or (B,) int
    ended_ptr,  # (B,) int; not read unless HAS_ENDED
    out_ptr,  # (B, T, H, D) contiguous
    qk_scale,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    stride_kc_b,
    stride_kc_h,
    stride_kc_s,
    stride_vc_b,
    stride_vc_h,
    stride_vc_s,
    stride_cp_b,
    T,
    H,
    S,
    HAS_ENDED: tl.constexpr,
    READ_AHEAD: tl.constexpr,  # position and cached tokens may be read before the previous kernel has finished
    USE_PDL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,  # 1, or a tensor-core tile for T > 1
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    if not READ_AHEAD:
        pdl_handover(USE_PDL)
    i_h = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    position = tl.load(cache_position_ptr + i_b * stride_cp_b).to(tl.int64)
    end = tl.minimum(tl.maximum(position, 0), S).to(tl.int32)  # of the keys that are in the cache already
    if HAS_ENDED:
        end = tl.where(tl.load(ended_ptr + i_b) == 0, end, 0)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM

    query_ptr += i_b * stride_q_b + i_h * stride_q_h
    key_ptr += i_b * stride_k_b + i_h * stride_k_h
    value_ptr += i_b * stride_v_b + i_h * stride_v_h
    key_cache_ptr += i_b * stride_kc_b + i_h * stride_kc_h
    value_cache_ptr += i_b * stride_vc_b + i_h * stride_vc_h
    if BLOCK_T == 1:
        k_next, v_next = load_keys_values(
            key_cache_ptr, value_cache_ptr, stride_kc_s, stride_vc_s, 0, end, HEAD_DIM, BLOCK_S, BLOCK_D, IS_STREAMED=False
        )
        if READ_AHEAD:
            pdl_handover(USE_PDL)
        q = tl.load(query_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32) * qk_scale
        k = tl.load(key_ptr + offs_d, mask=mask_d, other=0.0)
        v = tl.load(value_ptr + offs_d, mask=mask_d, other=0.0)
        mask_new = mask_d & (position >= 0) & (position < S)
        tl.store(key_cache_ptr + position * stride_kc_s + offs_d, k, mask=mask_new)
        tl.store(value_cache_ptr + position * stride_vc_s + offs_d, v, mask=mask_new)
        # The new token is where row 0 of the tile starts from.
        is_first = tl.arange(0, BLOCK_S) == 0
        m_i = tl.where(is_first, tl.sum(q * k.to(tl.float32), axis=0), float("-inf"))
        l_i = tl.where(is_first, 1.0, 0.0)
        acc = tl.where(is_first[:, None], v.to(tl.float32)[None, :], 0.0)
        m_i, l_i, acc = attend_one(
            q, k_next, v_next, key_cache_ptr, value_cache_ptr, stride_kc_s, stride_vc_s, 0, end, m_i, l_i, acc,
            HEAD_DIM, BLOCK_S, BLOCK_D, IS_STREAMED=False,
        )  # fmt: skip
        _, l, o = merge_rows(m_i, l_i, acc)
        tl.store(out_ptr + (i_b * H + i_h) * HEAD_DIM + offs_d, normalise(l, o).to(out_ptr.dtype.element_ty), mask=mask_d)
    else:
        if READ_AHEAD:
            pdl_handover(USE_PDL)
        offs_t = tl.arange(0, BLOCK_T)
        mask_t = offs_t < T
        mask_td = mask_t[:, None] & mask_d[None, :]
        q = tl.load(query_ptr + offs_t[:, None] * stride_q_t + offs_d[None, :], mask=mask_td, other=0.0)
        k = tl.load(key_ptr + offs_t[:, None] * stride_k_t + offs_d[None, :], mask=mask_td, other=0.0)
        v = tl.load(value_ptr + offs_t[:, None] * stride_v_t + offs_d[None, :], mask=mask_td, other=0.0)
        offs_s = position + offs_t
        mask_new = mask_td & (offs_s >= 0)[:, None] & (offs_s < S)[:, None]
        tl.store(key_cache_ptr + offs_s[:, None] * stride_kc_s + offs_d[None, :], k, mask=mask_new)
        tl.store(value_cache_ptr + offs_s[:, None] * stride_vc_s + offs_d[None, :], v, mask=mask_new)
        m_i = tl.full((BLOCK_T,), float("-inf"), tl.float32)
        l_i = tl.zeros((BLOCK_T,), tl.float32)
        acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        # A token before slot 0 is dropped, so none of those after it sees it either.
        visible = (mask_t & (offs_s >= 0))[None, :] & (offs_t[None, :] <= offs_t[:, None])
        m_i, l_i, acc = attend_tile(q, k, v, visible, qk_scale, m_i, l_i, acc)
        limit = tl.zeros((BLOCK_T,), tl.int32) + end
        m_i, l_i, acc = attend_few(
            q, limit, qk_scale, key_cache_ptr, value_cache_ptr, stride_kc_s, stride_vc_s, 0, end, m_i, l_i, acc,
            HEAD_DIM, BLOCK_S, BLOCK_D, IS_STREAMED=False,
        )  # fmt: skip
        out_row = (i_b * T + offs_t[:, None]) * H + i_h
        out = normalise(l_i[:, None], acc).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_row * HEAD_DIM + offs_d[None, :], out, mask=mask_td)


class Tiles(NamedTuple):
    """How a launch is cut: keys a tile, warps a program, stages of the load pipeline."""

    BLOCK_S: int
    num_warps: int
    num_stages: int


def choose_tiles(B: int, T: int, H: int, D: int, itemsize: int, has_copies: bool = False) -> Tiles | PacedTiles:
    """Tiles from shapes alone; `itemsize`: bytes an element, `has_copies`: paced copies are to be had.

    Few heads leave the chip empty and want long tiles, many want small programs: the best compromise over lengths 20, 100
    and 440 at batches 1, 8 and 32 of 20 heads (fp16, D = 64), measured by benchmarks/tune_attention.py on one H100 80GB
    HBM3, 2026-11-22. Wider rows: fewer keys, the same registers.
    """
    if has_copies and T == 1 and D in HEAD_DIMS and H * D >= MIN_WIDTH:
        return choose_append_tiles(B)
    BLOCK_S, num_warps = (128, 4) if B * H <= 320 else (32, 1)
    if T > 1:
        BLOCK_S, num_warps = 32, 4
    return Tiles(max(16, BLOCK_S * 128 // (triton.next_power_of_2(D) * itemsize)), num_warps, num_stages=2)


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    read_ahead: bool,
    ended: torch.Tensor | None = None,
    tiles: Tiles | PacedTiles | None = None,
) -> None:
    check_apart(key_cache, value_cache)
    B, T, H, D = query.shape
    if tiles is None:
        # Paced copies have been measured in a step alone, whose links read ahead.
        has_copies = read_ahead and has_paced_copies(query.device, query.dtype) and are_aligned(key_cache, value_cache)
        tiles = choose_tiles(B, T, H, D, query.element_size(), has_copies)
    if isinstance(tiles, PacedTiles):
        tensors = query, key, value, key_cache, value_cache, cache_position, out
        try:
            return paced_append(*tensors, scale * LOG2E, read_ahead, ended, tiles)
        except Exception as error:
            give_up(error, query.device)
        tiles = choose_tiles(B, T, H, D, query.element_size())
    _append_attention_kernel[(H, B)](
        query_ptr=query,
        key_ptr=key,
        value_ptr=value,
        **cache_arguments(key_cache, value_cache),
        **position_arguments(cache_position),
        ended_ptr=cache_position if ended is None else ended,
        out_ptr=out,
        qk_scale=scale * LOG2E,
        stride_q_b=query.stride(0),
        stride_q_t=query.stride(1),
        stride_q_h=query.stride(2),
        stride_k_b=key.stride(0),
        stride_k_t=key.stride(1),
        stride_k_h=key.stride(2),
        stride_v_b=value.stride(0),
        stride_v_t=value.stride(1),
        stride_v_h=value.stride(2),
        T=T,
        H=H,
        S=key_cache.shape[2],
        HAS_ENDED=ended is not None,
        READ_AHEAD=read_ahead,
        HEAD_DIM=D,
        BLOCK_T=1 if T == 1 else 16,
        BLOCK_D=triton.next_power_of_2(D),
        num_stages=tiles.num_stages,
        **fit_registers(tiles.BLOCK_S, tiles.num_warps, query, key_cache, value_cache),
        **pdl_options(query.device),
    )


def _run_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    read_ahead: bool,
    ended: torch.Tensor | None,
) -> None:
    out.copy_(append_attention_reference(query, key, value, key_cache, value_cache, cache_position, scale=scale, ended=ended))


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    read_ahead: bool,
    ended: torch.Tensor | None,
) -> None:
    return None


# The result is an argument: an op that mutates a cache returns nothing, so that Inductor can functionalise it.
_op = register(
    "append_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    " Tensor cache_position, Tensor(c!) out, float scale, bool read_ahead, Tensor? ended) -> ()",
    kernel=_launch,
    reference=_run_reference,
    fake=_fake,
)


def append_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    *,
    scale: float,
    read_ahead: bool = False,
    ended: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes T new keys and values at `cache_position` and attends causally to all up to and with them, in one launch.

    Args:
        query, key, value: (B, T, H, D), T from 1 to 16, D one of 32, 64, 80, 96, 128; fp32, fp16 or bf16; any strides
            with a dense last dimension, as all tensors here.
        key_cache, value_cache: (B, H, S, D), the query's dtype. Mutated: slots cache_position .. cache_position + T - 1.
        cache_position: int64 or int32 on the same device, 0-dim or (B,): the slot of the first new token.
        scale: multiplies the scores, in fp32. Whisper scales its query in the model's dtype and passes 1.0.
        read_ahead: promises that between what wrote cache_position, the slots before it and `ended` and this call there is a
            kernel launched without dependent launch or the beginning of a graph's replay; see `decode_attention`.
        ended: (B,) int64 or int32 on the same device: sequences whose number is not 0 have ended. They are written as the
            others are, but none of their cached keys is read, and what is returned for them is not meaningful.

    A token that falls outside the S slots is not written (the position is on the device, where nothing can be raised),
    and what is returned for it is not meaningful.

    Returns:
        (B, T, H, D), contiguous, the query's dtype: what `out_proj` reads as (B, T, H * D).

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit; the caches are then untouched.
    """
    _check(query, key, value, key_cache, value_cache, cache_position, ended)
    out = query.new_empty(query.shape)
    _op(query, key, value, key_cache, value_cache, cache_position, out, scale, read_ahead, ended)
    return out


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    ended: torch.Tensor | None,
    is_reference: bool = False,
) -> None:
    states = {"query": query, "key": key, "value": value, "key_cache": key_cache, "value_cache": value_cache}
    check_states(**states, is_reference=is_reference)
    check_caches(query, key_cache, value_cache, mutated=True)
    check_attention(query)
    if key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            f"query, key and value differ in shape: {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    check_positions("cache_position", cache_position, query.shape[0], query.device)
    check_ended(ended, query.shape[0], query.device)
