"""Static caches of Whisper's decoder: fixed tensors, written in place by `update_kv_cache`.

All layers of a self-attention cache share one position on the device (`cumulative_length`), advanced by the last layer: a
step then adds once and not once a layer. Read it between steps; within a step it is the position of the step's first token.

A token past the last slot is refused where the host can tell: always, but in a step that `torch.compile` runs, whose kernels
drop it. The position goes on counting then, so that `check_length` tells of it, and `to_legacy_cache` refuses.
"""

from __future__ import annotations

import inspect
from numbers import Integral

import torch
from transformers import WhisperForConditionalGeneration
from transformers.cache_utils import Cache, EncoderDecoderCache, StaticLayer
from transformers.models.whisper.modeling_whisper import WhisperAttention

from .kernels import update_kv_cache
from .kernels._checks import need_gradients

# What transformers calls an argument or an output that is a cache; since 5.24 the one, before it the other.
CACHE_NAME = "cache" if "cache" in inspect.signature(WhisperAttention.forward).parameters else "past_key_values"


class SelfAttentionLayer(StaticLayer):
    """Keys and values (B, H, S, D) of one decoder layer's own tokens."""

    def __init__(
        self,
        max_cache_len: int,
        cumulative_length: torch.Tensor,
        is_last: bool = True,
        host_lengths: list[int] | None = None,
    ) -> None:
        super().__init__(max_cache_len)
        self.cumulative_length = cumulative_length
        self.is_last = is_last
        self._host_lengths = [0] if host_lengths is None else host_lengths  # of one element, the layers' common one

    @property
    def host_length(self) -> int:
        """The tokens that the host has seen written. Those of steps in a compiled graph do not count: it is a lower bound."""
        return self._host_lengths[0]

    @host_length.setter
    def host_length(self, length: int) -> None:
        self._host_lengths[0] = length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self.cumulative_length.device != key_states.device:  # moved there, it would no longer be the layers' common one
            raise ValueError(f"the cache's positions are on {self.cumulative_length.device}, the states on {key_states.device}")
        super().lazy_initialization(key_states, value_states)

    def claim(self, new_tokens: int) -> None:
        """Raises ValueError where the host can tell that `new_tokens` more do not fit.

        Under torch.compile it cannot; the kernels then drop what falls past the last slot.
        """
        if torch.compiler.is_compiling():
            return
        if self.host_length + new_tokens > self.max_cache_len:
            raise ValueError(
                f"the cache has {self.max_cache_len} slots, {self.host_length} of them in use: {new_tokens} more do not fit"
            )

    def advance(self, new_tokens: int) -> None:
        """Moves the shared position; called by every layer after its write, effective in the last.

        So a step that fails half way leaves both the device's position and the host's where they were.
        """
        if self.is_last:
            self.cumulative_length.add_(new_tokens)
            if not torch.compiler.is_compiling():
                self.host_length += new_tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes (B, H, T, D) states at the current position, in place; returns all slots (B, H, S, D).

        Raises:
            ValueError: states that do not fit, or no room for them; nothing has changed then.
        """
        _check_states(self, key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.claim(key_states.shape[2])
        _write(self, key_states, value_states)
        self.advance(key_states.shape[2])
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self.host_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back, of all layers in the last one's call; transformers' own does so for each, since 5.24.

        Args:
            tokens_to_remove: 0, or their number with a minus; all if there are fewer.

        Raises:
            ValueError: above 0; nothing has changed then.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"the number of tokens to take back is wanted with a minus, got {tokens_to_remove}")
        if self.is_last:
            self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)
            self.host_length = max(0, self.host_length + tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        _reorder_in_place(self, beam_idx)


class CrossAttentionLayer(StaticLayer):
    """Keys and values (B, H, S, D) of the encoder's S frames: written whole, once a window."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes (B, H, S, D) states over all slots, in place.

        Raises:
            ValueError: states that do not fit; nothing has changed then.
        """
        _check_states(self, key_states, value_states)
        if key_states.shape[2] != self.max_cache_len:
            raise ValueError(f"the cross cache has {self.max_cache_len} slots, the encoder gave {key_states.shape[2]} frames")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length.zero_()
        _write(self, key_states, value_states)
        self.cumulative_length.fill_(self.max_cache_len)
        return self.keys, self.values

    def reset(self) -> None:
        self.cumulative_length.zero_()  # the content is overwritten whole: no need to clear hundreds of MB

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        _reorder_in_place(self, beam_idx)


def _write(layer: StaticLayer, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    if need_gradients(key_states, value_states, layer.keys, layer.values):
        # The kernel has no backward pass: gradients would get lost without a word.
        slots = layer.cumulative_length + torch.arange(key_states.shape[2], device=key_states.device)
        layer.keys.index_copy_(2, slots, key_states)
        layer.values.index_copy_(2, slots, value_states)
    else:
        key, value = key_states.transpose(1, 2), value_states.transpose(1, 2)
        update_kv_cache(key, value, layer.keys, layer.values, layer.cumulative_length)


def _check_states(layer: StaticLayer, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    """Raises ValueError where the states cannot be `layer`'s, before anything of it is touched or allocated."""
    if not isinstance(key_states, torch.Tensor) or not isinstance(value_states, torch.Tensor):
        raise ValueError(f"keys and values must be tensors, got {type(key_states).__name__} and {type(value_states).__name__}")
    if key_states.dim() != 4 or key_states.shape != value_states.shape or key_states.numel() == 0:
        shapes = f"{tuple(key_states.shape)} and {tuple(value_states.shape)}"
        raise ValueError(f"keys and values must be (B, H, T, D), of one shape and not empty, got {shapes}")
    if layer.is_initialized:
        for name, states, cache in (("keys", key_states, layer.keys), ("values", value_states, layer.values)):
            sizes = states.shape[0], states.shape[1], states.shape[3]
            if sizes != (cache.shape[0], cache.shape[1], cache.shape[3]):
                shapes = f"caches {tuple(cache.shape)} (B, H, S, D) do not fit {name} {tuple(states.shape)} (B, H, T, D)"
                raise ValueError(shapes)
            if (states.dtype, states.device) != (cache.dtype, cache.device):
                raise ValueError(f"{name} are {states.dtype} on {states.device}, the cache {cache.dtype} on {cache.device}")


