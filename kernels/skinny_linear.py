"""Linear layers of a decode step, for 1 to 64 rows, with what surrounds them in Whisper fused in.

    y = x                                   (B, K)
    y = layer_norm(y) * g + b               if `layer_norm` is given
    y = y @ weight.T + bias                 (B, N), for one weight or for three at once (q, k, v): (B, 3 N)
    y = y * scale                           of the first weight, where Whisper scales its query
    y = gelu(y)                             exact (erf), if `gelu`
    y = y + residual                        if `residual` is given

A step reads every weight once, so this is a matter of having enough bytes in flight: each program loads all the weights it
needs before it waits for the kernel that computes `x` (programmatic dependent launch, sm_90 and later). What counts
after that is how soon a program is done, so K is cut into chunks that one warp holds a row of: sums over K stay
within a warp. One row multiplies on the CUDA cores; more are padded to tensor-core tiles. Sums are in fp32, in a fixed order.
On an H100 one row of a wide model has a kernel of its own, whose weights come piece by piece (`_paced_linear.py`).
Who calls it: `whisper_triton.fused`. Bytes moved: N * K weights, the rest is small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._checks import check_dtype, check_tensors
from ._dispatch import gdc_launch_dependents, gdc_wait, pdl_options, register, register_options, tl, triton
from ._paced import MIN_WIDTH, give_up, has_paced_copies
from ._paced_linear import MAX_CHUNK, covers_linear, paced_linear
from ._paced_rows import covers_rows, paced_rows

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
def load_chunks(ptrs, mask, NUM_CHUNKS: tl.constexpr, BLOCK_K: tl.constexpr, IS_STREAMED: tl.constexpr):
    """A tuple of NUM_CHUNKS tiles (..., BLOCK_K); `ptrs` are the first one's."""
    chunks = ()
    for i in tl.static_range(NUM_CHUNKS):
        tile = tl.load(ptrs + i * BLOCK_K, mask=mask, other=0.0, eviction_policy="evict_first" if IS_STREAMED else "")
        chunks = chunks + (tile,)  # noqa: RUF005  Triton knows no unpacking
    return chunks


@triton.jit
def moments(chunks, eps, K: tl.constexpr, NUM_CHUNKS: tl.constexpr):
    """Mean and 1 / standard deviation (rows, 1) of rows that are held in chunks (rows, BLOCK_K)."""
    # Both at once: one exchange between threads on the way of every step's longest chain, not two. What cancels in
    # fp32 is far below the rounding of fp16 or bf16 inputs.
    total = chunks[0].to(tl.float32)
    squares = total * total
    for i in tl.static_range(1, NUM_CHUNKS):
        x = chunks[i].to(tl.float32)
        total += x
        squares += x * x
    mean = tl.sum(total, axis=1, keep_dims=True) / K
    variance = tl.maximum(tl.sum(squares, axis=1, keep_dims=True) / K - mean * mean, 0.0)
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def finish(y, bias, residual, scale, GELU: tl.constexpr):
    """What follows the product, in fp32."""
    y = (y + bias) * scale
    if GELU:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    return y + residual


