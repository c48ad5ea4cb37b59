"""`skinny_linear` on any GPU: all weights of a program are loaded into registers before it waits for x."""

from __future__ import annotations

import torch

from ._dispatch import gdc_launch_dependents, gdc_wait, pdl_options, register_options, tl, triton
from ._linear_call import LinearCall

MAX_CHUNK = 256  # elements of K: one warp's 16-byte loads of a row


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
    # Both at once: one exchange between threads on the way of every step's longest chain, not two. What cancels in fp32 is
    # below the rounding of fp16 and bf16 inputs, unless their mean is a hundred times their deviation; of fp32 ones the mean
    # goes first.
    shift = 0.0
    if chunks[0].dtype == tl.float32:
        total = chunks[0]
        for i in tl.static_range(1, NUM_CHUNKS):
            total += chunks[i]
        shift = tl.sum(total, axis=1, keep_dims=True) / K
    total = chunks[0].to(tl.float32) - shift
    squares = total * total
    for i in tl.static_range(1, NUM_CHUNKS):
        x = chunks[i].to(tl.float32) - shift
        total += x
        squares += x * x
    mean = tl.sum(total, axis=1, keep_dims=True) / K
    variance = tl.maximum(tl.sum(squares, axis=1, keep_dims=True) / K - mean * mean, 0.0)
    return mean + shift, tl.rsqrt(variance + eps)


@triton.jit
def finish(y, bias, residual, scale, GELU: tl.constexpr):
    """What follows the product, in fp32."""
    y = (y + bias) * scale
    if GELU:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    return y + residual


@triton.jit(do_not_specialize_on_alignment=("B", "ROW_TILES"))  # a build for all numbers of rows that share tiles
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
    ROW_TILES,
    K: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,  # a bit a part
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    USE_PDL: tl.constexpr,
    USE_DOT: tl.constexpr,  # tensor cores; else B is 1
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


def plain_linear(call: LinearCall, out: torch.Tensor, BLOCK_N: int, SPLIT_K: int, num_warps: int, use_dot: bool) -> None:
    """Launches `_skinny_linear_kernel`. out: (B, len(weights) * N), or (SPLIT_K, B, N) fp32 sums, is written."""
    (B, K), N = call.x.shape, call.weights[0].shape[0]
    pdl = pdl_options(call.x.device)
    if call.norm_weight is not None and use_dot:
        # Several rows in fp32 beside the weights do not fit a program's registers: a launch of its own is cheaper.
        normalised = torch.empty_like(call.x)
        _layer_norm_kernel[(B,)](
            x_ptr=call.x,
            weight_ptr=call.norm_weight,
            bias_ptr=call.norm_bias,
            out_ptr=normalised,
            eps=call.eps,
            K=K,
            BLOCK_K=triton.next_power_of_2(K),
            num_warps=4,
            **pdl,
        )
        call = call._replace(x=normalised, norm_weight=None, norm_bias=None)
    row_tiles = triton.cdiv(B, 16) if use_dot else 1
    _skinny_linear_kernel[(triton.cdiv(N, BLOCK_N) * row_tiles, len(call.weights), SPLIT_K)](
        **call.arguments(SPLIT_K),
        out_ptr=out,
        B=B,
        SPLIT_K=SPLIT_K,
        USE_DOT=use_dot,
        ROW_TILES=row_tiles,
        BLOCK_B=16,
        BLOCK_N=BLOCK_N,
        BLOCK_K=min(MAX_CHUNK, (K // SPLIT_K) & -(K // SPLIT_K)),
        HEAD=1 << ((K // SPLIT_K).bit_length() - 1),
        NUM_WARPS=num_warps,
        num_warps=num_warps,
        **register_options(call.x.device),
        **pdl,
    )
