"""Linear layers of a decode step, for 1 to 64 rows, with what surrounds them in Whisper fused in.

    y = x                                   (B, K)
    y = layer_norm(y) * g + b               if `layer_norm` is given
    y = y @ weight.T + bias                 (B, N), for one weight or for three at once (q, k, v): (B, 3 N)
    y = y * scale                           of the first weight, where Whisper scales its query
    y = gelu(y)                             exact (erf), if `gelu`
    y = y + residual                        if `residual` is given

A step reads every weight once, so this is a matter of having enough bytes in flight: each program asks for all the weights it
needs before it waits for the kernel that computes `x` (programmatic dependent launch, sm_90 and later). What counts
after that is how soon a program is done. One row multiplies on the CUDA cores, with sums over K that stay within a warp; more
are padded to tensor-core tiles. Sums are in fp32, in a fixed order.
The kernels: `_plain_linear.py` for any GPU, and for a wide model on an H100 or H200 `_paced_linear.py` for one row and
`_paced_rows.py` for several, whose weights come piece by piece. How they are cut: `_linear_tiles.py`.
Who calls it: `whisper_triton.fused`. Bytes moved: N * K weights, the rest is small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._checks import check_dtype, check_flags, check_gradients, check_kinds, check_numbers, check_tensors
from ._dispatch import register
from ._linear_call import LinearCall
from ._linear_tiles import MANY_OUTPUTS, Tiles, check_tiles, choose_tiles, covers
from ._paced import give_up, has_paced_copies
from ._paced_linear import paced_linear
from ._paced_rows import paced_rows
from ._plain_linear import plain_linear
from ._sum_splits import sum_splits

MAX_ROWS = 64


class LayerNorm(NamedTuple):
    """Weight (K,), bias (K,) and epsilon of a layer norm."""

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


def skinny_linear_reference(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...],
    *,
    layer_norm: LayerNorm | None = None,
    scale: float = 1.0,
    gelu: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `skinny_linear` computes, in PyTorch: fp32 inside, float64 throughout for float64 inputs."""
    check_linear(x, weights, biases, layer_norm, scale, gelu, residual, is_reference=True)
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    if layer_norm is not None:
        y = torch.nn.functional.layer_norm(
            y, (y.shape[-1],), layer_norm.weight.to(dtype), layer_norm.bias.to(dtype), layer_norm.eps
        )
    parts = [
        torch.nn.functional.linear(y, weight.to(dtype), None if bias is None else bias.to(dtype))
        for weight, bias in zip(weights, biases, strict=True)
    ]
    parts[0] = parts[0] * scale
    y = torch.cat(parts, dim=-1)
    if gelu:
        y = torch.nn.functional.gelu(y)
    if residual is not None:
        y = y + residual.to(dtype)
    return y.to(x.dtype)


def _launch(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    scale: float,
    gelu: bool,
    residual: torch.Tensor | None,
    tiles: list[int],
) -> torch.Tensor:
    (B, K), N = x.shape, weights[0].shape[0]
    BLOCK_N, SPLIT_K, num_warps, use_dot, PACE, PROGRAMS = tiles
    call = LinearCall(x, weights, biases, norm_weight, norm_bias, eps, scale, gelu, residual)
    call.check_alignment()
    out = x.new_empty(B, len(weights) * N)
    sums = out if SPLIT_K == 1 else torch.empty(SPLIT_K, B, N, dtype=torch.float32, device=x.device)
    if PACE == 0:
        plain_linear(call, sums, BLOCK_N, SPLIT_K, num_warps, bool(use_dot))
    else:
        try:
            if use_dot:
                paced_rows(call, sums, BLOCK_N, SPLIT_K, num_warps, PACE, PROGRAMS)
            else:
                paced_linear(call, out, BLOCK_N, num_warps, PACE)
        except Exception as error:
            give_up(error, x.device)
            plain = choose_tiles(B, N, K, len(weights), norm_weight is not None)
            return _launch(*call, [int(number) for number in plain])
    if SPLIT_K > 1:
        sum_splits(call, sums, out)
    return out


def _run_reference(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    scale: float,
    gelu: bool,
    residual: torch.Tensor | None,
    tiles: list[int],
) -> torch.Tensor:
    layer_norm = None if norm_weight is None else LayerNorm(norm_weight, norm_bias, eps)
    return skinny_linear_reference(
        x, tuple(weights), tuple(biases), layer_norm=layer_norm, scale=scale, gelu=gelu, residual=residual
    )


def _fake(x: torch.Tensor, weights: list[torch.Tensor], *args: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], len(weights) * weights[0].shape[0])


_op = register(
    "skinny_linear(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor? norm_weight, Tensor? norm_bias, float eps,"
    " float scale, bool gelu, Tensor? residual, int[] tiles) -> Tensor",
    kernel=_launch,
    reference=_run_reference,
    fake=_fake,
)