def _reorder_in_place(layer: StaticLayer, beam_idx: torch.LongTensor) -> None:
    # The stock layer replaces its tensors; a captured graph would go on reading the old ones.
    if layer.is_initialized:
        B = layer.keys.shape[0]
        if not isinstance(beam_idx, torch.Tensor) or beam_idx.shape != (B,) or beam_idx.dtype not in (torch.int64, torch.int32):
            is_tensor = isinstance(beam_idx, torch.Tensor)
            found = f"{beam_idx.dtype} {tuple(beam_idx.shape)}" if is_tensor else type(beam_idx).__name__
            raise ValueError(f"beam_idx must be ({B},) int64 or int32, got {found}")
        for cache in (layer.keys, layer.values):
            cache.copy_(cache.index_select(0, beam_idx.to(cache.device)))


class StaticEncoderDecoderCache(EncoderDecoderCache):
    """A static self-attention cache and a static cross-attention cache of as many layers as the decoder has.

    Args:
        num_layers: of the decoder. For turbo and distil `config.num_hidden_layers` is the encoder's.
        max_cache_len: slots of the self cache.
        num_frames: slots of the cross cache, that is the encoder's output length.
        device: where the positions live; the caches follow the states they are given first.
        is_compileable: what `generate` and the mask functions of transformers ask a static cache. False saves them work but
            is only for attention of ours: any other is then told that every slot holds a token.

    Raises:
        ValueError: a size that is no whole number, or below 1.
    """

    def __init__(
        self, num_layers: int, max_cache_len: int, num_frames: int, device: torch.device, is_compileable: bool = True
    ) -> None:
        for name, size in (("num_layers", num_layers), ("max_cache_len", max_cache_len), ("num_frames", num_frames)):
            if not isinstance(size, Integral) or isinstance(size, bool):
                raise ValueError(f"{name} must be a whole number, got {type(size).__name__} {size!r:.50}")
        if min(num_layers, max_cache_len, num_frames) < 1:
            raise ValueError(f"sizes must be at least 1, got {num_layers=}, {max_cache_len=}, {num_frames=}")
        position = torch.zeros((), dtype=torch.int64, device=device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(position)
        last, host_lengths = num_layers - 1, [0]
        super().__init__(
            Cache(layers=[SelfAttentionLayer(max_cache_len, position, i == last, host_lengths) for i in range(num_layers)]),
            Cache(layers=[CrossAttentionLayer(num_frames) for _ in range(num_layers)]),
        )
        self._is_compileable = is_compileable
        # (B,) integers or None, for a step: of sequences whose number is not 0 no cached key is read.
        self.ended: torch.Tensor | None = None

    @property
    def is_compileable(self) -> bool:
        return self._is_compileable

    def reset(self) -> None:
        """Empties the cache. In few launches: one a tensor would be a hundred, each window, before the prompt."""
        own, cross = self.self_attention_cache.layers, self.cross_attention_cache.layers
        if caches := [cache for layer in own if layer.is_initialized for cache in (layer.keys, layer.values)]:
            torch._foreach_zero_(caches)
        torch._foreach_zero_([layer.cumulative_length for layer in cross])  # their content is overwritten whole
        own[0].cumulative_length.zero_()
        own[0].host_length = 0  # the layers' common ones
        self.is_updated.update(dict.fromkeys(self.is_updated, False))

    def check_length(self) -> int:
        """The number of tokens in the cache. Waits for the device.

        Raises:
            ValueError: tokens were dropped, by steps in a compiled graph, because there was no slot for them.
        """
        length, slots = int(self.get_seq_length()), self.get_max_length()
        if not 0 <= length <= slots:
            raise ValueError(f"the cache's position is {length} and it has {slots} slots: what fell outside them was dropped")
        return length

    def to_legacy_cache(self) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], ...]:
        """A layer's (self keys, self values, cross keys, cross values), views of the slots in use. Waits for the device.

        Raises:
            ValueError: nothing has been decoded yet, or more than there are slots for.
        """
        if not all(self.is_updated.values()):
            raise ValueError("the cache holds no cross keys and values yet")
        length = self.check_length()
        return tuple(
            (own.keys[:, :, :length], own.values[:, :, :length], cross.keys, cross.values)
            for own, cross in zip(self.self_attention_cache.layers, self.cross_attention_cache.layers, strict=True)
        )

    @classmethod
    def from_legacy_cache(cls, layers: tuple[tuple[torch.Tensor, ...], ...], max_cache_len: int) -> StaticEncoderDecoderCache:
        """A cache of `max_cache_len` slots that holds copies of what `to_legacy_cache` returned.

        Raises:
            ValueError: something else, or more tokens than slots.
        """
        if not layers or any(
            len(layer) != 4 or not all(isinstance(t, torch.Tensor) and t.dim() == 4 for t in layer) for layer in layers
        ):
            raise ValueError("a legacy cache is a tuple of (self keys, self values, cross keys, cross values) a layer")
        kinds = [[(t.shape, t.dtype, t.device) for t in layer] for layer in layers]
        if any(kind != kinds[0] for kind in kinds) or len({(*t.shape[:2], t.shape[3], t.dtype) for t in layers[0]}) > 1:
            raise ValueError(f"layers or their keys and values differ: {[[tuple(t.shape) for t in layer] for layer in layers]}")
        cache = cls(len(layers), max_cache_len, layers[0][2].shape[2], layers[0][0].device)
        for i, (key, value, cross_key, cross_value) in enumerate(layers):
            if key.shape[2] == value.shape[2] == 0:  # no token yet, after the cross keys and values were projected
                cache.self_attention_cache.layers[i].lazy_initialization(key, value)
            else:
                cache.self_attention_cache.update(key, value, i)
            cache.cross_attention_cache.update(cross_key, cross_value, i)
            cache.is_updated[i] = True
        return cache


