"""`append_attention` on any GPU: a program reads its keys and values tile by tile into registers."""

from __future__ import annotations

import torch

from ._arguments import cache_arguments, position_arguments
from ._attend import attend_few, attend_one, attend_tile, fit_registers, load_keys_values, merge_rows, normalise
from ._dispatch import pdl_handover, pdl_options, tl, triton


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


def plain_append(
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
    BLOCK_S: int,
    num_warps: int,
    num_stages: int,
) -> None:
    """Launches `_append_attention_kernel`. out: (B, T, H, D), is written.

    `qk_scale` is for a softmax in base 2; `read_ahead` and `ended` as in `append_attention`.
    """
    B, T, H, D = query.shape
    _append_attention_kernel[(H, B)](
        query_ptr=query,
        key_ptr=key,
        value_ptr=value,
        **cache_arguments(key_cache, value_cache),
        **position_arguments(cache_position),
        ended_ptr=cache_position if ended is None else ended,
        out_ptr=out,
        qk_scale=qk_scale,
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
        num_stages=num_stages,
        **fit_registers(BLOCK_S, num_warps, query, key_cache, value_cache),
        **pdl_options(query.device),
    )
