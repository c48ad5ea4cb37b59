"""What an accelerated model does in `generate` instead of stock: our caches, and steps replayed from a CUDA graph.

`OVERRIDES` names the methods that `accelerate` puts on a model's instance. Each falls back to the class's own method for what
it does not cover.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, WhisperForConditionalGeneration
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation import GenerationMode
from transformers.modeling_outputs import Seq2SeqLMOutput

from .attention import STATE, report_once
from .cache import CACHE_NAME, StaticEncoderDecoderCache, build_static_cache
from .coverage import (
    brings_its_length,
    has_stocks_forward,
    has_stocks_loop,
    has_stocks_methods,
    returns_tokens_alone,
    why_not_our_cache,
    why_not_our_loop,
    why_not_replayed,
    why_not_static,
    why_not_these_states,
)
from .decode_loop import STOCKS_LOOP, Logprobs, decode, mean_logprob
from .decoder import DecoderStep, fingerprint
from .early import start_encoder, whole_segment
from .encoded import ENCODED, Encoded
from .encoder import EncoderState
from .graphs import global_hooks, is_recorder
from .late import LATE, ChangedError, LateLooks, take_late_looks
from .model_state import CALL, Call, State, cache_for, kept_step, step_as_it_is
from .stand_ins import StandIn, stand_in


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
    call = Call(
        reads_last_logits=kwargs.get("custom_generate") is None,
        returns_tokens=returns_tokens_alone(self, state.overridden, args, kwargs),
        brings_its_length=brings_its_length(args, kwargs),
    )
    is_outermost = state.owner is None
    attn_implementation = self.config._attn_implementation
    outer, outer_encoded, outer_late = CALL.set(call), ENCODED.set(Encoded()), LATE.set(None)
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
                if is_outermost and _nobody_looks_on(self, state, args, kwargs):
                    LATE.set(LateLooks())
            elif self.device.type == "cuda":
                report_once(f"{STOCKS_LOOP}: {reason}")
            try:
                result = _stock(self, "generate")(*args, **kwargs)
                take_late_looks()  # in case nothing was decoded
                return result
            except ChangedError:
                pass
            # As if it had been seen before anything was replayed; what has been drawn from PyTorch's generator is kept.
            LATE.set(None)
            ENCODED.set(Encoded())
            state.in_use, self.config._attn_implementation = None, attn_implementation
            return _stock(self, "generate")(*args, **kwargs)
    finally:
        CALL.reset(outer)
        ENCODED.reset(outer_encoded)
        LATE.reset(outer_late)
        if is_outermost:
            state.owner = state.in_use = None
        # `return_token_timestamps=True` sets eager attention and leaves it so, which would end the acceleration.
        self.config._attn_implementation = attn_implementation


def _nobody_looks_on(
    self: WhisperForConditionalGeneration, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether no code of the user's runs between the start of a call and our loop, but for what ends lateness: modules."""
    encoder = self.model.encoder
    of_encoder: EncoderState | None = vars(encoder).get(STATE)
    kind = type(self)
    return (
        kind is WhisperForConditionalGeneration
        and {name: own for name, own in vars(self).items() if callable(getattr(kind, name, None))} == state.overridden
        and has_stocks_methods()
        and kwargs.get("monitor_progress") is None
        and not (kwargs.get("logits_processor") or len(args) > 2)  # which are told where each window begins
        and not (self._forward_hooks or self._forward_pre_hooks or global_hooks())
        and of_encoder is not None
        and vars(encoder).get("forward") is of_encoder.overridden.get("forward")
        and not encoder._forward_pre_hooks
        and all(map(is_recorder, encoder._forward_hooks.values()))
    )


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
    call = CALL.get() or Call()  # kept by somebody, and called by itself
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
    is_followed = not (torch.compiler.is_compiling() or args)
    detection = _detection(self, kwargs) if is_followed and kwargs.get("use_cache") is False else None
    if detection is not None:
        return detection
    step = _step_in_use(self, kwargs) if is_followed else None
    if step is not None and not any(step.cache.is_updated.values()):
        _fill_cross_cache(self, step, kwargs["encoder_outputs"][0])
    if step is None or not _is_replayed(self, step, kwargs):
        if not torch.compiler.is_compiling():
            take_late_looks()
        return type(self).forward(self, *args, **kwargs)  # spelt out: torch.compile traces through it
    return Seq2SeqLMOutput(
        logits=step(self, kwargs["decoder_input_ids"]),
        encoder_last_hidden_state=kwargs["encoder_outputs"][0],
        **{CACHE_NAME: step.cache},
    )


def _fill_cross_cache(self: WhisperForConditionalGeneration, step: DecoderStep, states: torch.Tensor) -> None:
    """From another step's, where `states` are rows of what that has projected: those that a further temperature is for."""
    encoded = ENCODED.get()
    selection = None if encoded is None else encoded.selection_of(states)
    if selection is not None:
        for other in getattr(self, STATE).steps.values():
            if other is not step and step.projections.copy(other.projections, *selection, states):
                return
    step.project(states)


