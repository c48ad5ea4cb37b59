"""Launch arguments that several kernels take under the same names."""

from __future__ import annotations

import torch


def cache_arguments(key_cache: torch.Tensor, value_cache: torch.Tensor) -> dict[str, object]:
    """The two caches (B, H, S, D), by their strides; the last of them is 1."""
    return {
        "key_cache_ptr": key_cache,
        "value_cache_ptr": value_cache,
        "stride_kc_b": key_cache.stride(0),
        "stride_kc_h": key_cache.stride(1),
        "stride_kc_s": key_cache.stride(2),
        "stride_vc_b": value_cache.stride(0),
        "stride_vc_h": value_cache.stride(1),
        "stride_vc_s": value_cache.stride(2),
    }


def position_arguments(cache_position: torch.Tensor) -> dict[str, object]:
    """Slots of the first new tokens, () for one that all sequences share, or (B,)."""
    return {
        "cache_position_ptr": cache_position,
        "stride_cp_b": cache_position.stride(0) if cache_position.dim() else 0,
    }
