"""`accelerate` and `restore`: puts our attention and caches into one model, in place, and takes them out again.

Nothing of transformers is rebound. Of the model's instance, the attention modules change class (parameters, hooks and
submodules stay), the config names our attention, and three methods of `generate` are overridden on the instance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn
from transformers import GenerationConfig, WhisperForConditionalGeneration
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.models.whisper.modeling_whisper import WhisperAttention

from .attention import NAME, TritonAttention
from .cache import StaticEncoderDecoderCache, build_static_cache

_STATE = "_whisper_triton"
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)


@dataclass
class _State:
    """What `restore` needs, kept on the model."""

    attn_implementation: str | None
    overridden: tuple[str, ...]
    compiled_cache: StaticEncoderDecoderCache | None = field(default=None, repr=False)


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` has been applied to `model` and not been undone."""
    return _STATE in vars(model)


def accelerate(model: WhisperForConditionalGeneration) -> WhisperForConditionalGeneration:
    """Puts the package's kernels under `model`, in place, and returns it; again on an accelerated model does nothing.

    `generate`, `pipeline`, `state_dict`, `save_pretrained` work as before. `restore` undoes it exactly.

    Raises:
        TypeError: anything but a `WhisperForConditionalGeneration`.
    """
    if not isinstance(model, WhisperForConditionalGeneration):
        raise TypeError(f"accelerate takes a WhisperForConditionalGeneration, got {type(model).__name__}")
    if is_accelerated(model):
        return model
    overrides = {
        "generate": _generate,
        "_prepare_cache_for_generation": _prepare_cache_for_generation,
        "_prepare_static_cache": _prepare_static_cache,
    }
    stock = model.config._attn_implementation
    for module in model.modules():
        if type(module) is WhisperAttention:
            module.__class__ = TritonAttention
            module.stock_attn_implementation = "eager" if stock == "eager" else "sdpa"
    model.config._attn_implementation = NAME
    for name, function in overrides.items():
        setattr(model, name, MethodType(functools.wraps(getattr(type(model), name))(function), model))
    setattr(model, _STATE, _State(stock, tuple(overrides)))
    return model


def restore(model: WhisperForConditionalGeneration) -> WhisperForConditionalGeneration:
    """Undoes `accelerate`, in place, and returns the model; does nothing to one that is not accelerated."""
    if not is_accelerated(model):
        return model
    state: _State = getattr(model, _STATE)
    for module in model.modules():
        if type(module) is TritonAttention and hasattr(module, "stock_attn_implementation"):
            module.__class__ = WhisperAttention
            del module.stock_attn_implementation
    for name in (*state.overridden, _STATE):
        delattr(model, name)
    model.config._attn_implementation = state.attn_implementation
    return model


@contextmanager
def accelerated(model: WhisperForConditionalGeneration) -> Iterator[WhisperForConditionalGeneration]:
    """`accelerate` for a block; a model that was accelerated before it stays so."""
    was_accelerated = is_accelerated(model)
    accelerate(model)
    try:
        yield model
    finally:
        if not was_accelerated:
            restore(model)


def _stock(model: WhisperForConditionalGeneration, name: str) -> Callable[..., Any]:
    return getattr(type(model), name).__get__(model)


def _generate(self: WhisperForConditionalGeneration, *args: Any, **kwargs: Any) -> Any:
    # `return_token_timestamps=True` sets eager attention and leaves it so, which would end the acceleration for good.
    before = self.config._attn_implementation
    try:
        return _stock(self, "generate")(*args, **kwargs)
    finally:
        self.config._attn_implementation = before


def _prepare_cache_for_generation(
    self: WhisperForConditionalGeneration,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    generation_mode: GenerationMode,
    batch_size: int,
    max_cache_length: int,
) -> None:
    covered = (
        model_kwargs.get("past_key_values") is None
        and generation_config.cache_implementation in (None, "dynamic")
        and generation_config.use_cache is not False
        and generation_mode in _MODES
        and not generation_config.is_assistant
        and not (generation_config.output_attentions or self.config.output_attentions)
        and self.config._attn_implementation == NAME
    )
    if covered:
        frames = model_kwargs["encoder_outputs"][0]
        model_kwargs["past_key_values"] = build_static_cache(self, frames.shape[0], max_cache_length, frames.shape[1])
    else:
        _stock(self, "_prepare_cache_for_generation")(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


def _prepare_static_cache(
    self: WhisperForConditionalGeneration,
    cache_implementation: str,
    batch_size: int,
    max_cache_len: int,
    prefill_chunk_size: int | None,
    model_kwargs: dict[str, Any],
) -> Cache:
    """For `cache_implementation="static"`: our cache, which `generate` compiles over."""
    if "offloaded" in cache_implementation or self.config._attn_implementation != NAME:
        return _stock(self, "_prepare_static_cache")(
            cache_implementation, batch_size, max_cache_len, prefill_chunk_size, model_kwargs
        )
    frames = model_kwargs["encoder_outputs"][0]
    return build_static_cache(self, frames.shape[0], max_cache_len, frames.shape[1], is_compileable=True)
