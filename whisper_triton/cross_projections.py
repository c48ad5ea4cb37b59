"""The cross keys and values of all layers, projected from a window's encoder states in one launch, once.

Which tensors that launch reads and writes is looked up when a step is made, and kept with it. So is of which states the cache
is: a further temperature for all rows projects nothing.
"""

from __future__ import annotations

import weakref

import torch
from transformers import WhisperForConditionalGeneration

from .attention import why_not_covered
from .cache import StaticEncoderDecoderCache
from .kernels import CrossTable, cross_table, project_cross_kv


class CrossProjections:
    """What fills the cross cache of a step of `model`: its weights into the keys and values of `cache`.

    `table` is None where the model is not of the form that the launch takes. Then each layer projects its own when it is first
    called.
    """

    def __init__(self, model: WhisperForConditionalGeneration, cache: StaticEncoderDecoderCache) -> None:
        self.cache = cache
        self.table = _table(model, cache)
        # The states that the cross cache is of, with the versions of all that it depends on.
        self._projected: tuple[weakref.ref[torch.Tensor], list[int]] | None = None

    def fill(self, encoder_states: torch.Tensor) -> None:
        """Fills the cross cache from `encoder_states` (B, frames, C), a window's first, if it is not there still.

        So it is at a further temperature for all rows; for some of them alone it is another step's: see `copy`. Where this is
        not covered, nothing is done.
        """
        if not self._covers(encoder_states):
            self._projected = None
            return
        if not self.holds(encoder_states):
            project_cross_kv(encoder_states, self.table)
        self._is_filled(encoder_states)

    def copy(self, other: CrossProjections, whole: torch.Tensor, rows: torch.Tensor, encoder_states: torch.Tensor) -> bool:
        """Fills the cross cache from `rows` (B,) of another step's, if that is of the states `whole`, of which `encoder_states`
        are these rows; returns whether it was. By the bytes and operations it should take a quarter of projecting them.
        """
        if not (self._covers(encoder_states) and other.holds(whole)):
            return False
        mine, others = (
            [tensor for layer in cache.cross_attention_cache.layers for tensor in (layer.keys, layer.values)]
            for cache in (self.cache, other.cache)
        )
        for target, source in zip(mine, others, strict=True):
            torch.index_select(source, 0, rows, out=target)
        self._is_filled(encoder_states)
        return True

    def holds(self, encoder_states: torch.Tensor) -> bool:
        """Whether the cross cache is of these states still, and of the weights as they are."""
        known = self._projected
        return known is not None and known[0]() is encoder_states and known[1] == self._versions(encoder_states)

    def _covers(self, encoder_states: torch.Tensor) -> bool:
        layer = self.cache.cross_attention_cache.layers[0] if self.table is not None else None
        if layer is None:
            return False
        B, H, S, D = layer.keys.shape
        return (
            encoder_states.shape == (B, S, H * D)
            and encoder_states.stride(-1) == 1
            and (encoder_states.dtype, encoder_states.device) == (layer.keys.dtype, layer.keys.device)
        )

    def _is_filled(self, encoder_states: torch.Tensor) -> None:
        # Those of inference mode count no versions.
        known = None if encoder_states.is_inference() else (weakref.ref(encoder_states), self._versions(encoder_states))
        layers, self._projected = self.cache.cross_attention_cache.layers, known
        torch._foreach_add_([layer.cumulative_length for layer in layers], layers[0].keys.shape[2])  # from 0, after a reset
        self.cache.is_updated.update(dict.fromkeys(self.cache.is_updated, True))

    def forget(self) -> None:
        """Forgets of which states the cache is: whatever comes next is projected."""
        self._projected = None

    def _versions(self, encoder_states: torch.Tensor) -> list[int]:
        table = self.table
        tensors = (encoder_states, *table.key_weights, *table.value_weights, *table.value_biases)
        tensors += (*table.key_caches, *table.value_caches)  # which somebody may have reordered
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _table(model: WhisperForConditionalGeneration, cache: StaticEncoderDecoderCache) -> CrossTable | None:
    """Where one launch finds all it needs to fill the cross cache; None where the model is not of the form that it takes."""
    modules = [layer.encoder_attn for layer in model.model.decoder.layers]
    layers = cache.cross_attention_cache.layers
    has_bias = [module.v_proj.bias is not None for module in modules]
    tensors = [t for module in modules for t in (*module.k_proj.parameters(), *module.v_proj.parameters())]
    covered = (
        all(module.k_proj.bias is None for module in modules)
        and all(has_bias) == any(has_bias)
        and why_not_covered(layers[0].keys.dtype, layers[0].keys.shape[-1], layers[0].keys.device) is None
        and all(t.is_contiguous() and (t.dtype, t.device) == (layers[0].keys.dtype, layers[0].keys.device) for t in tensors)
    )
    if not covered:
        return None
    return cross_table(
        [module.k_proj.weight.detach() for module in modules],
        [module.v_proj.weight.detach() for module in modules],
        [module.v_proj.bias.detach() for module in modules] if all(has_bias) else None,
        [layer.keys for layer in layers],
        [layer.values for layer in layers],
    )