@triton.jit
def _skinny_linear_kernel(
    x_ptr,  # (B, K) fp16/bf16/fp32
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
    NUM_PARTS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,  # a bit a part
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    USE_PDL: tl.constexpr,
    USE_DOT: tl.constexpr,  # tensor cores; else B is 1
    ROW_TILES: tl.constexpr,
    BLOCK_B: tl.constexpr,  # a tensor-core tile
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HEAD: tl.constexpr,  # the widest power of two in a program's K
    NUM_WARPS: tl.constexpr,
):
    if USE_PDL:
        gdc_launch_dependents()
    NUM_CHUNKS: tl.constexpr = K // SPLIT_K // BLOCK_K
    i_part = tl.program_id(1)
    # Programs that share weights but not rows come one after the other: the second finds them in the L2.
    first_n = tl.program_id(0) // ROW_TILES * BLOCK_N
    first_k = 0
    if SPLIT_K > 1:
        first_k = tl.program_id(2) * (K // SPLIT_K)
    weight_ptr, bias_ptr = weight_0_ptr, bias_0_ptr
    has_bias = (HAS_BIAS & 1) != 0
    if NUM_PARTS == 3:
        if i_part == 1:
            weight_ptr, bias_ptr = weight_1_ptr, bias_1_ptr
        if i_part == 2:
            weight_ptr, bias_ptr = weight_2_ptr, bias_2_ptr
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        has_bias = ((HAS_BIAS >> i_part) & 1) != 0
        scale = tl.where(i_part == 0, scale, 1.0)
    weight_ptr += first_k
    x_ptr += first_k

    if not USE_DOT:
        # Tiles of one row of weights a warp, so that sums over K stay within a warp, which has x for itself.
        WARP_ROWS: tl.constexpr = BLOCK_N // NUM_WARPS
        warps = tl.arange(0, NUM_WARPS)
        offs_k = tl.arange(0, BLOCK_K)[None, :] + tl.zeros((NUM_WARPS, 1), tl.int32)
        w, bias = (), ()
        for i_n in tl.static_range(WARP_ROWS):
            offs_n = first_n + i_n * NUM_WARPS + warps
            mask_n = offs_n < N
            rows = weight_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k
            w = w + (load_chunks(rows, mask_n[:, None], NUM_CHUNKS, BLOCK_K, IS_STREAMED=True),)  # noqa: RUF005
            bias_n = tl.zeros((NUM_WARPS,), tl.float32)
            if HAS_BIAS != 0:
                bias_n = tl.load(bias_ptr + offs_n, mask=mask_n & has_bias, other=0.0).to(tl.float32)
            bias = bias + (bias_n,)  # noqa: RUF005
        if USE_PDL:
            gdc_wait()  # all above is constant; x and the residual are the previous kernels' work
        x = load_chunks(x_ptr + offs_k, offs_k < BLOCK_K, NUM_CHUNKS, BLOCK_K, IS_STREAMED=False)
        if HAS_NORM:
            # Only now, from the L2: registers that wait with the weights are registers the next kernel lacks.
            g = load_chunks(norm_weight_ptr + offs_k, offs_k < BLOCK_K, NUM_CHUNKS, BLOCK_K, IS_STREAMED=False)
            b = load_chunks(norm_bias_ptr + offs_k, offs_k < BLOCK_K, NUM_CHUNKS, BLOCK_K, IS_STREAMED=False)
        residual, acc = (), ()
        for i_n in tl.static_range(WARP_ROWS):
            residual_n = tl.zeros((NUM_WARPS,), tl.float32)
            if HAS_RESIDUAL:
                offs_n = first_n + i_n * NUM_WARPS + warps
                residual_n = tl.load(residual_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
            residual = residual + (residual_n,)  # noqa: RUF005
            acc = acc + (tl.zeros((NUM_WARPS, BLOCK_K), tl.float32),)  # noqa: RUF005
        if HAS_NORM:
            mean, rstd = moments(x, eps, K, NUM_CHUNKS)
        for i in tl.static_range(NUM_CHUNKS):
            x_i = x[i].to(tl.float32)
            if HAS_NORM:
                x_i = (x_i - mean) * rstd * g[i].to(tl.float32) + b[i].to(tl.float32)
            added = ()
            for i_n in tl.static_range(WARP_ROWS):
                added = added + (acc[i_n] + w[i_n][i].to(tl.float32) * x_i,)  # noqa: RUF005
            acc = added
        for i_n in tl.static_range(WARP_ROWS):
            offs_n = first_n + i_n * NUM_WARPS + warps
            y = tl.sum(acc[i_n], axis=1)
            if SPLIT_K > 1:
                tl.store(out_ptr + tl.program_id(2) * N + offs_n, y, mask=offs_n < N)
            else:
                y = finish(y, bias[i_n], residual[i_n], scale, GELU).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + i_part * N + offs_n, y, mask=offs_n < N)
    else:
        # Two pieces of K, the first as wide as may be: each way from registers to tensor cores costs two barriers.
        TAIL: tl.constexpr = K // SPLIT_K - HEAD
        offs_n = first_n + tl.arange(0, BLOCK_N)
        offs_b = tl.program_id(0) % ROW_TILES * BLOCK_B + tl.arange(0, BLOCK_B)
        mask_n = offs_n < N
        mask_b = (offs_b < B)[:, None]
        rows = weight_ptr + offs_n.to(tl.int64)[:, None] * K
        w = tl.load(rows + tl.arange(0, HEAD)[None, :], mask=mask_n[:, None], other=0.0, eviction_policy="evict_first")
        if TAIL > 0:
            offs_tail = HEAD + tl.arange(0, TAIL)[None, :]
            w_tail = tl.load(rows + offs_tail, mask=mask_n[:, None], other=0.0, eviction_policy="evict_first")
        bias = tl.zeros((BLOCK_N,), tl.float32)
        if HAS_BIAS != 0:
            bias = tl.load(bias_ptr + offs_n, mask=mask_n & has_bias, other=0.0).to(tl.float32)
        if USE_PDL:
            gdc_wait()
        rows = x_ptr + offs_b[:, None] * K
        y = tl.dot(tl.load(rows + tl.arange(0, HEAD)[None, :], mask=mask_b, other=0.0), tl.trans(w))
        if TAIL > 0:
            y = tl.dot(tl.load(rows + offs_tail, mask=mask_b, other=0.0), tl.trans(w_tail), y)
        mask = mask_b & mask_n[None, :]
        if SPLIT_K > 1:
            tl.store(out_ptr + (tl.program_id(2) * B + offs_b[:, None]) * N + offs_n[None, :], y, mask=mask)
        else:
            residual = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
            if HAS_RESIDUAL:
                residual = tl.load(residual_ptr + offs_b[:, None] * N + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
            y = finish(y, bias[None, :], residual, scale, GELU).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + (offs_b[:, None] * NUM_PARTS + i_part) * N + offs_n[None, :], y, mask=mask)


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
    """How a launch is cut: output columns a program, programs that share a column's K, warps a program, on which cores."""

    BLOCK_N: int
    SPLIT_K: int
    num_warps: int
    USE_DOT: bool = False  # tensor cores, from two rows on
    PACE: int = 0  # chunks of K on their way at a time in `_paced_linear_kernel`; 0: all, in `_skinny_linear_kernel`


def choose_tiles(B: int, N: int, K: int, parts: int, has_norm: bool, has_copies: bool = False) -> Tiles:
    """Tiles from shapes alone, and from what surrounds the product: `parts` weights at once, a layer norm before it.

    `has_copies`: paced copies are to be had, which are for one row of a wide model: at 1024 columns they gained nothing.

    K can be split where nothing but a bias and a residual surrounds the product.
    Measured on one H100 80GB HBM3, large-v3, fp16: one row 2026-11-24, several 2026-11-22 at batch 8; by
    benchmarks/tune_step.py, but for the projections with a residual of one row, whose tile a search over neighbouring links
    found.
    """
    if B > 1:
        if N > 16384:
            return Tiles(32, 1, 4, True)
        if K > 2048:
            return Tiles(64, K // 1024 if K % 1024 == 0 else 1, 8, True)
        return Tiles(64 if N > 2048 and parts == 1 else 32, 1, 8, True)
    if N > 16384:
        return Tiles(16, 1, 8)
    if has_copies and min(N, K) >= MIN_WIDTH:  # measured 2026-11-25, large-v3, tiles and paces together
        BLOCK_N, PACE = (4, 8) if K > 2048 else (16, 2) if parts == 3 or N > K else (8, 2)
        if covers_linear(N, K, BLOCK_N):
            return Tiles(BLOCK_N, 1, 4, PACE=PACE)
    if K > 2048:
        return Tiles(4, 1, 4)
    if parts == 3:
        return Tiles(4, 1, 2)
    if N > K:
        return Tiles(16, 1, 4)
    return Tiles(4, 1, 4) if has_norm else Tiles(8, 1, 4)


def fits_tiles(width: int) -> bool:
    """Whether `width` is a power of two from 16 on, or the sum of two: so are all widths of Whisper."""
    tail = width & (width - 1)
    return width % 16 == 0 and width > 0 and tail & (tail - 1) == 0


def covers(tiles: Tiles, N: int, K: int) -> bool:
    """Whether paced copies serve these shapes in these tiles."""
    if tiles.USE_DOT:
        return covers_rows(K, tiles.SPLIT_K, tiles.num_warps)
    return covers_linear(N, K, tiles.BLOCK_N)


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
    BLOCK_N, SPLIT_K, num_warps, use_dot, PACE = tiles
    around = (norm_weight, norm_bias, eps, scale, gelu, residual)
    out = x.new_empty(B, len(weights) * N)
    sums = out if SPLIT_K == 1 else torch.empty(SPLIT_K, B, N, dtype=torch.float32, device=x.device)
    if PACE == 0:
        _launch_plain(x, weights, biases, *around, sums, BLOCK_N, SPLIT_K, num_warps, bool(use_dot))
    else:
        try:
            if use_dot:
                paced_rows(x, weights, biases, *around, sums, BLOCK_N, SPLIT_K, num_warps, PACE)
            else:
                paced_linear(x, weights, biases, *around, out, BLOCK_N, num_warps, PACE)
        except Exception as error:
            give_up(error)
            plain = choose_tiles(B, N, K, len(weights), norm_weight is not None)
            return _launch(x, weights, biases, *around, [int(number) for number in plain])
    if SPLIT_K > 1:
        _sum_splits_kernel[(triton.cdiv(N, 256), B)](
            partial_ptr=sums,
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
            **pdl_options(x.device),
        )
    return out


def _launch_plain(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    scale: float,
    gelu: bool,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    BLOCK_N: int,
    SPLIT_K: int,
    num_warps: int,
    use_dot: bool,
) -> None:
    """Launches `_skinny_linear_kernel`. out: (B, len(weights) * N), or (SPLIT_K, B, N) fp32 sums, is written."""
    (B, K), N = x.shape, weights[0].shape[0]
    pdl = pdl_options(x.device)
    if norm_weight is not None and use_dot:
        # Several rows in fp32 beside the weights do not fit a program's registers: a launch of its own is cheaper.
        normalised = torch.empty_like(x)
        _layer_norm_kernel[(B,)](
            x_ptr=x,
            weight_ptr=norm_weight,
            bias_ptr=norm_bias,
            out_ptr=normalised,
            eps=eps,
            K=K,
            BLOCK_K=triton.next_power_of_2(K),
            num_warps=4,
            **pdl,
        )
        x, norm_weight, norm_bias = normalised, None, None
    w, b = (weights * 3)[:3], (biases * 3)[:3]
    has_bias = sum((bias is not None) << i for i, bias in enumerate(biases))
    row_tiles = triton.cdiv(B, 16) if use_dot else 1
    _skinny_linear_kernel[(triton.cdiv(N, BLOCK_N) * row_tiles, len(weights), SPLIT_K)](
        x_ptr=x,
        weight_0_ptr=w[0],
        weight_1_ptr=w[1],
        weight_2_ptr=w[2],
        bias_0_ptr=x if b[0] is None else b[0],
        bias_1_ptr=x if b[1] is None else b[1],
        bias_2_ptr=x if b[2] is None else b[2],
        norm_weight_ptr=x if norm_weight is None else norm_weight,
        norm_bias_ptr=x if norm_bias is None else norm_bias,
        residual_ptr=x if residual is None else residual,
        out_ptr=out,
        scale=scale,
        eps=eps,
        B=B,
        N=N,
        K=K,
        NUM_PARTS=len(weights),
        SPLIT_K=SPLIT_K,
        HAS_BIAS=has_bias,
        HAS_NORM=norm_weight is not None,
        HAS_RESIDUAL=residual is not None and SPLIT_K == 1,
        GELU=gelu,
        USE_DOT=use_dot,
        ROW_TILES=row_tiles,
        BLOCK_B=16,
        BLOCK_N=BLOCK_N,
        BLOCK_K=min(MAX_CHUNK, (K // SPLIT_K) & -(K // SPLIT_K)),
        HEAD=1 << ((K // SPLIT_K).bit_length() - 1),
        NUM_WARPS=num_warps,
        num_warps=num_warps,
        **register_options(x.device),
        **pdl,
    )


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

    Returns:
        (B, N), or (B, 3 N) for three weights, in x's dtype.

    Raises:
        ValueError: shapes, dtypes, devices, strides or tiles that do not fit.
    """
    norm = (None, None, 0.0) if layer_norm is None else layer_norm
    _check(x, weights, biases, layer_norm, residual)
    (B, K), N = x.shape, weights[0].shape[0]
    has_copies = has_paced_copies(x.device, x.dtype)
    tiles = tiles or choose_tiles(B, N, K, len(weights), layer_norm is not None, has_copies)
    if any(number < 1 or number & (number - 1) for number in (tiles.BLOCK_N, tiles.num_warps)) or tiles.SPLIT_K < 1:
        raise ValueError(f"BLOCK_N and num_warps must be powers of two, got {tiles}")
    SPLIT_K = tiles.SPLIT_K
    if tiles.PACE > 0 and not (has_copies and covers(tiles, N, K)):
        raise ValueError(f"paced copies are for whole tiles on an H100, got {tuple(x.shape)}, {N=}, {tiles} on {x.device}")
    if B > 1 and (x.dtype == torch.float32 or not tiles.USE_DOT):
        raise ValueError(f"several rows, {B} here, take tensor cores, which would round {x.dtype} to tf32 if it is fp32")
    if K % SPLIT_K or not fits_tiles(K // SPLIT_K):
        raise ValueError(f"K = {K} in {SPLIT_K} parts is no sum of two powers of two from 16 on")
    if SPLIT_K > 1 and (layer_norm is not None or gelu or scale != 1.0 or len(weights) == 3):
        raise ValueError("only a plain linear layer can have its K split")
    return _op(x, list(weights), list(biases), *norm, scale, gelu, residual, [int(number) for number in tiles])


def _check(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    biases: tuple[torch.Tensor | None, ...],
    layer_norm: LayerNorm | None,
    residual: torch.Tensor | None,
) -> None:
    if len(weights) not in (1, 3) or len(biases) != len(weights):
        raise ValueError(f"one or three weights are wanted and a bias or None for each, got {len(weights)} and {len(biases)}")
    check_tensors(x=x)
    for weight, bias in zip(weights, biases, strict=True):
        check_tensors(weight=weight, **({} if bias is None else {"bias": bias}))
    check_tensors(**({} if residual is None else {"residual": residual}))
    if layer_norm is not None:
        check_tensors(norm_weight=layer_norm[0], norm_bias=layer_norm[1])
    check_dtype(x)
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
        if tensor.dtype != x.dtype or tensor.device != x.device or tensor.data_ptr() % 16 or not tensor.is_contiguous():
            raise ValueError(
                f"all tensors must be contiguous {x.dtype} on {x.device} like x, and begin at a multiple of 16 bytes, got "
                f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
            )
    if residual is not None and residual.shape != (B, N):
        raise ValueError(f"the residual must be ({B}, {N}) for x {tuple(x.shape)}, got {tuple(residual.shape)}")
