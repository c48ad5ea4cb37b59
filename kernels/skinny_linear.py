"""Linear layers of a decode step, for 1 to 16 rows, with what surrounds them in Whisper fused in.

    y = x                                   (B, K)
    y = layer_norm(y) * g + b               if `layer_norm` is given
    y = y @ weight.T + bias                 (B, N), for one weight or for three at once (q, k, v): (B, 3 N)
    y = y * scale                           of the first weight, where Whisper scales its query
    y = gelu(y)                             exact (erf), if `gelu`
    y = y + residual                        if `residual` is given

A step reads every weight once, so this is a matter of having enough bytes in flight: each program loads all the weights it
needs before it waits for the kernel that computes `x` (programmatic dependent launch, sm_90 and later). One row multiplies
on the CUDA cores; from two rows on the rows are padded to a tensor-core tile of 16. Sums are in fp32, in a fixed order.
Who calls it: `whisper_triton.decoder`. Bytes moved: N * K weights, the rest is small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._dispatch import gdc_launch_dependents, gdc_wait, pdl_options, tl, triton
from .decode_attention import SplitAttention

MAX_ROWS = 16


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


@triton.jit
def load_weights(ptr, offs_n, N, K: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """Columns START .. START + WIDTH - 1 of the rows `offs_n` of an (N, K) weight: (BLOCK_N, WIDTH)."""
    offs_k = START + tl.arange(0, WIDTH)
    rows = ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    # Each weight is read once a step: leave the L2 to what is read again.
    return tl.load(rows, mask=(offs_n < N)[:, None], other=0.0, eviction_policy="evict_first")


@triton.jit
def join_splits(x_ptr, max_ptr, sum_ptr, FIRST: tl.constexpr, WIDTH: tl.constexpr, NUM_SPLITS: tl.constexpr, D: tl.constexpr):
    """Elements FIRST .. FIRST + WIDTH - 1 of an attention's result whose splits are not joined yet, as `SplitAttention`."""
    offs_h = FIRST // D + tl.arange(0, WIDTH // D)
    offs_d = tl.arange(0, D)
    m = tl.full((WIDTH // D,), float("-inf"), tl.float32)
    l = tl.zeros((WIDTH // D,), tl.float32)
    acc = tl.zeros((WIDTH // D, D), tl.float32)
    for i in tl.static_range(NUM_SPLITS):
        rows = offs_h * NUM_SPLITS + i
        m_i = tl.load(max_ptr + rows)
        m_new = tl.maximum(m, m_i)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(m_i - m_new)
        l = l * alpha + p * tl.load(sum_ptr + rows)
        acc = acc * alpha[:, None] + p[:, None] * tl.load(x_ptr + rows[:, None] * D + offs_d[None, :])
        m = m_new
    return tl.reshape(acc / l[:, None], (WIDTH,))


@triton.jit
def normalise_row(a, b, g_a, g_b, b_a, b_b, eps, K: tl.constexpr, TAIL: tl.constexpr):
    """Layer norm of a row that is held in two pieces `a` and `b` (`b` is unused if TAIL is 0)."""
    # Both moments at once: one exchange between threads on the way of every step's longest chain, not two. What
    # cancels in fp32 is far below the rounding of fp16 or bf16 inputs.
    total, squares = tl.sum(a, axis=0), tl.sum(a * a, axis=0)
    if TAIL > 0:
        total += tl.sum(b, axis=0)
        squares += tl.sum(b * b, axis=0)
    mean = total / K
    rstd = tl.rsqrt(tl.maximum(squares / K - mean * mean, 0.0) + eps)
    a = (a - mean) * rstd * g_a + b_a
    if TAIL > 0:
        b = (b - mean) * rstd * g_b + b_b
    return a, b


@triton.jit
def _skinny_linear_kernel(
    x_ptr,  # (B, K) fp16/bf16/fp32; partial (1, H, 1, X_SPLITS, D) fp32 if X_SPLITS > 0
    x_max_ptr,  # (1, H, 1, X_SPLITS) fp32, as x_sum_ptr not read unless X_SPLITS > 0
    x_sum_ptr,  # (1, H, 1, X_SPLITS) fp32
    weight_0_ptr,  # (N, K)
    weight_1_ptr,  # (N, K), as weight_2 the same as weight_0 unless NUM_PARTS is 3
    weight_2_ptr,  # (N, K)
    bias_0_ptr,  # (N,) or not read
    bias_1_ptr,  # (N,) or not read
    bias_2_ptr,  # (N,) or not read
    norm_weight_ptr,  # (K,) or not read
    norm_bias_ptr,  # (K,) or not read
    residual_ptr,  # (B, N) or not read
    out_ptr,  # (B, NUM_PARTS * N); (SPLIT_K, B, N) fp32 sums if SPLIT_K > 1
    scale,
    eps,
    B,
    N,
    K: tl.constexpr,
    HEAD: tl.constexpr,  # a program's K = HEAD + TAIL, powers of two: all widths of Whisper are of this form
    TAIL: tl.constexpr,
    X_SPLITS: tl.constexpr,
    X_HEAD_DIM: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,  # a bit a part
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    USE_PDL: tl.constexpr,
    BLOCK_B: tl.constexpr,  # 1, or a tensor-core tile
    BLOCK_N: tl.constexpr,
):
    if USE_PDL:
        gdc_launch_dependents()
    i_part = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    first = 0
    if SPLIT_K > 1:
        first = tl.program_id(2) * (HEAD + TAIL)

    weight_ptr, bias_ptr = weight_0_ptr, bias_0_ptr
    has_bias = (HAS_BIAS & 1) != 0
    if NUM_PARTS == 3:
        if i_part == 1:
            weight_ptr, bias_ptr = weight_1_ptr, bias_1_ptr
        if i_part == 2:
            weight_ptr, bias_ptr = weight_2_ptr, bias_2_ptr
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        has_bias = ((HAS_BIAS >> i_part) & 1) != 0
    weight_ptr += first
    w_head = load_weights(weight_ptr, offs_n, N, K, 0, HEAD)
    w_tail = w_head
    if TAIL > 0:
        w_tail = load_weights(weight_ptr, offs_n, N, K, HEAD, TAIL)
    offs_head = first + tl.arange(0, HEAD)
    offs_tail = first + HEAD + tl.arange(0, max(TAIL, 1))
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS != 0:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n & has_bias, other=0.0).to(tl.float32)

    if USE_PDL:
        gdc_wait()  # all above is constant; x and the residual are the previous kernels' work
    if BLOCK_B == 1:
        x_tail = tl.zeros((max(TAIL, 1),), tl.float32)
        if X_SPLITS > 0:
            x_head = join_splits(x_ptr, x_max_ptr, x_sum_ptr, 0, HEAD, X_SPLITS, X_HEAD_DIM)
            if TAIL > 0:
                x_tail = join_splits(x_ptr, x_max_ptr, x_sum_ptr, HEAD, TAIL, X_SPLITS, X_HEAD_DIM)
        else:
            x_head = tl.load(x_ptr + offs_head).to(tl.float32)
            if TAIL > 0:
                x_tail = tl.load(x_ptr + offs_tail).to(tl.float32)
        if HAS_NORM:
            # Loaded only now, from the L2: registers that wait with the weights are registers the next kernel lacks.
            g_head = tl.load(norm_weight_ptr + offs_head).to(tl.float32)
            b_head = tl.load(norm_bias_ptr + offs_head).to(tl.float32)
            g_tail, b_tail = x_tail, x_tail
            if TAIL > 0:
                g_tail = tl.load(norm_weight_ptr + offs_tail).to(tl.float32)
                b_tail = tl.load(norm_bias_ptr + offs_tail).to(tl.float32)
            x_head, x_tail = normalise_row(x_head, x_tail, g_head, g_tail, b_head, b_tail, eps, K, TAIL)
        y = tl.sum(w_head.to(tl.float32) * x_head[None, :], axis=1)
        if TAIL > 0:
            y += tl.sum(w_tail.to(tl.float32) * x_tail[None, :], axis=1)
        offs_out, mask_out = offs_n, mask_n
        offs_residual = offs_n
    else:
        offs_b = tl.arange(0, BLOCK_B)
        mask_b = (offs_b < B)[:, None]
        x_head = tl.load(x_ptr + offs_b[:, None] * K + offs_head[None, :], mask=mask_b, other=0.0)
        x_tail = x_head
        if TAIL > 0:
            x_tail = tl.load(x_ptr + offs_b[:, None] * K + offs_tail[None, :], mask=mask_b, other=0.0)
        y = tl.dot(x_head, tl.trans(w_head))
        if TAIL > 0:
            y = tl.dot(x_tail, tl.trans(w_tail), y)
        bias = bias[None, :]
        offs_residual = offs_b[:, None] * N + offs_n[None, :]
        offs_out = offs_b[:, None] * (NUM_PARTS * N) + offs_n[None, :]
        mask_out = mask_b & mask_n[None, :]

    if SPLIT_K > 1:
        tl.store(out_ptr + tl.program_id(2) * B * N + offs_out, y, mask=mask_out)
    else:
        y += bias
        if i_part == 0:
            y *= scale
        if GELU:
            y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
        if HAS_RESIDUAL:
            y += tl.load(residual_ptr + offs_residual, mask=mask_out, other=0.0).to(tl.float32)
        tl.store(out_ptr + i_part * N + offs_out, y.to(out_ptr.dtype.element_ty), mask=mask_out)


@triton.jit
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


@triton.jit
def _layer_norm_kernel(
    x_ptr,  # (B, K)
    weight_ptr,  # (K,)
    bias_ptr,  # (K,)
    out_ptr,  # (B, K)
    eps,
    K: tl.constexpr,
    USE_PDL: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    if USE_PDL:
        gdc_launch_dependents()
    offs_k = tl.arange(0, BLOCK_K)
    mask = offs_k < K
    g = tl.load(weight_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
    if USE_PDL:
        gdc_wait()
    row = tl.program_id(0) * K
    x = tl.load(x_ptr + row + offs_k, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(mask, x - tl.sum(x, axis=0) / K, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / K + eps) * g + b
    tl.store(out_ptr + row + offs_k, y.to(out_ptr.dtype.element_ty), mask=mask)


class Tiles(NamedTuple):
    """How a launch is cut: output columns a program, programs that share a column's K, warps a program."""

    BLOCK_N: int
    SPLIT_K: int
    num_warps: int


def choose_tiles(B: int, N: int, K: int, parts: int, has_norm: bool, is_split: bool) -> Tiles:
    """Tiles from shapes alone, and from what surrounds the product: `parts` weights at once, a layer norm before it, an
    attention's splits joined before it. K can be split where nothing but a bias and a residual surrounds the product.

    Measured by benchmarks/tune_step.py on one H100 80GB HBM3, 2026-11-22: large-v3, fp16, batches 1 and 8.
    """
    if B > 1:
        if N > 16384:
            return Tiles(32, 1, 4)
        if K > 2048:
            return Tiles(64, K // 1024 if K % 1024 == 0 else 1, 8)
        return Tiles(64 if N > 2048 and parts == 1 else 32, 1, 8)
    if N > 16384:
        return Tiles(32, 1, 8)
    if K > 2048:
        return Tiles(4, 1, 4)
    if parts == 3:
        return Tiles(4, 1, 2)
    if N > K:
        return Tiles(8, 1, 2)
    return Tiles(16, 1, 4) if has_norm else Tiles(8, 1, 8)


def split_width(width: int) -> tuple[int, int] | None:
    """`width` as a sum of a power of two and a smaller one or 0, or None: what a program can hold in two tiles."""
    head = 1 << (width.bit_length() - 1)
    tail = width - head
    return (head, tail) if tail & (tail - 1) == 0 and (tail == 0 or tail >= 16) else None


def skinny_linear(
    x: torch.Tensor | SplitAttention,
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
        x: (B, K), B from 1 to 16, contiguous; fp16, bf16, or fp32 with B = 1. For one row also what
            `decode_attention_splits` returns.
        weights: one (N, K) weight or three, contiguous, in x's dtype; biases: (N,) or None for each.
        layer_norm: applied to x first. scale: multiplies the first weight's result. residual: (B, N), added last.

    Returns:
        (B, N), or (B, 3 N) for three weights, in x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    splits = None
    if isinstance(x, SplitAttention):
        splits, x = x, x.partial.new_empty(1, weights[0].shape[1], dtype=weights[0].dtype)
        if splits.partial.shape[0] != 1:
            raise ValueError(f"splits are joined for one row, got {splits.partial.shape[0]}")
    B, K = x.shape
    N = weights[0].shape[0]
    if not 1 <= B <= MAX_ROWS:
        raise ValueError(f"skinny_linear takes 1 to {MAX_ROWS} rows, got {B}")
    if B > 1 and x.dtype == torch.float32:
        raise ValueError("fp32 takes one row: tensor cores would round it to tf32, and two tiles of it do not fit a program")
    if len(weights) not in (1, 3) or any(w.shape != (N, K) or not w.is_contiguous() for w in weights):
        raise ValueError(f"weights must be one or three contiguous ({N}, {K}), got {[tuple(w.shape) for w in weights]}")
    vectors = [(bias, N) for bias in biases] + [(v, K) for v in (layer_norm or ())[:2]]
    if len(biases) != len(weights) or any(v is not None and v.shape != (n,) for v, n in vectors):
        shapes = [None if v is None else tuple(v.shape) for v, _ in vectors]
        raise ValueError(f"a bias of ({N},) or None for each weight and a layer norm of ({K},) are wanted, got {shapes}")
    tensors = [*weights, *(v for v, _ in vectors), residual]
    if any(t is not None and (t.dtype != x.dtype or t.device != x.device or t.data_ptr() % 16) for t in tensors):
        raise ValueError(f"all tensors must be {x.dtype} on {x.device} like x, and begin at a multiple of 16 bytes")
    if not x.is_contiguous() or (residual is not None and (residual.shape != (B, N) or not residual.is_contiguous())):
        raise ValueError("x and residual must be contiguous, the residual (B, N)")
    BLOCK_N, SPLIT_K, num_warps = tiles or choose_tiles(B, N, K, len(weights), layer_norm is not None, splits is not None)
    widths = split_width(K // SPLIT_K)
    if K % SPLIT_K or widths is None:
        raise ValueError(f"K = {K} in {SPLIT_K} parts is no sum of two powers of two")
    if SPLIT_K > 1 and (layer_norm is not None or gelu or scale != 1.0 or len(weights) == 3):
        raise ValueError("only a plain linear layer can have its K split")
    pdl = pdl_options(x.device)
    if layer_norm is not None and B > 1:
        # Sixteen rows in fp32 beside the weights do not fit a program's registers: a launch of its own is cheaper.
        normalised = torch.empty_like(x)
        _layer_norm_kernel[(B,)](
            x_ptr=x,
            weight_ptr=layer_norm.weight,
            bias_ptr=layer_norm.bias,
            out_ptr=normalised,
            eps=layer_norm.eps,
            K=K,
            BLOCK_K=triton.next_power_of_2(K),
            num_warps=4,
            **pdl,
        )
        x, layer_norm = normalised, None
    out = x.new_empty(B, len(weights) * N)
    partial = out if SPLIT_K == 1 else torch.empty(SPLIT_K, B, N, dtype=torch.float32, device=x.device)
    w, b = (weights * 3)[:3], (biases * 3)[:3]
    has_bias = sum((bias is not None) << i for i, bias in enumerate(biases))
    _skinny_linear_kernel[(triton.cdiv(N, BLOCK_N), len(weights), SPLIT_K)](
        x_ptr=x if splits is None else splits.partial,
        x_max_ptr=x if splits is None else splits.maxima,
        x_sum_ptr=x if splits is None else splits.sums,
        weight_0_ptr=w[0],
        weight_1_ptr=w[1],
        weight_2_ptr=w[2],
        bias_0_ptr=x if b[0] is None else b[0],
        bias_1_ptr=x if b[1] is None else b[1],
        bias_2_ptr=x if b[2] is None else b[2],
        norm_weight_ptr=x if layer_norm is None else layer_norm.weight,
        norm_bias_ptr=x if layer_norm is None else layer_norm.bias,
        residual_ptr=x if residual is None else residual,
        out_ptr=partial,
        scale=scale,
        eps=0.0 if layer_norm is None else layer_norm.eps,
        B=B,
        N=N,
        K=K,
        HEAD=widths[0],
        TAIL=widths[1],
        X_SPLITS=0 if splits is None else splits.partial.shape[3],
        X_HEAD_DIM=0 if splits is None else splits.partial.shape[4],
        NUM_PARTS=len(weights),
        SPLIT_K=SPLIT_K,
        HAS_BIAS=has_bias,
        HAS_NORM=layer_norm is not None,
        HAS_RESIDUAL=residual is not None and SPLIT_K == 1,
        GELU=gelu,
        BLOCK_B=1 if B == 1 else 16,
        BLOCK_N=BLOCK_N,
        num_warps=num_warps,
        **pdl,
    )
    if SPLIT_K > 1:
        _sum_splits_kernel[(triton.cdiv(N, 256), B)](
            partial_ptr=partial,
            bias_ptr=x if biases[0] is None else biases[0],
            residual_ptr=x if residual is None else residual,
            out_ptr=out,
            B=B,
            N=N,
            SPLIT_K=SPLIT_K,
            HAS_BIAS=biases[0] is not None,
            HAS_RESIDUAL=residual is not None,
            BLOCK_N=256,
            num_warps=2,
            **pdl,
        )
    return out
