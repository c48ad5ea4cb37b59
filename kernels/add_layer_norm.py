"""The residual of an encoder layer and the layer norm that follows it, in one pass.

    total  = clamp(x + residual, -limit, limit)      (M, C), rounded to the tensors' dtype
    normed = layer_norm(total) * weight + bias       (M, C), of what was rounded

`residual` may have fewer rows, which are then added over and over: so the position embeddings (frames, C) are added to the
frames of every sequence. Sums and moments are in fp32. Who calls it: `whisper_triton.encoder`, twice a layer.

Bytes moved: 4 * M * C elements (two tensors read, two written).
"""

from __future__ import annotations

import torch

from ._checks import check_dtype, check_gradients, check_numbers, check_tensors
from ._dispatch import pdl_handover, pdl_options, register, tl, triton


def add_layer_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    limit: float = float("inf"),
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `add_layer_norm` computes, in PyTorch: fp32 inside, float64 throughout for float64 inputs."""
    _check(x, residual, weight, bias, eps, limit, is_reference=True)
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.view(-1, *residual.shape).to(dtype) + residual.to(dtype)
    total = total.view(x.shape).to(x.dtype).clamp(-limit, limit)
    normed = torch.nn.functional.layer_norm(total.to(dtype), (x.shape[1],), weight.to(dtype), bias.to(dtype), eps)
    return total, normed.to(x.dtype)


@triton.jit
def _add_layer_norm_kernel(
    x_ptr,  # (M, C) fp16/bf16/fp32
    residual_ptr,  # (R, C)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    total_ptr,  # (M, C)
    normed_ptr,  # (M, C)
    eps,
    limit,
    R,
    C: tl.constexpr,
    USE_PDL: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pdl_handover(USE_PDL)
    i_m = tl.program_id(0)
    offs_c = tl.arange(0, BLOCK_C)
    mask = offs_c < C
    row = i_m.to(tl.int64) * C
    x = tl.load(x_ptr + row + offs_c, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(residual_ptr + (i_m % R).to(tl.int64) * C + offs_c, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(weight_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    # Rounded before it is limited, as stock does; comparisons let a NaN through, where a minimum would swallow it.
    x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
    x = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))
    tl.store(total_ptr + row + offs_c, x.to(total_ptr.dtype.element_ty), mask=mask)
    # A row that is all the same, at the limit say, has just that for its mean, where its quotient is rounded to nearest.
    x = tl.where(mask, x - tl.div_rn(tl.sum(x, axis=0), C * 1.0), 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / C + eps) * g + b
    tl.store(normed_ptr + row + offs_c, y.to(normed_ptr.dtype.element_ty), mask=mask)


def choose_warps(C: int) -> int:
    """Warps a program, which holds one row: 8 elements, 16 bytes in fp16, a thread and access, up to 4 warps. No timing of
    other numbers is on record.
    """
    return max(1, min(4, triton.next_power_of_2(C) // 256))


def _launch(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    M, C = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _add_layer_norm_kernel[(M,)](
        x_ptr=x,
        residual_ptr=residual,
        weight_ptr=weight,
        bias_ptr=bias,
        total_ptr=total,
        normed_ptr=normed,
        eps=eps,
        limit=limit,
        R=residual.shape[0],
        C=C,
        BLOCK_C=triton.next_power_of_2(C),
        num_warps=choose_warps(C),
        **pdl_options(x.device),
    )
    return total, normed


def _fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


_op = register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, float limit) -> (Tensor, Tensor)",
    kernel=_launch,
    reference=add_layer_norm_reference,
    fake=_fake,
)


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    limit: float = float("inf"),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds `residual` to `x` and normalises the sum, in one launch.

    Args:
        x: (M, C), contiguous; fp32, fp16 or bf16, as all others. residual: (R, C), contiguous, M a multiple of R.
        weight, bias: (C,), and eps, of the layer norm. limit: the sum is cut off there, as stock does in fp16; from 0
            on, infinity too.

    Returns:
        The sum and the normalised sum, both (M, C) and contiguous.

    Raises:
        ValueError: shapes, dtypes, devices, strides or numbers that do not fit, or inputs that need gradients.
    """
    _check(x, residual, weight, bias, eps, limit)
    check_gradients("add_layer_norm", x, residual, weight, bias)
    return _op(x, residual, weight, bias, eps, limit)


def _check(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    limit: float,
    is_reference: bool = False,
) -> None:
    check_tensors(x=x, residual=residual, weight=weight, bias=bias)
    check_numbers(eps=eps)
    if not (isinstance(limit, (int, float)) and limit >= 0):
        raise ValueError(f"limit must be a number from 0 on, got {limit!r:.50}")
    check_dtype(x, is_reference)
    if x.dim() != 2 or residual.dim() != 2 or x.shape[1] != residual.shape[1] or min(*x.shape, len(residual)) == 0:
        raise ValueError(f"x must be (M, C) and residual (R, C), got {tuple(x.shape)} and {tuple(residual.shape)}")
    if x.shape[0] % residual.shape[0]:
        raise ValueError(f"{x.shape[0]} rows are no multiple of the residual's {residual.shape[0]}")
    if weight.shape != (x.shape[1],) or bias.shape != (x.shape[1],):
        raise ValueError(f"weight and bias must be ({x.shape[1]},), got {tuple(weight.shape)} and {tuple(bias.shape)}")
    for tensor in (x, residual, weight, bias):
        if tensor.dtype != x.dtype or tensor.device != x.device or not tensor.is_contiguous():
            raise ValueError(
                f"all tensors must be contiguous and {x.dtype} on {x.device} like x, got {tensor.dtype} on"
                f" {tensor.device} with strides {tensor.stride()}"
            )
