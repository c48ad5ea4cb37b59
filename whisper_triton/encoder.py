"""The encoder as a CUDA graph: log-mel features in, hidden states out, for one batch size.

Launched one by one, the hundreds of kernels of a large encoder would keep a GPU waiting at batch 1, so they are captured once
and replayed. A graph belongs to one encoder and shape of features, and is kept from call to call. `ENCODER_OVERRIDES` names the
method that `accelerate` puts on an encoder's instance; it falls back to the class's own for what no graph covers. Features that
come again within a call of `generate` are not encoded again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperEncoder, WhisperEncoderLayer

from .attention import NAME, STATE, TritonAttention, report_once
from .encoded import ENCODED
from .fused_encoder import FusedEncoder
from .graphs import (
    CAPTURES,
    NotCaptured,
    add_fingerprint,
    capture,
    global_hooks,
    make_room,
    modules_of,
    places_of,
    why_not_known,
)
from .kernels import backend
from .kernels._checks import DTYPES
from .kernels._dispatch import failed_gpus
from .late import end_lateness, is_so

MAX_BYTES = 8 << 30  # of memory kept for graphs; one that is larger by itself is kept alone
_LOCK = threading.RLock()
# Modules whose forward pass we do not know might do something else a call, which a graph does not, nor states kept from before.
_KNOWN_MODULES = frozenset((
    WhisperEncoder, WhisperEncoderLayer, WhisperAttention, TritonAttention, GELUActivation,
    nn.ModuleList, nn.LayerNorm, nn.Linear, nn.Conv1d, nn.Embedding,
))  # fmt: skip


def why_not_captured(encoder: WhisperEncoder) -> str | None:
    """Why a pass of `encoder` cannot be replayed from a graph, or None."""
    device, dtype = encoder.device, encoder.dtype
    if device.type != "cuda":
        return f"the encoder is on {device}"
    if backend(device) == "reference":
        return "kernels are PyTorch references here"
    if encoder.config._attn_implementation != NAME:
        return f"attention is {encoder.config._attn_implementation}"
    if global_hooks():
        return "there are hooks around every module"
    if dtype not in DTYPES:
        return f"the encoder's dtype is {dtype}"
    if encoder.config.max_source_positions != encoder.embed_positions.num_embeddings:
        return f"{encoder.embed_positions.num_embeddings} positions for {encoder.config.max_source_positions} frames"
    for module in encoder.modules():
        reason = why_not_known(module, _KNOWN_MODULES, is_wrapped=module is encoder)
        if reason is not None:
            return f"in the encoder {reason}"
        if isinstance(module, nn.LayerNorm | nn.Conv1d) and (module.weight is None or module.bias is None):
            return f"a {type(module).__name__} lacks its weight or bias"
    if any(layer.fc1.bias is None for layer in encoder.layers):
        return "fc1 lacks its bias"
    parameters = list(encoder.parameters())
    for parameter in parameters:
        # Quantised and sharded weights are other tensors inside, which a kernel could not read and we could not follow.
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            return f"a weight of the encoder is {type(parameter.data).__name__}"
    for parameter in parameters:
        if parameter.device != device or parameter.dtype != dtype or not parameter.is_contiguous():
            strides = "" if parameter.is_contiguous() else f" with strides {parameter.stride()}"
            return f"a weight of the encoder, {dtype} on {device}, is {parameter.dtype} on {parameter.device}{strides}"
    return None


def fingerprint(encoder: WhisperEncoder) -> tuple[object, ...]:
    """What a graph depends on: another one is captured when modules, hooks, modes or the places of the weights change.

    Asked of every replay, before its states are used or, as late looks are, before anybody sees what came of them; so it is one
    walk over the modules. While it holds, so does what `why_not_captured` said.
    """
    found: list[object] = [global_hooks(), failed_gpus()]
    add_fingerprint(modules_of(encoder), found, wrapped=encoder)
    return tuple(found)


class CapturedEncoder:
    """The captured pass of `encoder` for features of one shape.

    Captured when it is made, which packs the weights of q, k and v; calls from several threads or streams take turns, in a
    stream of its own.
    """

    def __init__(self, encoder: WhisperEncoder, features: torch.Tensor) -> None:
        # What is kept from call to call must not be an inference tensor, which only inference mode may write again.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(features.device):
            chain = FusedEncoder(encoder)
            self.fingerprint, self.parameters, self.device = fingerprint(encoder), list(encoder.parameters()), features.device
            self._places = places_of(self.parameters)
            self.features = torch.empty(features.shape, dtype=features.dtype, device=features.device).copy_(features)
            self.graph, self.states, nbytes = capture(lambda: chain(self.features), features.device)
            self.stream, self._done = torch.cuda.Stream(), torch.cuda.Event()
            self.features.record_stream(self.stream)  # as may the graph
        self.nbytes = nbytes + self.features.nbytes
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Waits for replays, which may be queued in any stream: before the graph is given up."""
        self._done.synchronize()

    def fits(self, encoder: WhisperEncoder) -> bool:
        """Whether the graph still is what a pass of `encoder` would do."""
        return self.fingerprint == fingerprint(encoder)

    def has_its_memory(self) -> bool:
        """Whether the weights lie where the graph reads them: a replay harms nobody then, even if it no longer `fits`.

        A fraction of what `fits` takes of the host.
        """
        return self._places == places_of(self.parameters)

    def start(self, features: torch.Tensor) -> torch.Tensor:
        """Queues the pass beside the current stream. As a call, but `join` has to come before the states are read."""
        # PyTorch hands out its streams in turn: this one may be what another thread records on.
        with self._lock, CAPTURES, torch.cuda.device(self.features.device):
            states = torch.empty_like(self.states)  # those of the graph are overwritten by the next replay
            states.record_stream(self.stream)  # they may be given up before anybody has joined
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.features.copy_(features)
                self.graph.replay()
                states.copy_(self.states)
                self._done.record()
        return states

    def join(self) -> None:
        """The current stream waits for what has been started."""
        torch.cuda.current_stream(self.features.device).wait_event(self._done)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """features: (B, mel bins, frames) of the captured shape and dtype. Returns (B, frames / 2, C)."""
        states = self.start(features)
        self.join()
        return states


