"""One decoding step as a CUDA graph: last token's id in, next token's logits out, at any position.

The host needs longer to launch the hundreds of kernels of a step than the GPU to run them. A `DecoderStep` captures them
once, in a second or two and without compiling, over caches of fixed address; the position lives on the device, so that one
graph serves every step. It belongs to one model, batch size and cache size, and is kept from call to call.
"""

from __future__ import annotations

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

from .attention import NAME, TritonAttention
from .cache import StaticEncoderDecoderCache, build_static_cache
from .fused import FusedDecoder, is_fusable

# A graph replays kernels, not Python: modules whose forward pass we do not know might do something else a step.
_KNOWN_MODULES = (
    WhisperModel, WhisperDecoder, WhisperDecoderLayer, WhisperPositionalEmbedding, TritonAttention, GELUActivation,
    nn.ModuleList, nn.LayerNorm, nn.Linear, nn.Embedding,
)  # fmt: skip


def why_not_captured(model: WhisperForConditionalGeneration) -> str | None:
    """Why a step of `model` cannot be replayed from a graph, or None."""
    if model.device.type != "cuda":
        return f"the model is on {model.device}"
    if model.config._attn_implementation != NAME:
        return f"attention is {model.config._attn_implementation}"
    for module in (model.model, *model.model.decoder.modules(), model.proj_out):
        if type(module) not in _KNOWN_MODULES:
            return f"a module of the decoder is {type(module).__name__}"
        if "forward" in vars(module):
            return f"{type(module).__name__} has a forward pass of its own"
        if module.training:
            return f"{type(module).__name__} is in training mode"
        if module._forward_pre_hooks or any(not _is_recorder(hook) for hook in module._forward_hooks.values()):
            return f"{type(module).__name__} has a forward hook"
    parameters = (*model.model.decoder.parameters(), model.proj_out.weight)
    for parameter in parameters:
        # Quantised and sharded weights are other tensors inside, which a kernel could not read and we could not follow.
        if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
            return f"a weight of the decoder is {type(parameter.data).__name__}"
    for parameter in parameters:
        if parameter.device != model.device:
            return f"the decoder lies on {parameter.device} and {model.device}"
    return None


def _is_recorder(hook: object) -> bool:
    # transformers leaves these on every layer after one call with output_attentions; they do nothing unless asked to.
    return getattr(hook, "__name__", "") == "output_capturing_hook"


def fingerprint(model: WhisperForConditionalGeneration) -> tuple[object, ...]:
    """Where a graph finds the decoder's weights: it must be captured again when `.to()`, `.half()` or a load moves them."""
    return tuple((p.data_ptr(), p.dtype) for p in (*model.model.decoder.parameters(), model.proj_out.weight))


class DecoderStep:
    """The captured step of `model` for `batch_size` sequences; owns the caches it runs on.

    The self cache has `config.max_target_positions` slots, so that one graph serves every length; the cross cache
    `num_frames`.
    """

    def __init__(self, model: WhisperForConditionalGeneration, batch_size: int, num_frames: int) -> None:
        self.num_frames = num_frames
        self.fingerprint = fingerprint(model)
        # What is kept from call to call must not be an inference tensor, which only inference mode may write again.
        with torch.inference_mode(False):
            self.cache: StaticEncoderDecoderCache = build_static_cache(
                model, batch_size, num_frames=num_frames, is_compileable=False
            )
            self.input_ids = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)
            # Not read: a step finds the cross keys and values in the cache. It only tells the layers to attend to them.
            self.encoder_states = torch.zeros(batch_size, 1, model.config.d_model, dtype=model.dtype, device=model.device)
        self.fused = FusedDecoder(model) if is_fusable(model, batch_size) else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the caches."""
        parts = (self.cache.self_attention_cache, self.cache.cross_attention_cache)
        return sum(layer.keys.nbytes + layer.values.nbytes for part in parts for layer in part.layers)

    def fits(self, model: WhisperForConditionalGeneration) -> bool:
        """Whether the graph still reads the model's weights."""
        return self.fingerprint == fingerprint(model)

    def __call__(self, model: WhisperForConditionalGeneration, input_ids: torch.Tensor) -> torch.Tensor:
        """Decodes `input_ids` (B, 1) at the cache's position and advances it; returns logits (B, 1, vocabulary)."""
        self.input_ids.copy_(input_ids)
        if self.graph is None:
            self._capture(model)
        for layer in self.cache.self_attention_cache.layers:
            layer.claim(1)
        self.graph.replay()
        return self.logits.clone()  # the next replay overwrites them

    def _run(self, model: WhisperForConditionalGeneration) -> None:
        if self.fused is not None:
            self.logits = self.fused(self.input_ids, self.cache)
            return
        hidden_states = model.model.decoder(
            input_ids=self.input_ids,
            encoder_hidden_states=self.encoder_states,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.logits = model.proj_out(hidden_states)

    def _capture(self, model: WhisperForConditionalGeneration) -> None:
        """Runs the step once to compile and warm up what it calls, then records it; leaves position and cache as found."""
        layers = self.cache.self_attention_cache.layers
        position, host_length = self.cache.get_seq_length().clone(), layers[0].host_length
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            self._run(model)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        for layer in layers:
            layer.host_length = host_length
        # "thread_local": what other threads do meanwhile, a data loader's pinned memory say, is no concern of this capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"), torch.no_grad():
            self._run(model)
        # The warm-up advanced the position and filled one slot, which the first replay writes again.
        self.cache.get_seq_length().copy_(position)
        for layer in layers:
            layer.host_length = host_length
        self.graph = graph
