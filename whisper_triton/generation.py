"""What an accelerated model does in `generate` instead of stock: our caches, and steps replayed from a CUDA graph.

`OVERRIDES` names the methods that `accelerate` puts on a model's instance. Each falls back to the class's own method for what
it does not cover.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, WhisperForConditionalGeneration
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation import GenerationMode
from transformers.modeling_outputs import Seq2SeqLMOutput

from .attention import STATE, report_once
from .cache import StaticEncoderDecoderCache, build_static_cache
from .coverage import (
    brings_its_length,
    has_stocks_forward,
    has_stocks_loop,
    returns_tokens_alone,
    why_not_our_cache,
    why_not_our_loop,
    why_not_replayed,
    why_not_static,
    why_not_these_states,
)
from .decode_loop import STOCKS_LOOP, Logprobs, decode, mean_logprob
from .decoder import DecoderStep, cache_bytes, fingerprint, why_not_captured
from .early import start_encoder, whole_segment
from .encoded import ENCODED, Encoded
from .encoder import EncoderState
from .graphs import make_room
from .stand_ins import StandIn, stand_in
from .streams import RandomStreams

MAX_BYTES = 8 << 30  # of caches and graphs kept for captured steps; a step that is larger by itself is kept alone
MIN_SLOTS = 128  # of a step's self cache
_CALL: ContextVar[_Call | None] = ContextVar("whisper_triton_generate", default=None)  # the innermost `generate` call


@dataclass(eq=False)
class _Call:
    """A `generate` call that is running."""

    # Of a prompt. All of transformers' own decoding methods that get our cache do; one of the user's may want the others too.
    reads_last_logits: bool = False
    returns_tokens: bool = False  # and nobody sees more of it, though stock may ask for more itself
    brings_its_length: bool = False  # which the cache's length does not follow
    streams: RandomStreams = field(default_factory=RandomStreams)
    rows: int = 0  # of this window's prompt, before each is there for all of its beams


class CallLock:
    """Held by the thread in which `generate` runs, nested calls included; the others wait. A copied model has its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            report_once("generate waits for a call of the same model in another thread")
            self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[CallLock], tuple[()]]:
        return CallLock, ()


@dataclass
class State:
    """What an accelerated model carries: what `restore` needs, and the steps captured for it."""

    attn_implementation: str | None
    overridden: dict[str, MethodType]
    encoder: EncoderState | None  # None where the encoder is another model's, or none of Whisper's
    lock: CallLock  # one for all models of one config, which names the attention for all of them
    steps: OrderedDict[int, DecoderStep] = field(default_factory=OrderedDict, repr=False)  # by batch size, oldest first
    owner: _Call | None = None  # the outermost call that is running: the one that the steps' caches belong to
    in_use: DecoderStep | None = field(default=None, repr=False)
    captured: tuple[object, ...] | None = field(default=None, repr=False)  # the fingerprint of what can be, as last seen
    # The attributes of a configuration in which stock found no settings of `generate`, with whether each was None.
    without_settings: tuple[tuple[str, bool], ...] | None = field(default=None, repr=False)
    done: torch.cuda.Event | None = field(default=None, repr=False)  # after all that calls have had the GPU do

    def __getstate__(self) -> dict[str, Any]:
        # A captured graph belongs to the weights it was captured over: a copied model captures its own.
        return vars(self) | {"steps": OrderedDict(), "owner": None, "in_use": None, "captured": None, "done": None}

    def forget(self, *sizes: int) -> None:
        """Gives up the steps of these batch sizes. Waits for the GPU, which may still be at one of them, in the stream of an
        earlier call or in this one's.
        """
        if sizes and self.done is not None:
            self.done.synchronize()
        for size in sizes:
            device = self.steps[size].encoder_states.device
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
            del self.steps[size]


def _stock(model: WhisperForConditionalGeneration, name: str) -> Callable[..., Any]:
    stock = next(vars(kind)[name] for kind in type(model).__mro__ if name in vars(kind))  # as it is: one is static
    return stock.__get__(model, type(model))