def _detection(self: WhisperForConditionalGeneration, kwargs: dict[str, Any]) -> Seq2SeqLMOutput | None:
    """The pass by which `generate` detects a language, by a kept step; None where there is none, and for any other pass.

    The step's cross cache then holds the window's keys and values, which the prompt finds there.
    """
    if kwargs.keys() != {"input_features", "decoder_input_ids", "use_cache"} or CALL.get() is None or STATE not in vars(self):
        return None
    ids, features = kwargs["decoder_input_ids"], kwargs["input_features"]
    if ids.shape != (features.shape[0], 1) or self.training or torch.is_grad_enabled():
        return None
    if why_not_replayed(self, {}) is not None or not has_stocks_forward(self):
        return None
    step = kept_step(self, ids.shape[0])
    if step is None:
        return None
    states = self.model.encoder(features).last_hidden_state
    step.project(states)
    if not all(step.cache.is_updated.values()):
        return None
    logits = step(self, ids)
    take_late_looks()  # stock waits for the answer, and the GPU has the window to encode
    return Seq2SeqLMOutput(logits=logits, encoder_last_hidden_state=states)


def _step_in_use(self: WhisperForConditionalGeneration, kwargs: dict[str, Any]) -> DecoderStep | None:
    """The step over whose cache `generate` makes this forward pass, or None."""
    state: State | None = vars(self).get(STATE)  # None: kept, or compiled into something, from before `restore`
    step = None if state is None else state.in_use
    if step is None or kwargs.get(CACHE_NAME) is not step.cache or kwargs.get("encoder_outputs") is None:
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
    call = CALL.get()
    if call is not None:
        call.streams.begin_window()
    segment = whole_segment(*args, **kwargs)
    return _stock(self, "_get_input_segment")(*args, **kwargs) if segment is None else segment


def _prepare_model_inputs(self: WhisperForConditionalGeneration, *args: Any, **kwargs: Any) -> tuple[Any, Any, dict[str, Any]]:
    inputs, name, model_kwargs = _stock(self, "_prepare_model_inputs")(*args, **kwargs)
    call = CALL.get()
    if call is not None:
        is_heard = name == "input_features" and model_kwargs.get("encoder_outputs") is None
        call.streams.hear(inputs if is_heard else None)
    return inputs, name, model_kwargs


def _prepare_decoder_input_ids_for_generation(
    self: WhisperForConditionalGeneration, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    ids, model_kwargs = _stock(self, "_prepare_decoder_input_ids_for_generation")(*args, **kwargs)
    call = CALL.get()
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
    reason, call = why_not_our_cache(self, generation_config, model_kwargs, generation_mode, batch_size), CALL.get()
    if call is None:
        reason = reason or "the class's generate is called, past the model's"  # and hands out its cache
    elif call.brings_its_length:
        reason = reason or "there is a length among the stopping criteria"
    elif call.rows != batch_size:
        reason = reason or f"decoder_input_ids have {call.rows} rows, the encoder's outputs {batch_size}"
    if reason is None:
        frames = model_kwargs["encoder_outputs"][0]
        found = step_as_it_is(self, frames.shape[0])
        if found is None:
            found = fingerprint(self)
            reason = why_not_static(self, is_known=found == getattr(self, STATE).captured)
        if reason is None:
            model_kwargs[CACHE_NAME] = cache_for(self, found, frames.shape[0], max_cache_length, frames.shape[1])
            return
    if model_kwargs.get(CACHE_NAME) is not None:  # of any class, and ours may be compiled over
        report_once("steps are not replayed: generate runs over the cache that it was given")
    elif reason != "cache_implementation='static'":  # which ends in `_prepare_static_cache`
        _report_stocks_cache(reason)
    _stock(self, "_prepare_cache_for_generation")(
        generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    )


def _report_stocks_cache(reason: str) -> None:
    report_once(f"generate runs over stock's cache, one kernel at a time: {reason}")


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
    cache = None if isinstance(seek_outputs, torch.Tensor) else seek_outputs.get(CACHE_NAME)
    is_ours = isinstance(cache, StaticEncoderDecoderCache) and not cache.is_compileable
    if is_ours and kwargs["is_shortform"] and not getattr(cache, "_is_user_defined", False):
        seek_outputs[CACHE_NAME] = EncoderDecoderCache(cache.to_legacy_cache())
    scores = None if isinstance(seek_outputs, torch.Tensor) else seek_outputs.get("scores")
    has_our_scores = bool(scores) and isinstance(scores[0], Logprobs)
    sequences, outputs = _stock(self, "_postprocess_outputs")(seek_outputs=seek_outputs, **kwargs)
    call = CALL.get()
    if call is not None and call.returns_tokens and (isinstance(seek_outputs, torch.Tensor) or has_our_scores):
        # In one copy; what stock asks of each row, its end, its timestamps, would wait for the GPU each time. But the mean of
        # stock's own scores is computed where the tokens are.
        call.tokens_device, sequences = sequences.device, sequences.cpu()
    return sequences, outputs


def _retrieve_segment(
    self: WhisperForConditionalGeneration, seek_sequence: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[list[dict[str, Any]], Any]:
    segments, offset = _stock(self, "_retrieve_segment")(seek_sequence, *args, **kwargs)
    call = CALL.get()
    if call is not None and call.tokens_device is not None:  # nobody sees more of segments than their tokens
        tokens, first = seek_sequence.to(call.tokens_device), segments[0]["idxs"][0]
        for segment in segments:
            start, end = segment["idxs"]
            segment["tokens"] = tokens[start - first : end - first]
    return segments, offset


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
    "_retrieve_segment": _retrieve_segment,
    "_need_fallback": _need_fallback,
    "save_pretrained": _save_pretrained,
}
