"""Whisper's attention on our kernels: by name, for any cache (`attention_forward`), and as a module (`TritonAttention`).

By name, `attn_implementation="whisper_triton"`, transformers hands over query, key and value as (B, H, T, D) and a mask made
by `attention_mask`. The module, which `accelerate` puts in place, computes q/k/v as (B, T, H, D) views and lets the kernels
write and read the static cache: no transposed copy is made. Whatever neither covers takes the stock path, and the log says
so once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.whisper.modeling_whisper import WhisperAttention, eager_attention_forward

from .cache import CrossAttentionLayer, SelfAttentionLayer
from .kernels import append_attention, decode_attention
from .kernels._checks import DTYPES, HEAD_DIMS

NAME = "whisper_triton"
STATE = "_whisper_triton"  # the attribute of an accelerated model, and of its encoder
logger = logging.getLogger(__name__)
_reported: set[str] = set()


def report_once(what: str) -> None:
    """Logs, once a process, what is not done on the fast path and why."""
    if torch.compiler.is_compiling() or what in _reported:
        return
    _reported.add(what)
    logger.warning(what)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask function registered with transformers.

    For one token without padding over a static cache it returns the number of valid slots as an int32 tensor (1, 1, 1, 1),
    which transformers passes through as it does any 4-d mask; the kernel reads it on the device. Otherwise what SDPA gets:
    None (all visible, or causal over an empty cache) or a bool mask (B, 1, T, S).
    """
    # The offset is a number in a dynamic cache, where all that is handed over is valid, and in a static one not yet allocated.
    is_static = isinstance(q_offset, torch.Tensor) or kv_length > q_offset + 1
    if q_length == 1 and attention_mask is None and mask_function is causal_mask_function and is_static:
        return torch.as_tensor(q_offset + 1, device=device, dtype=torch.int32).view(1, 1, 1, 1)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **kwargs,
    )


def is_length(mask: torch.Tensor | None) -> bool:
    """Whether a mask is the number of valid slots that `attention_mask` returns."""
    return mask is not None and mask.dtype == torch.int32 and mask.shape == (1, 1, 1, 1)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function registered with transformers.

    Args:
        query: (B, H, T, D). key, value: (B, H, S, D), of any cache or none.
        attention_mask: what `attention_mask` above returned, or None.

    Returns:
        (B, T, H, D), and attention weights (B, H, T, S) where the stock path was asked for them.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    one_token = query.shape[2] == 1 and (attention_mask is None or is_length(attention_mask))
    reason = _not_covered(module, query, query.shape[-1], (query, key, value), dropout, kwargs)
    if reason is None and query.shape[0] != key.shape[0]:
        reason = "query and key differ in batch size"
    if reason is None and one_token:
        length = None if attention_mask is None else attention_mask.view(())
        return decode_attention(query.transpose(1, 2), key, value, length, scale=scale), None
    if reason is None and query.shape[2] == 1:
        reason = "a padding mask over the cache"
    return _stock_attention(module, query, key, value, attention_mask, dropout, scale, reason, kwargs)


def why_not_covered(dtype: torch.dtype, head_dim: int, device: torch.device) -> str | None:
    """Why no kernel takes states of this kind, or None."""
    if dtype not in DTYPES or head_dim not in HEAD_DIMS:
        return f"{dtype} with head dim {head_dim}"
    if device.type in ("cuda", "cpu") and torch.is_autocast_enabled(device.type):
        return "autocast: states have another dtype than the model and its caches"
    return None


def _not_covered(
    module: nn.Module,
    states: torch.Tensor,
    head_dim: int,
    may_need_gradients: Iterable[torch.Tensor],
    dropout: float,
    kwargs: dict[str, Any],
) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    if kwargs.get("output_attentions") or module.config.output_attentions:
        return "output_attentions=True: the kernels never hold the weights"
    if dropout > 0.0:
        return "dropout"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in may_need_gradients):
        return "gradients: the kernels have no backward pass"
    if kwargs.get("head_mask") is not None or kwargs.get("position_bias") is not None:
        return "a head mask or position bias"
    return why_not_covered(states.dtype, head_dim, states.device)