@dataclass
class EncoderState:
    """What the encoder of an accelerated model carries: what `restore` needs, and the graphs captured for it."""

    overridden: dict[str, MethodType]
    # By batch size and frames, the last used last.
    graphs: OrderedDict[tuple[int, int], CapturedEncoder] = field(default_factory=OrderedDict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # A captured graph belongs to the weights it was captured over: a copied model captures its own.
        return vars(self) | {"graphs": OrderedDict()}


def _forward(self: WhisperEncoder, *args: Any, **kwargs: Any) -> BaseModelOutput | tuple[Any, ...]:
    if torch.compiler.is_compiling():
        return type(self).forward(self, *args, **kwargs)  # spelt out: torch.compile traces through it
    features = args[0] if args else kwargs.get("input_features")
    if not is_covered(self, features, args, kwargs):
        end_lateness()
        return type(self).forward(self, *args, **kwargs)
    encoded = ENCODED.get()
    if encoded is not None:
        states = encoded.states_of(self, features)
        if states is not None and (encoded.is_early or _is_repeatable(self)):
            return BaseModelOutput(last_hidden_state=states)
        encoded.forget()
    graph = _captured(self, features)
    if graph is None:
        end_lateness()
    output = BaseModelOutput(last_hidden_state=graph(features)) if graph else type(self).forward(self, *args, **kwargs)
    if encoded is not None:
        encoded.keep(self, features, output.last_hidden_state)
    return output


def _is_repeatable(self: WhisperEncoder) -> bool:
    """Whether nobody would miss a second pass over the same features: all of it is known, no hook inside, no dropout."""
    return not global_hooks() and all(
        why_not_known(module, _KNOWN_MODULES, is_wrapped=module is self) is None for module in modules_of(self)
    )


# What the encoder is called with besides the features, with the values that a graph covers.
_ARGUMENTS = {
    "return_dict": (True, None),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
}


def is_covered(self: WhisperEncoder, features: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether such a call gives states alone, as a graph does; what does not fit the encoder is left to stock's errors."""
    config = self.config
    arguments = {name: value for name, value in kwargs.items() if name not in ("input_features", "attention_mask")}
    return (
        STATE in vars(self)  # not so if the method was kept from before `restore`
        and type(features) is torch.Tensor
        and features.dim() == 3
        and len(args) <= 2  # features and their mask, which Whisper ignores
        and all(value in _ARGUMENTS.get(name, (None,)) for name, value in arguments.items())
        and not torch.is_grad_enabled()
        and not (config.output_attentions or config.output_hidden_states)
        and ("return_dict" in arguments or getattr(config, "return_dict", True))
        and (features.dtype, features.device) == (self.dtype, self.device)
        and not features.is_meta  # which autocast does not know
        and not torch.is_autocast_enabled(features.device.type)
        and features.shape[0] > 0
        and features.shape[1:] == (self.num_mel_bins, 2 * config.max_source_positions)
        and not (features.is_cuda and torch.cuda.is_current_stream_capturing())  # somebody else's graph cannot hold ours
    )


def start_kept(self: WhisperEncoder, features: torch.Tensor) -> tuple[CapturedEncoder, torch.Tensor] | None:
    """Starts the graph that was captured for such features, if there is one, though it may not be what a pass would do now."""
    with _LOCK:  # or another thread might give it up before it is started
        graph = _kept(self, features)
        return graph and (graph, graph.start(features))


def _kept(self: WhisperEncoder, features: torch.Tensor) -> CapturedEncoder | None:
    """The graph that was captured for such features and may be replayed."""
    graphs = getattr(self, STATE).graphs
    key = _key(features)
    if self.config._attn_implementation != NAME or key not in graphs:
        return None
    if graphs[key].device != features.device or not graphs[key].has_its_memory():
        return None
    graphs.move_to_end(key)
    return graphs[key]


def _captured(self: WhisperEncoder, features: torch.Tensor) -> CapturedEncoder | None:
    """The graph for these features, kept from call to call, or None where there cannot be one."""
    graphs = getattr(self, STATE).graphs
    with _LOCK:
        graph = _kept(self, features)
        if graph is not None and is_so(lambda: graph.fits(self)):
            return graph

        def give_up(key: tuple[int, int]) -> None:
            graphs.pop(key).wait()

        for other in [other for other in graphs if not graphs[other].fits(self)]:
            give_up(other)  # before more memory is taken
        reason = why_not_captured(self)
        if reason is not None:
            if features.is_cuda:
                report_once(f"the encoder is launched one kernel at a time: {reason}")
            return None
        make_room(graphs, _least_bytes(self, features), MAX_BYTES, give_up)
        try:
            graph = graphs[_key(features)] = CapturedEncoder(self, features)
        except (NotCaptured, torch.OutOfMemoryError) as error:
            reason = str(error).partition(".")[0]  # torch's messages go on for a page
            report_once(f"the encoder is launched one kernel at a time: {reason}")
            return None
        make_room(graphs, 0, MAX_BYTES, give_up, in_use=_key(features))  # now that all of its bytes are known
        return graph


def _least_bytes(self: WhisperEncoder, features: torch.Tensor) -> int:
    """Of a graph for such features: what goes in and what comes out. What lies between is known once it is captured."""
    states = features.shape[0] * self.config.max_source_positions * self.config.d_model * features.element_size()
    return features.nbytes + states


def _key(features: torch.Tensor) -> tuple[int, int]:
    return features.shape[0], features.shape[2]


ENCODER_OVERRIDES: dict[str, Callable[..., Any]] = {"forward": _forward}
