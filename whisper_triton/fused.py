"""The decoder's step as a chain of fused kernels, from the last token's id to the next token's logits.

A layer is eight launches for one row: layer norm and q/k/v; self-attention with the cache write; its output projection with
bias and residual; layer norm and cross query; cross-attention, in which the last program of a head joins its splits; its output
projection; layer norm, fc1 and GELU; fc2 and residual. In a wide model on an H100 or H200 the fourth and fifth are one. For
more rows the joining of fc2's parts is a launch of its own, and so are layer norms where no weights come by paced copies. The
kernels read the model's own parameters: nothing is packed or copied.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperDecoderLayer

from .cache import StaticEncoderDecoderCache
from .kernels import append_attention, cross_attention
from .kernels._checks import DTYPES, HEAD_DIMS
from .kernels._linear_tiles import fits_tiles
from .kernels.embed_tokens import embed_tokens
from .kernels.skinny_linear import MAX_ROWS, LayerNorm, skinny_linear


class _Layer(NamedTuple):
    """One decoder layer's modules, with what the kernels want to know of its norms."""

    module: WhisperDecoderLayer
    self_norm: LayerNorm
    cross_norm: LayerNorm
    final_norm: LayerNorm


def _norm(module: nn.LayerNorm) -> LayerNorm:
    return LayerNorm(module.weight, module.bias, module.eps)


# The most sequences at which the chain is faster than the model's own modules with cuBLAS's products. On one NVIDIA H200,
# 2026-11-29, it takes 3.39 ms for a step of large-v3 at 32 (modules 4.59) and 7.36 at 64 (6.68), turbo 0.47 (0.66) and 1.07
# (0.92). Between them nothing has been measured, but from 33 on its linear layers go through two tiles of rows, as at 64.
MAX_SEQUENCES = 32
MAX_WIDTH = 2048  # of a decoder: no Whisper has more than 1280 columns, and no tile has been tried beyond this
# Bytes of shared memory that the tiles for several rows take: more than an RTX card gives a program.
_SHARED_MEMORY = 128 << 10


def max_rows(dtype: torch.dtype, device: torch.device) -> int:
    """The most rows that the fused chain takes: 64, and 1 in fp32 or where a program has less than 128 KB of shared memory.

    So much have GPUs of compute capability 8.0, 9.0, 10.0.
    """
    is_short = device.type == "cuda" and _shared_memory(device) < _SHARED_MEMORY
    return 1 if is_short or dtype == torch.float32 else MAX_ROWS


def is_fusable(model: WhisperForConditionalGeneration, rows: int) -> bool:
    """Whether the chain covers `model` at so many rows, sequences times tokens: their number, dtype, widths, activation."""
    config, decoder = model.config, model.model.decoder
    norms = [module for module in decoder.modules() if isinstance(module, nn.LayerNorm)]
    return (
        model.dtype in DTYPES
        and rows <= max_rows(model.dtype, model.device)
        and config.d_model // config.decoder_attention_heads in HEAD_DIMS
        and config.activation_function == "gelu"
        and config.d_model <= MAX_WIDTH
        and fits_tiles(config.d_model)
        and fits_tiles(config.decoder_ffn_dim)
        # Without these parts a module does something else than the chain.
        and model.proj_out.bias is None
        and all(norm.weight is not None and norm.bias is not None for norm in norms)
        and all(
            p.is_contiguous() and p.dtype == model.dtype and p.data_ptr() % 16 == 0
            for p in (*decoder.parameters(), model.proj_out.weight)
        )
    )


def _shared_memory(device: torch.device) -> int:
    """Bytes that a program can have on `device`, a GPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


class FusedDecoder:
    """The chain for one model whose `is_fusable` holds. It keeps references to the modules, not copies of weights."""

    def __init__(self, model: WhisperForConditionalGeneration) -> None:
        self.decoder = model.model.decoder
        self.proj_out = model.proj_out
        self.final_norm = _norm(self.decoder.layer_norm)
        # The chain's steps follow one another, so that all of its cross-attentions can share them.
        self.counters = torch.zeros(
            MAX_SEQUENCES * model.config.decoder_attention_heads, dtype=torch.int32, device=model.device
        )
        self.layers = [
            _Layer(
                module,
                _norm(module.self_attn_layer_norm),
                _norm(module.encoder_attn_layer_norm),
                _norm(module.final_layer_norm),
            )
            for module in self.decoder.layers
        ]

    def __call__(
        self, input_ids: torch.Tensor, cache: StaticEncoderDecoderCache, ended: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes `input_ids` (B, T) at the cache's position, which it advances.

        `ended`: (B,) int64 or None; of a sequence whose number is not 0 no cached key is read, and its logits mean nothing.
        B may be at most MAX_SEQUENCES, B * T as many rows as `is_fusable` allows, and T as many queries as the attention
        kernels take.

        Returns:
            The last token's logits (B, 1, vocabulary), and the states (B, T, C) that all tokens leave the layers with.
        """
        T = input_ids.shape[1]
        position = cache.get_seq_length()
        x = embed_tokens(input_ids, self.decoder.embed_tokens.weight, self.decoder.embed_positions.weight, position)
        for layer in self.layers:
            index = layer.module.self_attn.layer_idx
            own, cross = cache.self_attention_cache.layers[index], cache.cross_attention_cache.layers[index]
            x = self._self_attention(x, layer, own, position, T, ended)
            x = self._cross_attention(x, layer, cross, ended)
            fc1, fc2 = layer.module.fc1, layer.module.fc2
            y = skinny_linear(x, (fc1.weight,), (fc1.bias,), layer_norm=layer.final_norm, gelu=True)
            x = skinny_linear(y, (fc2.weight,), (fc2.bias,), residual=x)
        last = x[T - 1 :: T].contiguous()  # each sequence's last token, which alone says what comes next
        logits = skinny_linear(last, (self.proj_out.weight,), (None,), layer_norm=self.final_norm)[:, None]
        own.advance(T)  # PyTorch's launch waits for all before it: last, where nothing could overlap with it
        return logits, x.view(-1, T, x.shape[1])

    def _self_attention(
        self, x: torch.Tensor, layer: _Layer, cache: object, position: torch.Tensor, T: int, ended: torch.Tensor | None
    ) -> torch.Tensor:
        attention: WhisperAttention = layer.module.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        qkv = skinny_linear(
            x,
            tuple(p.weight for p in projections),
            tuple(p.bias for p in projections),
            layer_norm=layer.self_norm,
            scale=attention.scaling,
        )
        query, key, value = qkv.view(-1, T, 3, attention.num_heads, attention.head_dim).unbind(2)
        out = append_attention(query, key, value, cache.keys, cache.values, position, scale=1.0, read_ahead=True, ended=ended)
        return skinny_linear(out.view(x.shape), (attention.out_proj.weight,), (attention.out_proj.bias,), residual=x)

    def _cross_attention(self, x: torch.Tensor, layer: _Layer, cache: object, ended: torch.Tensor | None) -> torch.Tensor:
        attention: WhisperAttention = layer.module.encoder_attn
        out = cross_attention(
            x,
            attention.q_proj.weight,
            attention.q_proj.bias,
            cache.keys,
            cache.values,
            layer_norm=layer.cross_norm,
            scale=attention.scaling,
            counters=self.counters,
            ended=ended,
        )
        return skinny_linear(out.view(x.shape), (attention.out_proj.weight,), (attention.out_proj.bias,), residual=x)