def _generate(self: WhisperForConditionalGeneration, *args: Any, **kwargs: Any) -> Any:
    state: State | None = vars(self).get(STATE)
    if state is None:  # kept by somebody from before `restore`
        return _stock(self, "generate")(*args, **kwargs)
    with state.lock:
        if vars(self).get(STATE) is state:
            return _generate_alone(self, state, args, kwargs)
    return _generate(self, *args, **kwargs)  # restored by another thread while this one waited


def _generate_alone(self: WhisperForConditionalGeneration, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _Call(
        reads_last_logits=kwargs.get("custom_generate") is None,
        returns_tokens=returns_tokens_alone(self, state.overridden, args, kwargs),
        brings_its_length=brings_its_length(args, kwargs),
    )
    is_outermost = state.owner is None
    attn_implementation = self.config._attn_implementation
    outer, outer_encoded = _CALL.set(call), ENCODED.set(Encoded())
    try:
        if is_outermost:
            state.owner = call
            for step in state.steps.values():
                step.forget_states()
        with _on_device(self.device, state):
            start_encoder(self, state.overridden, args, kwargs)
            reason = why_not_our_loop(self, args, kwargs)
            if reason is None:
                kwargs["custom_generate"] = _decode
            elif self.device.type == "cuda":
                report_once(f"{STOCKS_LOOP}: {reason}")
            return _stock(self, "generate")(*args, **kwargs)
    finally:
        _CALL.reset(outer)
        ENCODED.reset(outer_encoded)
        if is_outermost:
            state.owner = state.in_use = None
        # `return_token_timestamps=True` sets eager attention and leaves it so, which would end the acceleration.
        self.config._attn_implementation = attn_implementation


@contextmanager
def _on_device(device: torch.device, state: State) -> Iterator[None]:
    """For a call of `generate`: its GPU is the current one, and its work comes after that of the calls before it."""
    if device.type != "cuda":
        yield
        return
    # Triton launches on the current device, whichever one the tensors are on.
    with torch.cuda.device(device):
        if state.done is not None:  # in another stream, perhaps
            torch.cuda.current_stream().wait_event(state.done)
        try:
            yield
        finally:  # after an error too: replays may be queued that write what the next call begins with
            state.done = torch.cuda.Event()
            state.done.record()


def _decode(self: WhisperForConditionalGeneration, input_ids: torch.Tensor, **kwargs: Any) -> Any:
    state: State | None = vars(self).get(STATE)
    # What a user has put around or in place of the forward pass, or of what prepares it, a replay would not see.
    is_plain = state is not None and has_stocks_loop(self, state.overridden)
    step = None if state is None else state.in_use
    if step is not None and not is_plain:
        report_once(f"{STOCKS_LOOP}: the model has hooks, or methods that are not transformers'")
    call = _CALL.get() or _Call()  # kept by somebody, and called by itself
    return decode(
        self,
        step if is_plain else None,
        input_ids,
        returns_tokens=call.returns_tokens,
        streams=call.streams,
        **kwargs,
    )


_decode.__signature__ = inspect.signature(_decode)  # for which transformers asks twice a call, with the GPU idle


def _forward(self: WhisperForConditionalGeneration, *args: Any, **kwargs: Any) -> Seq2SeqLMOutput | tuple[Any, ...]:
    step = None if torch.compiler.is_compiling() or args else _step_in_use(self, kwargs)
    if step is not None and not any(step.cache.is_updated.values()):
        step.project(kwargs["encoder_outputs"][0])
    if step is None or not _is_replayed(self, step, kwargs):
        return type(self).forward(self, *args, **kwargs)  # spelt out: torch.compile traces through it
    return Seq2SeqLMOutput(
        logits=step(self, kwargs["decoder_input_ids"]),
        past_key_values=step.cache,
        encoder_last_hidden_state=kwargs["encoder_outputs"][0],
    )


def _step_in_use(self: WhisperForConditionalGeneration, kwargs: dict[str, Any]) -> DecoderStep | None:
    """The step over whose cache `generate` makes this forward pass, or None."""
    state: State | None = vars(self).get(STATE)  # None: kept, or compiled into something, from before `restore`
    step = None if state is None else state.in_use
    if step is None or kwargs.get("past_key_values") is not step.cache or kwargs.get("encoder_outputs") is None:
        return None
    if not has_stocks_forward(self):
        report_once("steps are not replayed: the model's class has another forward pass")
        return None
    return None if torch.is_grad_enabled() else step


def _is_replayed(self: WhisperForConditionalGeneration, step: DecoderStep, kwargs: dict[str, Any]) -> bool:
    """Whether a graph of the step serves this forward pass."""
    ids, owner = kwargs.get("decoder_input_ids"), getattr(self, STATE).owner
    if ids is None or ids.dim() != 2 or ids.shape[0] != step.encoder_states.shape[0] or ids.shape[1] < 1:
        return False
    T, reason = ids.shape[1], why_not_replayed(self, kwargs)
    if reason is not None and T == 1:  # a prompt is in the modules' hands wherever no graph takes it
        report_once(f"steps are launched one kernel at a time: {reason}")
    return (
        reason is None
        and all(step.cache.is_updated.values())
        # A prompt's graph returns its last token's logits alone.
        and (T == 1 or (owner is not None and owner.reads_last_logits))
        and step.takes(self, T)
    )


def _prepare_generation_config(
    self: WhisperForConditionalGeneration, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Stock's, in less time, and without its look for settings of `generate` in the model's configuration where an earlier call
    found none.

    transformers 5.17 builds a whole default configuration for it, a millisecond a call before the GPU has anything to do (5.23
    does not). What it finds depends on which attributes there are, and which are None.
    """
    state: State | None = vars(self).get(STATE)  # None: a method kept from before `restore`
    # A class's own method may call `super()`, which takes no stand-in.
    if state is None or type(self)._prepare_generation_config is not GenerationMixin._prepare_generation_config:
        return _stock(self, "_prepare_generation_config")(generation_config, *args, **kwargs)
    attributes, found = {"generation_config": stand_in(self.generation_config)}, None
    if generation_config is None:
        found = tuple((name, value is None) for name, value in vars(self.config).items())
        if state.without_settings == found and "_get_generation_parameters" not in vars(self.config):
            # `dict`: called, it returns those found, none. The configuration itself may be others' at the same time.
            attributes["config"] = StandIn(self.config, _get_generation_parameters=dict)
    model = StandIn(self, **attributes)
    prepared = GenerationMixin._prepare_generation_config(model, stand_in(generation_config), *args, **kwargs)
    if found is not None:
        state.without_settings = found
    return prepared


def _get_input_segment(self: WhisperForConditionalGeneration, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    call = _CALL.get()
    if call is not None:
        call.streams.begin_window()
    segment = whole_segment(*args, **kwargs)
    return _stock(self, "_get_input_segment")(*args, **kwargs) if segment is None else segment


def _prepare_model_inputs(self: WhisperForConditionalGeneration, *args: Any, **kwargs: Any) -> tuple[Any, Any, dict[str, Any]]:
    inputs, name, model_kwargs = _stock(self, "_prepare_model_inputs")(*args, **kwargs)
    call = _CALL.get()
    if call is not None:
        is_heard = name == "input_features" and model_kwargs.get("encoder_outputs") is None
        call.streams.hear(inputs if is_heard else None)
    return inputs, name, model_kwargs


def _prepare_decoder_input_ids_for_generation(
    self: WhisperForConditionalGeneration, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    ids, model_kwargs = _stock(self, "_prepare_decoder_input_ids_for_generation")(*args, **kwargs)
    call = _CALL.get()
    if call is not None:
        call.rows = ids.shape[0]
    return ids, model_kwargs


def _prepare_cache_for_generation(
    self: WhisperForConditionalGeneration,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    generation_mode: GenerationMode,
    batch_size: int,
    max_cache_length: int,
) -> None:
    state: State | None = vars(self).get(STATE)  # None: a method kept from before `restore`
    found = None if state is None else fingerprint(self)
    is_known = state is not None and found == state.captured
    reason, call = why_not_our_cache(self, generation_config, model_kwargs, generation_mode, batch_size, is_known), _CALL.get()
    if call is None:
        reason = reason or "the class's generate is called, past the model's"  # and hands out its cache
    elif call.brings_its_length:
        reason = reason or "there is a length among the stopping criteria"
    elif call.rows != batch_size:
        reason = reason or f"decoder_input_ids have {call.rows} rows, the encoder's outputs {batch_size}"
    if reason is None:
        frames = model_kwargs["encoder_outputs"][0]
        model_kwargs["past_key_values"] = _cache_for(self, found, frames.shape[0], max_cache_length, frames.shape[1])
        return
    if model_kwargs.get("past_key_values") is not None:  # of any class, and ours may be compiled over
        report_once("steps are not replayed: generate runs over the cache that it was given")
    elif reason != "cache_implementation='static'":  # which ends in `_prepare_static_cache`
        _report_stocks_cache(reason)
    _stock(self, "_prepare_cache_for_generation")(
        generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    )


def _report_stocks_cache(reason: str) -> None:
    report_once(f"generate runs over stock's cache, one kernel at a time: {reason}")


def _cache_for(
    self: WhisperForConditionalGeneration, found: tuple[object, ...], batch_size: int, max_cache_len: int, num_frames: int
) -> StaticEncoderDecoderCache:
    """The cache of a captured step, kept from call to call, or one for this call alone; `found`: the model's fingerprint."""
    state: State = getattr(self, STATE)
    reason = None if found == state.captured else why_not_captured(self)
    state.captured = found if reason is None else None
    if reason is not None and self.device.type == "cuda":
        report_once(f"steps are launched one kernel at a time: {reason}")
    # A call inside another must not write into the other's cache.
    if state.owner is not _CALL.get():
        if reason is None:
            report_once("steps are launched one kernel at a time: another call of the model's `generate` is running")
        return build_static_cache(self, batch_size, max_cache_len, num_frames, is_compileable=False)
    state.in_use = None  # this call's last window, or its last temperature
    state.forget(*[size for size, step in state.steps.items() if reason is not None or step.fingerprint != found])
    if reason is not None:
        return build_static_cache(self, batch_size, max_cache_len, num_frames, is_compileable=False)
    num_slots = slots_for(max_cache_len, self.config.max_target_positions)
    kept = state.steps.get(batch_size)
    if kept is not None and (kept.num_frames != num_frames or kept.num_slots < num_slots):
        state.forget(batch_size)  # its memory first
    if batch_size not in state.steps and not _add_step(self, state, batch_size, num_frames, num_slots):
        return build_static_cache(self, batch_size, max_cache_len, num_frames, is_compileable=False)
    state.steps.move_to_end(batch_size)
    make_room(state.steps, 0, MAX_BYTES, state.forget, in_use=batch_size)  # graphs that were captured since
    state.in_use = step = state.steps[batch_size]
    step.reset()
    return step.cache


def slots_for(length: int, most: int) -> int:
    """Of a step's self cache, for calls of so many tokens: the next of 128, 256 and so on, `most` at most.

    So calls of few tokens take hardly more memory than stock's. One that wants more has the step captured anew, with more slots
    for as long as the step is kept.
    """
    slots = MIN_SLOTS
    while slots < length:
        slots *= 2
    return min(slots, most)


def _add_step(self: WhisperForConditionalGeneration, state: State, batch_size: int, num_frames: int, num_slots: int) -> bool:
    """Whether there is memory for another step."""
    make_room(state.steps, cache_bytes(self, batch_size, num_frames, num_slots), MAX_BYTES, state.forget)
    try:
        state.steps[batch_size] = DecoderStep(self, batch_size, num_frames, num_slots)
    except torch.OutOfMemoryError:
        report_once("steps are launched one kernel at a time: out of memory for caches that could be kept")
        state.forget(*state.steps)
    return batch_size in state.steps


def _prepare_static_cache(
    self: WhisperForConditionalGeneration,
    cache_implementation: str,
    batch_size: int,
    max_cache_len: int,
    prefill_chunk_size: int | None,
    model_kwargs: dict[str, Any],
) -> Cache:
    """For `cache_implementation="static"`: our cache, which `generate` compiles over."""
    frames = model_kwargs["encoder_outputs"][0]
    reason = f"cache_implementation={cache_implementation!r}" if "offloaded" in cache_implementation else why_not_static(self)
    reason = reason or why_not_these_states(frames, batch_size)
    if reason is not None:
        _report_stocks_cache(reason)
        return _stock(self, "_prepare_static_cache")(
            cache_implementation, batch_size, max_cache_len, prefill_chunk_size, model_kwargs
        )
    # As stock does: a cache no shorter than the last one, so that the compiled forward pass need not be compiled anew.
    max_cache_len = max(max_cache_len, getattr(self, "_previous_max_cache_length", -1))
    self._previous_max_cache_length = max_cache_len
    return build_static_cache(self, frames.shape[0], max_cache_len, frames.shape[1])


def _postprocess_outputs(self: WhisperForConditionalGeneration, *, seek_outputs: Any, **kwargs: Any) -> Any:
    # With `return_dict_in_generate` stock hands the cache out, copied through the host. Of a cache that the caller never
    # asked for, it gets what a dynamic one would hold: no unused slot, and no memory that the next call writes into.
    cache = None if isinstance(seek_outputs, torch.Tensor) else seek_outputs.get("past_key_values")
    is_ours = isinstance(cache, StaticEncoderDecoderCache) and not cache.is_compileable
    if is_ours and kwargs["is_shortform"] and not getattr(cache, "_is_user_defined", False):
        seek_outputs["past_key_values"] = EncoderDecoderCache(cache.to_legacy_cache())
    return _stock(self, "_postprocess_outputs")(seek_outputs=seek_outputs, **kwargs)


def _need_fallback(
    self: WhisperForConditionalGeneration, seek_sequence: torch.Tensor, seek_outputs: Any, index: int, *args: Any, **kwargs: Any
) -> tuple[bool, bool]:
    outputs = seek_outputs[index]
    scores = outputs.get("scores") if isinstance(outputs, dict) else None
    if scores and isinstance(scores[0], Logprobs):
        # Then the class's own is transformers', see `returns_tokens_alone`.
        model = StandIn(self, _retrieve_avg_logprobs=mean_logprob)
        return type(self)._need_fallback(model, seek_sequence, seek_outputs, index, *args, **kwargs)
    return _stock(self, "_need_fallback")(seek_sequence, seek_outputs, index, *args, **kwargs)


def _save_pretrained(self: WhisperForConditionalGeneration, *args: Any, **kwargs: Any) -> Any:
    state: State | None = vars(self).get(STATE)
    if state is None:  # kept by somebody from before `restore`
        return _stock(self, "save_pretrained")(*args, **kwargs)
    # The name of the attention is not saved, but with `config.output_attentions` transformers saves it with eager alone.
    attn_implementation = self.config._attn_implementation
    self.config._attn_implementation = state.attn_implementation
    try:
        return _stock(self, "save_pretrained")(*args, **kwargs)
    finally:
        self.config._attn_implementation = attn_implementation


OVERRIDES: dict[str, Callable[..., Any]] = {
    "forward": _forward,
    "generate": _generate,
    "_prepare_generation_config": _prepare_generation_config,
    "_get_input_segment": _get_input_segment,
    "_prepare_model_inputs": _prepare_model_inputs,
    "_prepare_decoder_input_ids_for_generation": _prepare_decoder_input_ids_for_generation,
    "_prepare_cache_for_generation": _prepare_cache_for_generation,
    "_prepare_static_cache": _prepare_static_cache,
    "_postprocess_outputs": _postprocess_outputs,
    "_need_fallback": _need_fallback,
    "save_pretrained": _save_pretrained,
}
