"""Writes T new keys and values into a static cache, in place, at a position read on the device.

    key_cache[b, h, cache_position[b] + t, :] = key[b, t, h, :]        (and the same for values)

The projections hand over (B, T, H, D) views of their output and the cache is (B, H, S, D): one launch reads the first by
its strides and writes the second, so no transposed copy exists. It serves prompts (a few tokens) and the cross cache
(1500 frames, once a window); a decode step uses `append_attention`, which writes and attends together.

Bytes moved: 4 * B * T * H * D elements (keys and values, read and written once).
"""

from __future__ import annotations

import torch

from ._arguments import cache_arguments, position_arguments
from ._checks import check_apart, check_caches, check_gradients, check_positions, check_states
from ._dispatch import pdl_handover, pdl_options, register, tl, triton


def update_kv_cache_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
) -> None:
    """What `update_kv_cache` computes, in PyTorch: tokens that fall outside the S slots are dropped."""
    _check(key, value, key_cache, value_cache, cache_position, is_reference=True)
    check_apart(key_cache, value_cache)
    B, T, _, _ = key.shape
    S = key_cache.shape[2]
    slots = cache_position.reshape(-1, 1).expand(B, 1) + torch.arange(T, device=key.device)  # (B, T)
    inside = (slots >= 0) & (slots < S)
    b, t = inside.nonzero(as_tuple=True)
    key_cache[b, :, slots[b, t]] = key[b, t]
    value_cache[b, :, slots[b, t]] = value[b, t]


@triton.jit(do_not_specialize_on_alignment=("T", "S"))  # a build for all lengths
def _update_kv_cache_kernel(
    key_ptr,  # (B, T, H, D) fp16/bf16/fp32
    value_ptr,  # (B, T, H, D)
    key_cache_ptr,  # (B, H, S, D)
    value_cache_ptr,  # (B, H, S, D)
    cache_position_ptr,  # () or (B,) int
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
    S,
    USE_PDL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pdl_handover(USE_PDL)
    # Heads run fastest: neighbouring programs read neighbouring rows of the (B, T, H, D) projection.
    i_h = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    offs_t = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_s = tl.load(cache_position_ptr + i_b * stride_cp_b).to(tl.int64) + offs_t
    mask_t = (offs_t < T) & (offs_s >= 0) & (offs_s < S)
    mask = mask_t[:, None] & (offs_d < HEAD_DIM)[None, :]

    k = tl.load(key_ptr + i_b * stride_k_b + i_h * stride_k_h + offs_t[:, None] * stride_k_t + offs_d[None, :], mask=mask)
    v = tl.load(value_ptr + i_b * stride_v_b + i_h * stride_v_h + offs_t[:, None] * stride_v_t + offs_d[None, :], mask=mask)
    key_row = key_cache_ptr + i_b * stride_kc_b + i_h * stride_kc_h + offs_s[:, None] * stride_kc_s
    value_row = value_cache_ptr + i_b * stride_vc_b + i_h * stride_vc_h + offs_s[:, None] * stride_vc_s
    tl.store(key_row + offs_d[None, :], k, mask=mask)
    tl.store(value_row + offs_d[None, :], v, mask=mask)


def _launch(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
) -> None:
    check_apart(key_cache, value_cache)
    B, T, H, D = key.shape
    # Few, since each is a build. No timing of others, or of other numbers of warps, is on record.
    BLOCK_T = 1 if T == 1 else 4 if T <= 4 else 32
    _update_kv_cache_kernel[(H, triton.cdiv(T, BLOCK_T), B)](
        key_ptr=key,
        value_ptr=value,
        **cache_arguments(key_cache, value_cache),
        **position_arguments(cache_position),
        stride_k_b=key.stride(0),
        stride_k_t=key.stride(1),
        stride_k_h=key.stride(2),
        stride_v_b=value.stride(0),
        stride_v_t=value.stride(1),
        stride_v_h=value.stride(2),
        T=T,
        S=key_cache.shape[2],
        HEAD_DIM=D,
        BLOCK_T=BLOCK_T,
        BLOCK_D=triton.next_power_of_2(D),
        num_warps=1 if BLOCK_T <= 4 else 4,
        **pdl_options(key.device),
    )


def _fake(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
) -> None:
    return None


_op = register(
    "update_kv_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_position) -> ()",
    kernel=_launch,
    reference=update_kv_cache_reference,
    fake=_fake,
)


def update_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
) -> None:
    """Writes `key` and `value` into the caches at `cache_position`, in one launch.

    Args:
        key, value: (B, T, H, D), any T >= 1, fp32, fp16 or bf16, any strides with a dense last dimension.
        key_cache, value_cache: (B, H, S, D) of the same dtype, the same condition on strides, no common element. Mutated.
        cache_position: int64 or int32 on the same device, 0-dim or (B,): the slot of the first new token.

    A token that falls outside the S slots is dropped, so a position that ran away cannot corrupt memory: the value is on
    the device, where nothing can be raised.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit, or inputs that need gradients; the caches are then
            untouched.
    """
    _check(key, value, key_cache, value_cache, cache_position)
    check_gradients("update_kv_cache", key, value, key_cache, value_cache)
    _op(key, value, key_cache, value_cache, cache_position)


def _check(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    is_reference: bool = False,
) -> None:
    check_states(key=key, value=value, key_cache=key_cache, value_cache=value_cache, is_reference=is_reference)
    check_caches(key, key_cache, value_cache, mutated=True)
    if key.shape != value.shape:
        raise ValueError(f"key {tuple(key.shape)} and value {tuple(value.shape)} differ in shape")
    check_positions("cache_position", cache_position, key.shape[0], key.device)
