"""The bias and the exact GELU behind a matrix product, in place.

    x[m, n] = gelu(x[m, n] + bias[n]),  gelu(y) = y / 2 * (1 + erf(y / sqrt(2)))

The sum is not rounded before the GELU, and computed in fp32. In place, because the result is read next by another matrix
product: half as much lies in the L2 between them. Who calls it: `whisper_triton.encoder`, behind fc1 and both convolutions.

Bytes moved: 2 * M * N elements (read and written once).
"""

from __future__ import annotations

import torch

from ._checks import check_dtype, check_gradients, check_tensors
from ._dispatch import pdl_handover, pdl_options, register, tl, triton


def bias_gelu_reference(x: torch.Tensor, bias: torch.Tensor) -> None:
    """What `bias_gelu` computes, in PyTorch: fp32 inside, float64 throughout for float64 inputs."""
    _check(x, bias, is_reference=True)
    dtype = torch.promote_types(x.dtype, torch.float32)
    x.copy_(torch.nn.functional.gelu(x.to(dtype) + bias.to(dtype)))


@triton.jit
def _bias_gelu_kernel(
    x_ptr,  # (M, N) fp16/bf16/fp32
    bias_ptr,  # (N,)
    M,
    N,
    USE_PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pdl_handover(USE_PDL)
    i_m = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (i_m * BLOCK_M + offs_m < M)[:, None] & (offs_n < N)[None, :]
    tile_ptr = x_ptr + i_m.to(tl.int64) * BLOCK_M * N + offs_m[:, None] * N + offs_n[None, :]
    x = tl.load(tile_ptr, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    tl.store(tile_ptr, x.to(x_ptr.dtype.element_ty), mask=mask)


def _launch(x: torch.Tensor, bias: torch.Tensor) -> None:
    M, N = x.shape
    # A warp takes 256 neighbouring columns, 16 bytes a thread in fp16: all widths of Whisper but 384 are multiples of it. No
    # timing of other tiles or numbers of warps is on record.
    BLOCK_M, BLOCK_N = 16, 256
    _bias_gelu_kernel[(triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N))](
        x_ptr=x,
        bias_ptr=bias,
        M=M,
        N=N,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        num_warps=4,
        **pdl_options(x.device),
    )


def _fake(x: torch.Tensor, bias: torch.Tensor) -> None:
    return None


_op = register(
    "bias_gelu(Tensor(a!) x, Tensor bias) -> ()",
    kernel=_launch,
    reference=bias_gelu_reference,
    fake=_fake,
)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> None:
    """Adds `bias` to `x` and applies the exact GELU, in place, in one launch.

    Args:
        x: (M, N), contiguous; fp32, fp16 or bf16. Mutated. bias: (N,), contiguous, of the same dtype and device.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit, or inputs that need gradients; x is then untouched.
    """
    _check(x, bias)
    check_gradients("bias_gelu", x, bias)
    _op(x, bias)


def _check(x: torch.Tensor, bias: torch.Tensor, is_reference: bool = False) -> None:
    check_tensors(x=x, bias=bias)
    check_dtype(x, is_reference)
    if x.dim() != 2 or bias.shape != x.shape[1:] or x.numel() == 0:
        raise ValueError(f"x must be (M, N) and bias (N,), got {tuple(x.shape)} and {tuple(bias.shape)}")
    if bias.dtype != x.dtype or bias.device != x.device:
        raise ValueError(f"bias is {bias.dtype} on {bias.device}, expected {x.dtype} on {x.device} like x")
    if not x.is_contiguous() or not bias.is_contiguous():
        raise ValueError(f"x and bias must be contiguous, got strides {x.stride()} and {bias.stride()}")
