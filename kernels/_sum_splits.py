"""Adds up what programs of a linear layer have each computed over a part of K, whichever kernel of `skinny_linear` they run."""

from __future__ import annotations

import torch

from ._dispatch import gdc_launch_dependents, gdc_wait, pdl_options, tl, triton
from ._linear_call import LinearCall


@triton.jit(do_not_specialize_on_alignment=("B",))
def _sum_splits_kernel(
    partial_ptr,  # (SPLIT_K, B, N) fp32
    bias_ptr,  # (N,) or not read
    residual_ptr,  # (B, N) or not read
    out_ptr,  # (B, N)
    B,
    N,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    USE_PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if USE_PDL:
        gdc_launch_dependents()
    i_b = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    y = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    if USE_PDL:
        gdc_wait()
    for i in tl.static_range(SPLIT_K):
        y += tl.load(partial_ptr + (i * B + i_b) * N + offs_n, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + i_b * N + offs_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + i_b * N + offs_n, y.to(out_ptr.dtype.element_ty), mask=mask)


def sum_splits(call: LinearCall, sums: torch.Tensor, out: torch.Tensor) -> None:
    """Adds up `sums` (SPLIT_K, B, N), with bias and residual, into `out` (B, N)."""
    (SPLIT_K, B, N), bias, residual = sums.shape, call.biases[0], call.residual
    _sum_splits_kernel[(triton.cdiv(N, 256), B)](
        partial_ptr=sums,
        bias_ptr=call.x if bias is None else bias,
        residual_ptr=call.x if residual is None else residual,
        out_ptr=out,
        B=B,
        N=N,
        SPLIT_K=SPLIT_K,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_N=256,
        num_warps=2,
        **pdl_options(call.x.device),
    )
