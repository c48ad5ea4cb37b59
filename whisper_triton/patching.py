"""`accelerate` and `restore`: puts our attention and caches into one model, in place, and takes them out again.

Nothing of transformers is rebound. Of the model's instance, the attention modules change class (parameters, hooks and
submodules stay), the config names our attention, and `forward`, four methods of `generate` and `save_pretrained` are
overridden on the instance: they hand `generate` our caches and replay each decoding step from a CUDA graph.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, WhisperForConditionalGeneration
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation import GenerationMode
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.models.whisper.modeling_whisper import WhisperAttention

from .attention import NAME, TritonAttention, is_length, report_once, why_not_covered
from .cache import StaticEncoderDecoderCache, build_static_cache
from .decoder import DecoderStep, why_not_captured

_STATE = "_whisper_triton"
_LOCK = threading.Lock()
_CALL: ContextVar[object | None] = ContextVar("whisper_triton_generate", default=None)  # the innermost `generate` call
MAX_BYTES = 8 << 30  # of caches kept for captured steps, the batch size used last always among them
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)


@dataclass
class _State:
    """What `restore` needs, kept on the model."""

    attn_implementation: str | None
    overridden: dict[str, MethodType]
    steps: OrderedDict[int, DecoderStep] = field(default_factory=OrderedDict, repr=False)  # by batch size, oldest first
    owner: object | None = None  # the `generate` call that the steps' caches belong to while it runs
    in_use: DecoderStep | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # A captured graph belongs to the weights it was captured over: a copied or unpickled model captures its own.
        return vars(self) | {"steps": OrderedDict(), "owner": None, "in_use": None}


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
        "forward": _forward,
        "generate": _generate,
        "_prepare_cache_for_generation": _prepare_cache_for_generation,
        "_prepare_static_cache": _prepare_static_cache,
        "_postprocess_outputs": _postprocess_outputs,
        "save_pretrained": _save_pretrained,
    }
    stock = model.config._attn_implementation
    for module in model.modules():
        if type(module) is WhisperAttention:
            module.__class__ = TritonAttention
            module.stock_attn_implementation = "eager" if stock == "eager" else "sdpa"
    model.config._attn_implementation = NAME
    overridden = {}
    for name, function in overrides.items():
        if name not in vars(model):  # what the user has put there before us, a compiled forward pass say, stays
            overridden[name] = MethodType(functools.wraps(getattr(type(model), name))(function), model)
            setattr(model, name, overridden[name])
    setattr(model, _STATE, _State(stock, overridden))
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
    for name, method in state.overridden.items():
        if vars(model).get(name) is method:
            delattr(model, name)
    delattr(model, _STATE)
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
    state: _State | None = vars(self).get(_STATE)
    if state is None:  # kept by somebody from before `restore`
        return _stock(self, "generate")(*args, **kwargs)
    call = object()
    with _LOCK:
        if state.owner is None:
            state.owner = call
    outer = _CALL.set(call)
    # `return_token_timestamps=True` sets eager attention and leaves it so, which would end the acceleration for good.
    attn_implementation = self.config._attn_implementation
    try:
        return _stock(self, "generate")(*args, **kwargs)
    finally:
        self.config._attn_implementation = attn_implementation
        _CALL.reset(outer)
        if state.owner is call:
            state.owner = state.in_use = None


def _forward(self: WhisperForConditionalGeneration, *args: Any, **kwargs: Any) -> Seq2SeqLMOutput | tuple[Any, ...]:
    step = None if torch.compiler.is_compiling() or args else _captured_step(self, kwargs)
    if step is None:
        return type(self).forward(self, *args, **kwargs)  # spelt out: torch.compile traces through it
    return Seq2SeqLMOutput(
        logits=step(self, kwargs["decoder_input_ids"]),
        past_key_values=step.cache,
        encoder_last_hidden_state=kwargs["encoder_outputs"][0],
    )


# What `generate` passes to a step besides ids, cache and encoder outputs, with the values that a graph covers.
_STEP_ARGUMENTS = {
    "use_cache": (True,),
    "return_dict": (True, None),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
}


def _captured_step(self: WhisperForConditionalGeneration, kwargs: dict[str, Any]) -> DecoderStep | None:
    """The step whose graph serves this forward pass, or None."""
    state: _State | None = vars(self).get(_STATE)  # None: kept, or compiled into something, from before `restore`
    step = None if state is None else state.in_use
    arguments = dict(kwargs)
    ids, cache = arguments.pop("decoder_input_ids", None), arguments.pop("past_key_values", None)
    mask = arguments.pop("decoder_attention_mask", None)
    arguments.pop("attention_mask", None)  # of the encoder's frames, which Whisper ignores
    if step is None or cache is not step.cache or arguments.pop("encoder_outputs", None) is None:
        return None
    covered = (
        ids is not None
        and ids.shape == step.input_ids.shape
        and (mask is None or is_length(mask))
        and all(cache.is_updated.values())
        and not torch.is_grad_enabled()
        and not (self.config.output_attentions or self.config.output_hidden_states)
        and all(value in _STEP_ARGUMENTS.get(name, (None,)) for name, value in arguments.items())
    )
    return step if covered else None


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
        and _takes_our_cache(self)
    )
    if covered:
        frames = model_kwargs["encoder_outputs"][0]
        model_kwargs["past_key_values"] = _cache_for(self, frames.shape[0], max_cache_length, frames.shape[1])
    else:
        _stock(self, "_prepare_cache_for_generation")(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


def _takes_our_cache(self: WhisperForConditionalGeneration) -> bool:
    head_dim = self.config.d_model // self.config.decoder_attention_heads
    return self.config._attn_implementation == NAME and why_not_covered(self.dtype, head_dim, self.device) is None


def _cache_for(
    self: WhisperForConditionalGeneration, batch_size: int, max_cache_len: int, num_frames: int
) -> StaticEncoderDecoderCache:
    """The cache of a captured step, kept from call to call, or one for this call alone."""
    state: _State = getattr(self, _STATE)
    reason = why_not_captured(self)
    if reason is not None and self.device.type == "cuda":
        report_once(f"steps are launched one kernel at a time: {reason}")
    # A call inside another, or beside it in a second thread, must not write into the other's cache.
    if reason is not None or state.owner is not _CALL.get():
        return build_static_cache(self, batch_size, max_cache_len, num_frames, is_compileable=False)
    step = state.steps.pop(batch_size, None)
    if step is None or not step.fits(self, num_frames):
        step = None  # frees the old one first
        step = DecoderStep(self, batch_size, num_frames)
    state.steps[batch_size] = step
    while len(state.steps) > 1 and sum(kept.nbytes for kept in state.steps.values()) > MAX_BYTES:
        state.steps.popitem(last=False)
    step.cache.reset()
    state.in_use = step
    return step.cache


def _prepare_static_cache(
    self: WhisperForConditionalGeneration,
    cache_implementation: str,
    batch_size: int,
    max_cache_len: int,
    prefill_chunk_size: int | None,
    model_kwargs: dict[str, Any],
) -> Cache:
    """For `cache_implementation="static"`: our cache, which `generate` compiles over."""
    if "offloaded" in cache_implementation or not _takes_our_cache(self):
        return _stock(self, "_prepare_static_cache")(
            cache_implementation, batch_size, max_cache_len, prefill_chunk_size, model_kwargs
        )
    frames = model_kwargs["encoder_outputs"][0]
    return build_static_cache(self, frames.shape[0], max_cache_len, frames.shape[1])


def _postprocess_outputs(self: WhisperForConditionalGeneration, *, seek_outputs: Any, **kwargs: Any) -> Any:
    # With `return_dict_in_generate` stock hands the cache out, copied through the host. Of a cache that the caller never
    # asked for, it gets what a dynamic one would hold: no unused slot, and no memory that the next call writes into.
    cache = None if isinstance(seek_outputs, torch.Tensor) else seek_outputs.get("past_key_values")
    is_ours = isinstance(cache, StaticEncoderDecoderCache) and not cache.is_compileable
    if is_ours and kwargs["is_shortform"] and not getattr(cache, "_is_user_defined", False):
        seek_outputs["past_key_values"] = EncoderDecoderCache(cache.to_legacy_cache())
    return _stock(self, "_postprocess_outputs")(seek_outputs=seek_outputs, **kwargs)


def _save_pretrained(self: WhisperForConditionalGeneration, *args: Any, **kwargs: Any) -> Any:
    # The name of the attention is not saved, but with `config.output_attentions` transformers saves it with eager alone.
    attn_implementation = self.config._attn_implementation
    self.config._attn_implementation = getattr(self, _STATE).attn_implementation
    try:
        return _stock(self, "save_pretrained")(*args, **kwargs)
    finally:
        self.config._attn_implementation = attn_implementation
