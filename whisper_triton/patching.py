"""`accelerate` and `restore`: puts our attention and caches into one model, in place, and takes them out again.

Nothing of transformers is rebound. Of the model's instance, the attention modules change class (parameters, hooks and
submodules stay), the config names our attention, and the methods that `generation.OVERRIDES` names are overridden, and of its
encoder's instance those of `encoder.ENCODER_OVERRIDES`.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperEncoder

from .attention import NAME, STATE, TritonAttention
from .encoder import ENCODER_OVERRIDES, EncoderState
from .fused_encoder import unpack_encoder
from .generation import OVERRIDES
from .model_state import CallLock, State

_ACCELERATED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_LOCK = threading.Lock()  # of what models may share, and of `accelerate` in two threads


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` has been applied to `model` and not been undone.

    Not so of a pickled model: its overridden methods come back as the class's own. `accelerate` completes it.

    Raises:
        TypeError: anything but a module.
    """
    _check_module(model, "is_accelerated")
    state: State | None = vars(model).get(STATE)
    return state is not None and not any(
        getattr(method, "__func__", method) is getattr(type(model), name)  # a static one comes back as a function
        for name, method in state.overridden.items()
    )


def accelerate(model: WhisperForConditionalGeneration) -> WhisperForConditionalGeneration:
    """Puts the package's kernels under `model`, in place, and returns it; again on an accelerated model does nothing.

    `generate`, `pipeline`, `state_dict`, `save_pretrained` work as before. `restore` undoes it exactly. Another attention that
    is set afterwards, by `set_attn_implementation`, is what runs until "whisper_triton" is set.

    Raises:
        TypeError: anything but a `WhisperForConditionalGeneration`.
    """
    if not isinstance(model, WhisperForConditionalGeneration):
        raise TypeError(f"accelerate takes a WhisperForConditionalGeneration, got {type(model).__name__}")
    if is_accelerated(model):
        return model
    restore(model)  # what is left of a pickled one
    with _LOCK:
        if not is_accelerated(model):
            _accelerate(model)
    return model


def _accelerate(model: WhisperForConditionalGeneration) -> None:
    stock, lock = model.config._attn_implementation, CallLock()
    for other in _sharing_config(model):
        stock, lock = getattr(other, STATE).attn_implementation, getattr(other, STATE).lock
    for module in model.modules():
        if type(module) is WhisperAttention:
            module.__class__ = TritonAttention
            # None, of a model that has our attention by name: `_stock_attention` takes eager where weights are asked for.
            module.stock_attn_implementation = None if stock == NAME else "eager" if stock == "eager" else "sdpa"
    model.config._attn_implementation = NAME
    encoder, encoder_state = model.model.encoder, None
    if isinstance(encoder, WhisperEncoder) and STATE not in vars(encoder):  # which two models may share
        encoder_state = EncoderState(_override(encoder, ENCODER_OVERRIDES))
        setattr(encoder, STATE, encoder_state)
    setattr(model, STATE, State(stock, _override(model, OVERRIDES), encoder_state, lock))
    _ACCELERATED.add(model)


def restore(model: WhisperForConditionalGeneration) -> WhisperForConditionalGeneration:
    """Undoes `accelerate`, in place, and returns the model; does nothing to one that is not accelerated.

    Waits for `generate` where another thread runs it. An attention that was set since, by `set_attn_implementation`, stays.

    Raises:
        RuntimeError: called from within `generate` of this model, by a streamer, say. The model stays accelerated.
        TypeError: anything but a module.
    """
    _check_module(model, "restore")
    state: State | None = vars(model).get(STATE)
    if state is None:
        return model
    with state.lock:
        if state.owner is not None:
            raise RuntimeError("restore cannot undo the acceleration of a model within a call of its generate")
        state.forget(*state.steps)
        with _LOCK:
            if vars(model).get(STATE) is state:  # or another thread has restored it
                _restore(model, state)
    return model


def _restore(model: WhisperForConditionalGeneration, state: State) -> None:
    for module in model.modules():
        if type(module) is TritonAttention and hasattr(module, "stock_attn_implementation"):
            module.__class__ = WhisperAttention
            del module.stock_attn_implementation
    encoder = model.model.encoder
    if state.encoder is not None and vars(encoder).get(STATE) is state.encoder:
        for graph in state.encoder.graphs.values():  # one may run, of a call that was refused
            graph.wait()
        _take_back(encoder, state.encoder.overridden)
        unpack_encoder(encoder)
    _take_back(model, state.overridden)
    _ACCELERATED.discard(model)
    # Another name there is what the user has chosen since.
    if not _sharing_config(model) and model.config._attn_implementation == NAME:
        model.config._attn_implementation = state.attn_implementation


def _check_module(model: object, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} takes a model, got {type(model).__name__}")


@contextmanager
def accelerated(model: WhisperForConditionalGeneration) -> Iterator[WhisperForConditionalGeneration]:
    """`accelerate` for a block; a model that was accelerated before it stays so."""
    was_accelerated = isinstance(model, nn.Module) and is_accelerated(model)
    accelerate(model)  # which refuses all else
    try:
        yield model
    finally:
        if not was_accelerated:
            restore(model)


def _override(module: nn.Module, functions: dict[str, Callable[..., Any]]) -> dict[str, MethodType]:
    """Puts `functions` on this instance as its methods; what the user has put there before us stays."""
    methods = {name: _bind(module, name, function) for name, function in functions.items() if name not in vars(module)}
    for name, method in methods.items():
        setattr(module, name, method)
    return methods


def _take_back(module: nn.Module, methods: dict[str, MethodType]) -> None:
    for name, method in methods.items():
        if vars(module).get(name) is method:
            delattr(module, name)
        if vars(module).get("_old_forward") is method:  # a hook of the package accelerate was put around it
            module._old_forward = MethodType(type(module).forward, module)
    delattr(module, STATE)


def _bind(model: nn.Module, name: str, function: Callable[..., Any]) -> MethodType:
    """`function` as a method of this instance, with the signature of what it overrides."""

    overridden = getattr(type(model), name)

    @functools.wraps(overridden)  # of a function of its own: another model's class may differ
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    # Which `inspect` finds there by itself, but transformers asks for it six times a call.
    signature = inspect.signature(overridden)
    if isinstance(inspect.getattr_static(type(model), name), staticmethod):
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        signature = signature.replace(parameters=[itself, *signature.parameters.values()])
    method.__signature__ = signature
    return MethodType(method, model)


def _sharing_config(model: nn.Module) -> list[nn.Module]:
    """The other accelerated models whose config is this model's too: it names one attention for all of them."""
    return [other for other in _ACCELERATED if other is not model and other.config is model.config]
