"""One decoding step as a CUDA graph: last token's id in, next token's logits out, at any position.

The host needs longer to launch the hundreds of kernels of a step than the GPU to run them. A `DecoderStep` captures them
once, in a second or two and without compiling, over caches of fixed address; the position lives on the device, so that one
graph serves every step. It belongs to one model, batch size and cache size, and is kept from call to call. So are the graphs of
short prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers import WhisperForConditionalGeneration
from transformers.activations import GELUActivation
from transformers.models.whisper.modeling_whisper import (
    WhisperDecoder,
    WhisperDecoderLayer,
    WhisperModel,
    WhisperPositionalEmbedding,
)

from .attention import NAME, TritonAttention, report_once
from .cache import CACHE_NAME, StaticEncoderDecoderCache, build_static_cache
from .cross_projections import CrossProjections
from .fused import MAX_SEQUENCES, FusedDecoder, is_fusable
from .graphs import NotCaptured, add_fingerprint, capture, global_hooks, modules_of, places_of, why_not_known
from .kernels import backend
from .kernels._checks import MAX_QUERIES
from .kernels._dispatch import failed_gpus
from .late import take_late_looks
from .variants import report_missing

if TYPE_CHECKING:
    from .decode_loop import TokenSelection

Result = TypeVar("Result")

# A graph replays kernels, not Python: modules whose forward pass we do not know might do something else a step.
_KNOWN_MODULES = frozenset((
    WhisperModel, WhisperDecoder, WhisperDecoderLayer, WhisperPositionalEmbedding, TritonAttention, GELUActivation,
    nn.ModuleList, nn.LayerNorm, nn.Linear, nn.Embedding,
))  # fmt: skip


def why_not_captured(model: WhisperForConditionalGeneration) -> str | None:
    """Why a step of `model` cannot be replayed from a graph, or None."""
    if model.device.type != "cuda":
        return f"the model is on {model.device}"
    if backend(model.device) == "reference":
        return "kernels are PyTorch references here"
    if model.config._attn_implementation != NAME:
        return f"attention is {model.config._attn_implementation}"
    if global_hooks():
        return "there are hooks around every module"
    for module in (model.model, *model.model.decoder.modules(), model.proj_out):
        reason = why_not_known(module, _KNOWN_MODULES)
        if reason is not None:
            return f"in the decoder {reason}"
    parameters, device = (*model.model.decoder.parameters(), *model.proj_out.parameters()), model.device
    for parameter in parameters:
        # Quantised and sharded weights are other tensors inside, which a kernel could not read and we could not follow.
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            return f"a weight of the decoder is {type(parameter.data).__name__}"
    for parameter in parameters:
        if parameter.device != device:
            return f"the decoder lies on {parameter.device} and {device}"
    return None


def fingerprint(model: WhisperForConditionalGeneration) -> tuple[object, ...]:
    """What a graph depends on: another one is captured when modules, hooks, modes or the places of the weights change.

    Asked once a window, so it is one walk over the modules; while it holds, so does what `why_not_captured` said.
    """
    found: list[object] = [model.config._attn_implementation, global_hooks(), failed_gpus()]
    # Of `model.model` itself too, and not of its encoder.
    add_fingerprint((*modules_of(model.model.decoder, model.proj_out), model.model), found)
    return tuple(found)


def cache_bytes(model: WhisperForConditionalGeneration, batch_size: int, num_frames: int, num_slots: int) -> int:
    """Of the caches that such a step allocates when it is made. Its graphs come later, and count once they are there."""
    config = model.config
    return 2 * config.decoder_layers * batch_size * (num_slots + num_frames) * config.d_model * model.dtype.itemsize


class CapturedPass(NamedTuple):
    """The decoder's pass over T tokens a sequence, with what it reads."""

    graph: torch.cuda.CUDAGraph | None  # None: it could not be captured
    input_ids: torch.Tensor  # (B, T)
    replay: Callable[[], Any]  # returns what was captured, which the next one may overwrite


