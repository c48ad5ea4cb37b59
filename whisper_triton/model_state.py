"""What an accelerated model keeps from call to call of `generate`, and what is known of the call that runs.

Kept are the steps captured for it, one a batch size, with the caches that they own. A call gets the one of its batch size, made
or emptied for it; `cache_for` says when there is none.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from transformers import WhisperForConditionalGeneration

from .attention import STATE, report_once
from .cache import StaticEncoderDecoderCache, build_static_cache
from .coverage import why_not_static
from .decoder import DecoderStep, cache_bytes, fingerprint, why_not_captured
from .encoder import EncoderState
from .graphs import make_room
from .late import LATE, is_so
from .streams import RandomStreams

MAX_BYTES = 8 << 30  # of caches and graphs kept for captured steps; a step that is larger by itself is kept alone
MIN_SLOTS = 128  # of a step's self cache
CALL: ContextVar[Call | None] = ContextVar("whisper_triton_generate", default=None)  # the innermost `generate` call


@dataclass(eq=False)
class Call:
    """A `generate` call that is running."""

    # Of a prompt. All of transformers' own decoding methods that get our cache do; one of the user's may want the others too.
    reads_last_logits: bool = False
    returns_tokens: bool = False  # and nobody sees more of it, though stock may ask for more itself
    brings_its_length: bool = False  # which the cache's length does not follow
    streams: RandomStreams = field(default_factory=RandomStreams)
    tokens_device: torch.device | None = None  # of a window's tokens, where stock is given them on the host
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
    owner: Call | None = None  # the outermost call that is running: the one that the steps' caches belong to
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


def cache_for(
    model: WhisperForConditionalGeneration, found: tuple[object, ...], batch_size: int, max_cache_len: int, num_frames: int
) -> StaticEncoderDecoderCache:
    """The cache of a captured step, kept from call to call, or one for this call alone; `found`: the model's fingerprint."""
    step = _step_for(model, found, batch_size, max_cache_len, num_frames)
    if step is None:
        return build_static_cache(model, batch_size, max_cache_len, num_frames, is_compileable=False)
    return step.cache


def _step_for(
    model: WhisperForConditionalGeneration, found: tuple[object, ...], batch_size: int, max_cache_len: int, num_frames: int
) -> DecoderStep | None:
    """The step of this call, emptied, which is then in use; None where there can be none, of which the log tells on a GPU."""
    state: State = getattr(model, STATE)
    reason = None if found == state.captured else why_not_captured(model)
    state.captured = found if reason is None else None
    if reason is not None and model.device.type == "cuda":
        report_once(f"steps are launched one kernel at a time: {reason}")
    # A call inside another must not write into the other's cache.
    if state.owner is not CALL.get():
        if reason is None:
            report_once("steps are launched one kernel at a time: another call of the model's `generate` is running")
        return None
    state.in_use = None  # this call's last window, or its last temperature
    state.forget(*[size for size, step in state.steps.items() if reason is not None or step.fingerprint != found])
    if reason is not None:
        return None
    num_slots = slots_for(max_cache_len, model.config.max_target_positions)
    kept = state.steps.get(batch_size)
    if kept is not None and (kept.num_frames != num_frames or kept.num_slots < num_slots):
        state.forget(batch_size)  # its memory first
    if batch_size not in state.steps and not _add_step(model, state, batch_size, num_frames, num_slots):
        return None
    state.steps.move_to_end(batch_size)
    make_room(state.steps, 0, MAX_BYTES, state.forget, in_use=batch_size)  # graphs that were captured since
    state.in_use = step = state.steps[batch_size]
    step.reset()
    return step


def step_as_it_is(model: WhisperForConditionalGeneration, batch_size: int) -> tuple[object, ...] | None:
    """The fingerprint of the step kept for this batch size, if it may be replayed before anybody looks whether it still is the
    model's: that is then put off. Else None.
    """
    state: State = getattr(model, STATE)
    step = state.steps.get(batch_size)
    if LATE.get() is None or step is None or state.captured != step.fingerprint or step.encoder_states.device != model.device:
        return None
    if not step.has_its_memory():
        return None
    is_so(lambda: step.fingerprint == fingerprint(model) and why_not_static(model, is_known=True) is None)
    return step.fingerprint


def kept_step(model: WhisperForConditionalGeneration, batch_size: int) -> DecoderStep | None:
    """The step that an earlier call of `generate` has left for this batch size, emptied, if a graph of it is what a pass of the
    model would do now, as far as is known before late looks; None if this call decodes a window already.
    """
    state: State = getattr(model, STATE)
    step = state.steps.get(batch_size)
    if step is None or state.in_use is not None or state.owner is not CALL.get():
        return None
    if step_as_it_is(model, batch_size) is None:
        is_known = state.captured == step.fingerprint == fingerprint(model)
        if not is_known or why_not_static(model, is_known) is not None:
            return None
    step.reset()
    return step


def slots_for(length: int, most: int) -> int:
    """Of a step's self cache, for calls of so many tokens: the next of 128, 256 and so on, `most` at most.

    So calls of few tokens take hardly more memory than stock's. One that wants more has the step captured anew, with more slots
    for as long as the step is kept.
    """
    slots = MIN_SLOTS
    while slots < length:
        slots *= 2
    return min(slots, most)


def _add_step(model: WhisperForConditionalGeneration, state: State, batch_size: int, num_frames: int, num_slots: int) -> bool:
    """Whether there is memory for another step."""
    make_room(state.steps, cache_bytes(model, batch_size, num_frames, num_slots), MAX_BYTES, state.forget)
    try:
        state.steps[batch_size] = DecoderStep(model, batch_size, num_frames, num_slots)
    except torch.OutOfMemoryError:
        report_once("steps are launched one kernel at a time: out of memory for caches that could be kept")
        state.forget(*state.steps)
    return batch_size in state.steps