def skinny_linear(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...],
    *,
    layer_norm: LayerNorm | None = None,
    scale: float = 1.0,
    gelu: bool = False,
    residual: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Computes the formula above.

    Args:
        x: (B, K), B from 1 to 64, contiguous; fp16, bf16, or fp32 with B = 1.
        weights: one (N, K) weight or three, contiguous, in x's dtype; biases: (N,) or None for each.
        layer_norm: applied to x first. scale: multiplies the first weight's result. residual: (B, N), added last.
        tiles: how the launch is cut, instead of as `choose_tiles` says.

    All tensors begin at a multiple of 16 bytes. Weights, biases and the layer norm are read while the kernels before this call
    still run: between what wrote them and this call there must be a kernel launched without dependent launch, as PyTorch's all
    are, or the beginning of a graph's replay.

    Returns:
        (B, N), or (B, 3 N) for three weights, in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices, strides or tiles that do not fit, or inputs that need gradients.
    """
    check_linear(x, weights, biases, layer_norm, scale, gelu, residual)
    norm = (None, None, 0.0) if layer_norm is None else layer_norm
    check_gradients("skinny_linear", x, *weights, *biases, *norm[:2], residual)
    (B, K), N = x.shape, weights[0].shape[0]
    has_copies = has_paced_copies(x.device, x.dtype)
    has_norm, is_plain = layer_norm is not None, not (gelu or scale != 1.0)
    is_bare = len(weights) == 1 and biases[0] is None and residual is None and not gelu
    if tiles is None:
        tiles = choose_tiles(B, N, K, len(weights), has_norm, has_copies and (is_bare or N <= MANY_OUTPUTS))
    else:
        check_kinds(Tiles, tiles=tiles)
        check_kinds(int, **tiles._asdict())
    check_tiles(tiles, x, can_split=is_plain and not has_norm and len(weights) == 1, is_bare=is_bare)
    if tiles.PACE > 0 and not (has_copies and (B == 1 or tiles.USE_DOT) and covers(tiles, B, N, K, has_norm)):
        raise ValueError(
            "paced copies are for whole tiles that fit an H100's or H200's shared memory (`covers_linear` in _paced_linear.py;"
            f" on tensor cores `covers_rows` in _paced_rows.py), got {tuple(x.shape)}, {N=}, {tiles} on {x.device}"
        )
    return _op(x, list(weights), list(biases), *norm, scale, gelu, residual, [int(number) for number in tiles])


def check_linear(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...],
    layer_norm: LayerNorm | None,
    scale: float,
    gelu: bool,
    residual: torch.Tensor | None,
    is_reference: bool = False,
) -> None:
    if not isinstance(weights, (tuple, list)) or not isinstance(biases, (tuple, list)):
        raise ValueError(f"weights and biases must be tuples, got {weights!r:.50} and {biases!r:.50}")
    if len(weights) not in (1, 3) or len(biases) != len(weights):
        raise ValueError(f"one or three weights are wanted and a bias or None for each, got {len(weights)} and {len(biases)}")
    check_tensors(x=x)
    for weight, bias in zip(weights, biases, strict=True):
        check_tensors(weight=weight, **({} if bias is None else {"bias": bias}))
    check_tensors(**({} if residual is None else {"residual": residual}))
    if layer_norm is not None:
        check_kinds(LayerNorm, layer_norm=layer_norm)
        check_tensors(norm_weight=layer_norm.weight, norm_bias=layer_norm.bias)
        check_numbers(eps=layer_norm.eps)
    check_numbers(scale=scale)
    check_flags(gelu=gelu)
    check_dtype(x, is_reference)
    if x.dim() != 2 or any(w.dim() != 2 or 0 in w.shape for w in weights):
        raise ValueError(f"x must be (B, K) and weights (N, K), got {tuple(x.shape)} and {[tuple(w.shape) for w in weights]}")
    (B, K), N = x.shape, weights[0].shape[0]
    if not 1 <= B <= MAX_ROWS:
        raise ValueError(f"skinny_linear takes 1 to {MAX_ROWS} rows, got {B}, {tuple(x.shape)}")
    if any(w.shape != (N, K) or not w.is_contiguous() for w in weights):
        raise ValueError(f"weights must be contiguous ({N}, {K}), got {[tuple(w.shape) for w in weights]}, x {tuple(x.shape)}")
    vectors = [(bias, N) for bias in biases] + [(v, K) for v in (layer_norm or ())[:2]]
    if any(v is not None and v.shape != (n,) for v, n in vectors):
        shapes = [None if v is None else tuple(v.shape) for v, _ in vectors]
        raise ValueError(f"a bias of ({N},) or None and a layer norm of ({K},) go with weights ({N}, {K}), got {shapes}")
    for tensor in (x, *weights, *(v for v, _ in vectors), residual):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype or tensor.device != x.device or not tensor.is_contiguous():
            raise ValueError(
                f"all tensors must be contiguous {x.dtype} on {x.device} like x, got {tensor.dtype} on {tensor.device} with"
                f" strides {tensor.stride()}"
            )
    if residual is not None and residual.shape != (B, N):
        raise ValueError(f"the residual must be ({B}, {N}) for x {tuple(x.shape)}, got {tuple(residual.shape)}")
