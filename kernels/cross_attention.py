"""Cross-attention of a decode step from the residual stream on: layer norm, query projection and attention.

    query = (layer_norm(x) @ weight.T + bias) * scale      (B * T, H * D), in x's dtype
    out[b, t, h] = softmax(query[b, t, h] . key_cache[b, h].T) @ value_cache[b, h]

For one row of a wide model on an H100 or H200 this is one launch, `_clustered_cross.py`: the programs that attend to a head
compute its query too, and exchange it and their softmax states through the shared memory of a cluster. Otherwise it is two, or
three: `skinny_linear` and `decode_attention`.
Who calls it: `whisper_triton.fused`. Bytes moved: the weights (H * D * K elements), 2 * B * H * S * D of the caches.
"""

from __future__ import annotations

import torch

from ._checks import check_attention, check_caches, check_counters, check_ended, check_gradients, check_states
from ._clustered_cross import clustered_cross, covers_cross
from ._dispatch import register
from ._linear_call import LinearCall
from ._paced import give_up
from .decode_attention import LOG2E, decode_attention, decode_attention_reference
from .skinny_linear import LayerNorm, check_linear, skinny_linear, skinny_linear_reference


def cross_attention_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    layer_norm: LayerNorm,
    scale: float,
    counters: torch.Tensor | None = None,
    ended: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `cross_attention` computes, in PyTorch: fp32 inside, float64 throughout for float64 inputs."""
    _check(x, weight, bias, key_cache, value_cache, layer_norm, scale, counters, ended, is_reference=True)
    B, H, _, D = key_cache.shape
    query = skinny_linear_reference(x, (weight,), (bias,), layer_norm=layer_norm, scale=scale).view(B, -1, H, D)
    return decode_attention_reference(query, key_cache, value_cache, scale=1.0, is_causal=False, ended=ended)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    scale: float,
    counters: torch.Tensor | None,
    ended: torch.Tensor | None,
) -> torch.Tensor:
    call = LinearCall(x, [weight], [bias], norm_weight, norm_bias, eps, scale, False, None)
    call.check_alignment()
    if covers_cross(call, key_cache, value_cache):
        try:
            return clustered_cross(call, key_cache, value_cache, LOG2E, ended)
        except Exception as error:
            give_up(error, x.device)
    B, H, _, D = key_cache.shape
    norm = LayerNorm(norm_weight, norm_bias, eps)
    query = skinny_linear(x, (weight,), (bias,), layer_norm=norm, scale=scale).view(B, -1, H, D)
    around = {"is_causal": False, "read_ahead": True, "counters": counters, "ended": ended}
    return decode_attention(query, key_cache, value_cache, scale=1.0, **around)


def _run_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    scale: float,
    counters: torch.Tensor | None,
    ended: torch.Tensor | None,
) -> torch.Tensor:
    norm = LayerNorm(norm_weight, norm_bias, eps)
    return cross_attention_reference(x, weight, bias, key_cache, value_cache, layer_norm=norm, scale=scale, ended=ended)


def _fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, key_cache: torch.Tensor, *_: object
) -> torch.Tensor:
    B, H, _, D = key_cache.shape
    return x.new_empty(B, x.shape[0] // B, H, D)


# Not declared as mutated: the counters are after a call what they were before it.
_op = register(
    "cross_attention(Tensor x, Tensor weight, Tensor? bias, Tensor key_cache, Tensor value_cache, Tensor norm_weight,"
    " Tensor norm_bias, float eps, float scale, Tensor? counters, Tensor? ended) -> Tensor",
    kernel=_launch,
    reference=_run_reference,
    fake=_fake,
)


def cross_attention(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    layer_norm: LayerNorm,
    scale: float,
    counters: torch.Tensor | None = None,
    ended: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes the formula above; nothing is mutated.

    Args:
        x: (B * T, K), 1 to 64 rows, T from 1 to 16 tokens a sequence, contiguous; fp16, bf16, or fp32 with one row.
        weight: (H * D, K), contiguous; bias: (H * D,) or None; both in x's dtype.
        key_cache, value_cache: (B, H, S, D), D one of 32, 64, 80, 96, 128, x's dtype; any strides with a dense last dimension.
            All S slots are attended to.
        layer_norm: applied to x first. scale: multiplies the query, in x's dtype as Whisper does.
        counters: as in `decode_attention`; without them its splits are joined by a launch of their own.
        ended: (B,) int64 or int32 on the same device: sequences whose number is not 0 have ended. None of their keys is
            read, and what is returned for them is 0.

    All but x is read while the kernels before this call still run: between what wrote it and this call there must be a kernel
    launched without dependent launch, as PyTorch's all are, or the beginning of a graph's replay. All that `skinny_linear`
    takes must begin at a multiple of 16 bytes.

    Returns:
        (B, T, H, D), contiguous, x's dtype: what `out_proj` reads as (B, T, H * D).

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit, or inputs that need gradients.
    """
    _check(x, weight, bias, key_cache, value_cache, layer_norm, scale, counters, ended)
    norm_weight, norm_bias, eps = layer_norm
    check_gradients("cross_attention", x, weight, bias, key_cache, value_cache, norm_weight, norm_bias)
    return _op(x, weight, bias, key_cache, value_cache, norm_weight, norm_bias, eps, scale, counters, ended)


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    layer_norm: LayerNorm,
    scale: float,
    counters: torch.Tensor | None,
    ended: torch.Tensor | None,
    is_reference: bool = False,
) -> None:
    if layer_norm is None:
        raise ValueError("a layer norm is wanted, got None")
    check_linear(x, (weight,), (bias,), layer_norm, scale, False, None, is_reference)
    check_states(key_cache=key_cache, value_cache=value_cache, is_reference=is_reference)
    B, H, _, D = key_cache.shape
    if B == 0 or x.shape[0] % B or weight.shape[0] != H * D or (x.dtype, x.device) != (key_cache.dtype, key_cache.device):
        raise ValueError(
            f"caches {tuple(key_cache.shape)} (B, H, S, D) {key_cache.dtype} on {key_cache.device} do not fit x"
            f" {tuple(x.shape)} (B * T, K) {x.dtype} on {x.device} and a weight {tuple(weight.shape)} (H * D, K)"
        )
    query = x[:, :1].view(B, -1, 1, 1).expand(-1, -1, H, D)  # what the query's shape will be
    check_caches(query, key_cache, value_cache)
    check_attention(query)
    if counters is not None:
        check_counters(counters, B * H, x.device)
    check_ended(ended, B, x.device)