def _stock_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float,
    reason: str | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SDPA for prompts and the encoder (`reason` None); else what the model did before `accelerate`, with its mask."""
    if reason is not None:
        report_once(f"attention takes the stock path: {reason}")
    wants_weights = kwargs.get("output_attentions") or module.config.output_attentions
    stock = getattr(module, "stock_attn_implementation", None) or ("eager" if wants_weights else "sdpa")
    if is_length(mask):
        mask = torch.arange(key.shape[2], device=key.device) < mask  # (1, 1, 1, S)
    if stock != "eager" or reason is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scale, **kwargs)
    T, S = query.shape[2], key.shape[2]
    if mask is None and T > 1 and module.is_causal:  # eager attention knows no `is_causal`
        mask = torch.ones(T, S, dtype=torch.bool, device=key.device).tril().view(1, 1, T, S)
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros((), dtype=query.dtype, device=key.device).where(mask, torch.finfo(query.dtype).min)
    return eager_attention_forward(module, query, key, value, mask, scaling=scale, dropout=dropout)


class TritonAttention(WhisperAttention):
    """`WhisperAttention` with the same parameters whose forward pass runs on our kernels where it can.

    It adds no state: `accelerate` turns an existing module into one by its `__class__`, so that parameters, hooks and
    replaced submodules (adapters, quantised layers) stay what they are.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states: (B, T, C); key_value_states: (B, frames, C) in cross-attention. Returns (B, T, C), None.

        Writes the self cache at its position, and the cross cache once, where `cache.is_updated` is not yet set.
        `past_key_values` is what `cache` was called before transformers 5.24.
        """
        cache = past_key_values if cache is None else cache
        is_cross = key_value_states is not None
        kind = CrossAttentionLayer if is_cross else SelfAttentionLayer
        layer = self._cache_layer(cache, is_cross)
        sources = (hidden_states, key_value_states) if is_cross else (hidden_states,)
        cached = (layer.keys, layer.values) if isinstance(layer, kind) and layer.is_initialized else ()
        dropout = self.dropout if self.training else 0.0
        kwargs_of_attention = kwargs | {"output_attentions": output_attentions}
        # Decided before anything is computed: on the stock path hooks and adapters would else act on the query twice.
        covered = (
            self.config._attn_implementation == NAME
            and (layer is None or isinstance(layer, kind))
            and (attention_mask is None or (hidden_states.shape[1] == 1 and layer is not None and is_length(attention_mask)))
            and (key_value_states is None or key_value_states.shape[0] == hidden_states.shape[0])
            and _not_covered(
                self, hidden_states, self.head_dim, chain(sources, cached, self.parameters()), dropout, kwargs_of_attention
            )
            is None
        )
        if not covered:
            return super().forward(hidden_states, key_value_states, cache, attention_mask, output_attentions, **kwargs)
        ended = getattr(cache, "ended", None)  # of a captured step's cache
        query = (self.q_proj(hidden_states) * self.scaling).view(*hidden_states.shape[:-1], -1, self.head_dim)
        if layer is None:
            key, value = self._project(key_value_states if is_cross else hidden_states)
            out = self._prompt_attention(query, key, value, is_causal=self.is_causal and not is_cross)
        elif is_cross:
            out = self._cross_attention(query, key_value_states, cache, layer, ended)
        else:
            out = self._self_attention(query, *self._project(hidden_states), layer, ended)
        return self.out_proj(out.reshape(*hidden_states.shape[:-1], -1)), None

    def _cache_layer(self, cache: Cache | None, is_cross: bool) -> Any:
        if cache is None:
            return None
        if not isinstance(cache, EncoderDecoderCache):
            return cache  # foreign: no class of ours, so the stock path
        part = cache.cross_attention_cache if is_cross else cache.self_attention_cache
        return part.layers[self.layer_idx] if self.layer_idx < len(part.layers) else part

    def _project(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `states` (B, N, C) as (B, N, H, D) views of the projections' output."""
        shape = (*states.shape[:-1], self.num_heads, self.head_dim)
        return self.k_proj(states).view(shape), self.v_proj(states).view(shape)

    def _prompt_attention(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
        """PyTorch's SDPA, on (B, N, H, D) views: its backends read strides, and return the query's layout."""
        return scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            is_causal=is_causal and query.shape[1] > 1,
            scale=1.0,
        ).transpose(1, 2)

    def _self_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: SelfAttentionLayer,
        ended: torch.Tensor | None,
    ) -> torch.Tensor:
        T = query.shape[1]
        if T > 1:  # a prompt without a mask: the cache was empty, so the new tokens are all there is
            layer.update(key.transpose(1, 2), value.transpose(1, 2))
            return self._prompt_attention(query, key, value, is_causal=True)
        if not layer.is_initialized:
            layer.lazy_initialization(key.transpose(1, 2), value.transpose(1, 2))
        layer.claim(T)
        out = append_attention(query, key, value, layer.keys, layer.values, layer.cumulative_length, scale=1.0, ended=ended)
        layer.advance(T)
        return out

    def _cross_attention(
        self,
        query: torch.Tensor,
        key_value_states: torch.Tensor,
        cache: EncoderDecoderCache,
        layer: CrossAttentionLayer,
        ended: torch.Tensor | None,
    ) -> torch.Tensor:
        is_updated = cache.is_updated.get(self.layer_idx, False)
        if not is_updated:
            key, value = self._project(key_value_states)
            layer.update(key.transpose(1, 2), value.transpose(1, 2))
            cache.is_updated[self.layer_idx] = True
        if query.shape[1] == 1:
            return decode_attention(query, layer.keys, layer.values, scale=1.0, read_ahead=is_updated, ended=ended)
        return self._prompt_attention(query, layer.keys.transpose(1, 2), layer.values.transpose(1, 2), is_causal=False)


def register() -> None:
    """Makes `attn_implementation="whisper_triton"` known to transformers: the attention and its mask, never one alone."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