def build_static_cache(
    model: WhisperForConditionalGeneration,
    batch_size: int,
    max_cache_len: int | None = None,
    num_frames: int | None = None,
    is_compileable: bool = True,
) -> StaticEncoderDecoderCache:
    """Allocates the static caches that `model` needs for `batch_size` sequences, in its dtype and on its device.

    Args:
        batch_size: B, beams included.
        max_cache_len: slots for the decoder's own tokens; by default `config.max_target_positions` (448).
        num_frames: frames of the encoder's output; by default `config.max_source_positions` (1500).
        is_compileable: see `StaticEncoderDecoderCache`. As with stock's static cache, `generate` compiles on a GPU.

    Raises:
        TypeError: anything but a Whisper model, or a size that is no whole number.
        ValueError: a size below 1.
    """
    if not isinstance(model, WhisperForConditionalGeneration):
        raise TypeError(f"build_static_cache takes a WhisperForConditionalGeneration, got {type(model).__name__}")
    config = model.config
    max_cache_len = config.max_target_positions if max_cache_len is None else max_cache_len
    num_frames = config.max_source_positions if num_frames is None else num_frames
    for name, size in (("batch_size", batch_size), ("max_cache_len", max_cache_len), ("num_frames", num_frames)):
        if not isinstance(size, Integral) or isinstance(size, bool):
            raise TypeError(f"{name} must be a whole number, got {type(size).__name__} {size!r:.50}")
    if min(batch_size, max_cache_len, num_frames) < 1:
        raise ValueError(f"sizes must be at least 1, got {batch_size=}, {max_cache_len=}, {num_frames=}")
    cache = StaticEncoderDecoderCache(config.decoder_layers, max_cache_len, num_frames, model.device, is_compileable)
    heads = config.decoder_attention_heads
    for part in (cache.self_attention_cache, cache.cross_attention_cache):
        part.early_initialization(batch_size, heads, config.d_model // heads, model.dtype, model.device)
    return cache