class DecoderStep:
    """The captured step of `model` for `batch_size` sequences; owns the caches it runs on.

    The self cache has `num_slots` slots, `config.max_target_positions` unless told otherwise, and one graph serves every length
    up to there; the cross cache has `num_frames`. A short prompt is a step of several tokens: each length has a graph of its
    own, over the same caches.
    """

    def __init__(
        self, model: WhisperForConditionalGeneration, batch_size: int, num_frames: int, num_slots: int | None = None
    ) -> None:
        self.num_frames, self.num_slots = num_frames, num_slots or model.config.max_target_positions
        self.fingerprint = fingerprint(model)
        self._parameters = [*model.model.decoder.parameters(), *model.proj_out.parameters()]
        self._places = places_of(self._parameters)
        self.weight_bytes = sum(parameter.nbytes for parameter in model.model.decoder.parameters())
        # What is kept from call to call must not be an inference tensor, which only inference mode may write again.
        with torch.inference_mode(False):
            self.cache: StaticEncoderDecoderCache = build_static_cache(
                model, batch_size, self.num_slots, num_frames, is_compileable=False
            )
            # Not read: a step finds the cross keys and values in the cache. It only tells the layers to attend to them.
            self.encoder_states = torch.zeros(batch_size, 1, model.config.d_model, dtype=model.dtype, device=model.device)
            self.projections = CrossProjections(model, self.cache)
            has_chain = batch_size <= MAX_SEQUENCES and is_fusable(model, batch_size)
            self.fused = FusedDecoder(model) if has_chain else None
        if self.fused is not None:
            report_missing(model.device, model.config.d_model, model.dtype)
        self.passes: dict[int, CapturedPass] = {}  # by T
        self._prompt_states: torch.Tensor | None = None  # (B, T, C), of the last prompt's tokens, before the final norm
        self._takes: dict[int, bool] = {1: True}
        self._graph_bytes = 0
        self.selection: TokenSelection | None = None  # of the pass that `advance` replays
        # By whether tokens are drawn from the most probable, and whether rows that have ended are left alone.
        self._selecting: dict[tuple[bool, bool], CapturedPass] = {}

    @property
    def graph(self) -> torch.cuda.CUDAGraph | None:
        """The graph of one token a sequence, once it is captured."""
        return self.passes[1].graph if 1 in self.passes else None

    @property
    def nbytes(self) -> int:
        """Bytes of the caches and of the graphs, in which their logits and all between them lie.

        Not of the rest, less than a megabyte for 64 sequences: prompts, zeros in place of encoder states, rules, tokens.
        """
        parts = (self.cache.self_attention_cache, self.cache.cross_attention_cache)
        return self._graph_bytes + sum(layer.keys.nbytes + layer.values.nbytes for part in parts for layer in part.layers)

    def has_its_memory(self) -> bool:
        """Whether the weights lie where the graphs read them: a replay harms nobody then, whatever else has changed."""
        return self._places == places_of(self._parameters)

    def takes(self, model: WhisperForConditionalGeneration, T: int) -> bool:
        """Whether T tokens a sequence are decoded by a graph: one always, a prompt where the fused chain covers all its rows.

        The model's own modules ask the host where in the cache a prompt begins, which a capture does not allow.
        """
        if T not in self._takes:
            rows = self.encoder_states.shape[0] * T
            self._takes[T] = self.fused is not None and T <= MAX_QUERIES and is_fusable(model, rows)
        return self._takes[T]

    def project(self, encoder_states: torch.Tensor) -> None:
        """Fills the cross cache of all layers from a window's encoder states, if it is not of them still: see `fill`."""
        self.projections.fill(encoder_states)

    def forget_states(self) -> None:
        """Has whatever comes projected: before a call of `generate`, as writes through `.data` count no versions."""
        self.projections.forget()

    def __call__(self, model: WhisperForConditionalGeneration, input_ids: torch.Tensor) -> torch.Tensor:
        """Decodes `input_ids` (B, T), of which it `takes` T, at the cache's position and advances it by T.

        Returns the last token's logits (B, 1, vocabulary).
        """
        T = input_ids.shape[1]
        if T not in self.passes:
            with torch.inference_mode(False):
                kept_ids = torch.empty_like(input_ids, memory_format=torch.contiguous_format).copy_(input_ids)

            def run() -> tuple[torch.Tensor, torch.Tensor | None]:
                # Of more tokens than one `takes` leaves none to the modules.
                return self.fused(kept_ids, self.cache) if T > 1 else (self._run(model, kept_ids), None)

            graph, replay = self._capture(run)
            self.passes[T] = CapturedPass(graph, kept_ids, replay)
        captured = self.passes[T]
        captured.input_ids.copy_(input_ids)
        self._claim(T)
        logits, self._prompt_states = captured.replay()
        return logits.clone()

    def logits_at(self, model: WhisperForConditionalGeneration, T: int, index: int) -> torch.Tensor | None:
        """Logits (B, vocabulary) at token `index` of a prompt of T tokens, if it was the last thing decoded here."""
        if self._prompt_states is None or self._prompt_states.shape[1] != T:
            return None
        take_late_looks()  # before modules run
        with torch.no_grad():
            return model.proj_out(model.model.decoder.layer_norm(self._prompt_states[:, index]))

    def advance(
        self, model: WhisperForConditionalGeneration, selection: TokenSelection, decodes_ended: bool = True
    ) -> Callable[[], torch.Tensor]:
        """What decodes the tokens that `selection`, the step's only one, has chosen, and has it choose the next, at each call.

        It returns the logits (B, V), which the next call overwrites. Without `decodes_ended` those of rows that have ended mean
        nothing, nor does what is cached of them, and their attention reads no keys. Captures it if need be, which leaves the
        cache as it was but not the selection's state.
        """
        next_ids = selection.state.next_ids
        # With a single row the loop stops at its end. The flag is read early, but by no kernel that may run beside the one that
        # sets it: each replay begins when the one before it has ended, and so do steps that are launched.
        skips = not decodes_ended and next_ids.shape[0] > 1
        ended = selection.state.ends if skips else None

        def run() -> torch.Tensor:
            logits = self._run(model, next_ids, ended)[:, -1]
            selection(logits)
            return logits

        key = (selection.top_k > 0, skips)
        if key not in self._selecting:
            graph, replay = self._capture(run)
            self._selecting[key] = CapturedPass(graph, next_ids, replay)
        captured = self._selecting[key]

        def decode_one() -> torch.Tensor:
            self._claim(1)
            return captured.replay()

        return decode_one

    def reset(self) -> None:
        """Empties the cache for a window; after a call that was interrupted nothing else may be left as it should be."""
        self.cache.reset()
        self._prompt_states = None
        if self.fused is not None:
            self.fused.counters.zero_()
        for passes in (self.passes, self._selecting):  # there may be memory for a graph now
            for key in [key for key, kept in passes.items() if kept.graph is None]:
                del passes[key]

    def rewind(self, length: int) -> None:
        """Forgets the cache's tokens from slot `length` on."""
        self.cache.get_seq_length().fill_(length)
        self._count_from(length)

    def _claim(self, new_tokens: int) -> None:
        layer = self.cache.self_attention_cache.layers[0]  # their count is one
        layer.claim(new_tokens)
        layer.host_length += new_tokens

    def _run(
        self, model: WhisperForConditionalGeneration, input_ids: torch.Tensor, ended: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.fused is not None:
            return self.fused(input_ids, self.cache, ended)[0]
        self.cache.ended = ended
        try:
            hidden_states = model.model.decoder(
                input_ids=input_ids,
                encoder_hidden_states=self.encoder_states,
                use_cache=True,
                **{CACHE_NAME: self.cache},
            ).last_hidden_state
        finally:
            self.cache.ended = None
        return model.proj_out(hidden_states)

    def _capture(self, run: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph | None, Callable[[], Result]]:
        """The graph of a pass, if there can be one, and what runs the pass; leaves the cache's position as found."""
        take_late_looks()  # nothing is captured of a model that is no longer the step's
        position, host_length = self.cache.get_seq_length().clone(), self._host_length()

        def run_once() -> Result:
            self._count_from(host_length)  # a capture runs it twice, at one position
            return run()

        try:
            with torch.no_grad():
                graph, result, nbytes = capture(run_once, self.encoder_states.device)
            self._graph_bytes += nbytes
        except NotCaptured as reason:
            report_once(f"steps are launched one kernel at a time: {reason}")
            return None, lambda: self._launch(run)
        finally:
            # The first run advanced the position and filled T slots, which the first replay writes again.
            self.cache.get_seq_length().copy_(position)
            self._count_from(host_length)

        def replay() -> Result:
            graph.replay()
            return result

        return graph, replay

    def _launch(self, run: Callable[[], Result]) -> Result:
        host_length = self._host_length()  # `_claim` has counted these tokens, and the modules may do so again
        self._count_from(0)
        # One of PyTorch's launches, which waits for all before it, as the beginning of a replay does: what has ended and the
        # cross caches are read early in what follows, and must not change meanwhile.
        self.cache.get_seq_length().add_(0)
        with torch.no_grad():
            result = run()
        self._count_from(host_length)
        return result

    def _host_length(self) -> int:
        return self.cache.self_attention_cache.layers[0].host_length

    def _count_from(self, length: int) -> None:
        self.cache.self_attention_cache.layers[0].host_length = length
