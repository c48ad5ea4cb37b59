"""The encoder as a chain of matrix products and fused kernels, from log-mel features to hidden states.

The matrix products are cuBLAS's: q, k and v are one of them, over packed weights. Attention is SDPA's, on strided views of
its output. What stands between them is ours: residual and layer norm in one pass, bias and GELU in another. Both convolutions
read and write (B, T, C), as the layers do. A layer is eight launches, none of which copies or transposes.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d, linear, scaled_dot_product_attention
from transformers.models.whisper.modeling_whisper import WhisperAttention, WhisperEncoder

from .kernels import add_layer_norm, bias_gelu
from .packing import pack, unpack

# In order of preference, and fixed: one chosen by timing might differ from run to run, and with it the results.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# Of the largest states between two products, fc1's. What an H100's L2 of 50 MB holds beside them is read and written several
# times faster than memory; a longer batch goes through the encoder in parts.
L2_BYTES = 32 << 20


def sequences_at_once(encoder: WhisperEncoder) -> int:
    """How many sequences go through the chain together; from shapes and the dtype alone, as it is a part of the rounding."""
    hidden = encoder.config.max_source_positions * encoder.config.encoder_ffn_dim * encoder.dtype.itemsize
    return max(1, L2_BYTES // hidden)


class FusedEncoder:
    """The chain for one encoder whose modules are all stock's; on a CPU it runs too. It packs the weights of q, k and v."""

    def __init__(self, encoder: WhisperEncoder) -> None:
        self.encoder = encoder
        self.layers = list(encoder.layers)
        self.qkv = [pack(_projections(layer.self_attn)) for layer in self.layers]
        # Of each layer's input; the last is that of the encoder's output.
        self.norms = [*(layer.self_attn_layer_norm for layer in self.layers), encoder.layer_norm]

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """features: (B, mel bins, frames). Returns (B, frames / 2, C)."""
        parts = [self._encode(part) for part in features.split(sequences_at_once(self.encoder))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _encode(self, features: torch.Tensor) -> torch.Tensor:
        encoder = self.encoder
        x = _convolve(encoder.conv2, _convolve(encoder.conv1, features.transpose(1, 2).contiguous()))
        B, T, C = x.shape
        # As stock's layers do at their end in fp16.
        limit = torch.finfo(x.dtype).max - 1000 if x.dtype == torch.float16 else float("inf")
        x, normed = _add_norm(x.view(B * T, C), encoder.embed_positions.weight, self.norms[0])
        with sdpa_kernel(BACKENDS, set_priority=True):
            for layer, qkv, norm in zip(self.layers, self.qkv, self.norms[1:], strict=True):
                out = _attend(layer.self_attn, linear(normed, *qkv), B)
                x, normed = _add_norm(out, x, layer.final_layer_norm)
                hidden = linear(normed, layer.fc1.weight)
                bias_gelu(hidden, layer.fc1.bias)
                x, normed = _add_norm(linear(hidden, layer.fc2.weight, layer.fc2.bias), x, norm, limit)
        return normed.view(B, T, C)


def unpack_encoder(encoder: WhisperEncoder) -> None:
    """Undoes what `FusedEncoder` did to the weights of q, k and v."""
    for attention in encoder.modules():
        if isinstance(attention, WhisperAttention):
            projections = _projections(attention)
            if all(type(projection) is nn.Linear for projection in projections):  # or they have been replaced since
                unpack(projections)


def _projections(attention: WhisperAttention) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def _convolve(conv: nn.Conv1d, x: torch.Tensor) -> torch.Tensor:
    """gelu(conv(x)), (B, T, C_in) to (B, T', C_out)."""
    # As over an image of one row with its channels last, which is how cuDNN's tensor-core kernels want it: the (B, C, T) that
    # `conv1d` is given they would transpose, and its result back.
    image, weight = x.transpose(1, 2).unsqueeze(2), conv.weight.unsqueeze(2)
    y = conv2d(image, weight, None, (1, *conv.stride), (0, *conv.padding)).squeeze(2).transpose(1, 2).contiguous()
    bias_gelu(y.view(-1, y.shape[2]), conv.bias)
    return y


def _add_norm(
    x: torch.Tensor, residual: torch.Tensor, norm: nn.LayerNorm, limit: float = float("inf")
) -> tuple[torch.Tensor, torch.Tensor]:
    return add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, limit)


def _attend(attention: WhisperAttention, qkv: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Attention of (B T, 3 C) projections, and its output projection: (B T, C)."""
    parts = qkv.view(batch_size, -1, 3, attention.num_heads, attention.head_dim)
    query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D) views
    scale = attention.scaling
    if math.frexp(scale)[0] != 0.5:
        # Stock scales the query in the model's dtype. By a power of two that rounds nothing, and SDPA may do it as well.
        query, scale = query * scale, 1.0
    out = scaled_dot_product_attention(query, key, value, scale=scale)
    out = out.transpose(1, 2).reshape(qkv.shape[0], -1)  # a view: the backends return the query's layout
    return linear(out, attention.out_proj.weight, attention.out_proj.bias)
