"""`skinny_linear` of one row whose weights come by paced asynchronous copies: see `_paced.py`."""

from __future__ import annotations

import torch

from ._linear_call import LinearCall
from ._paced import (
    SHARED_MEMORY,
    async_load,
    commit_group,
    gl,
    gluon,
    launch_dependents,
    prefer_shared_memory,
    wait_for_previous,
    wait_group,
)

MAX_CHUNK = 256  # elements of K: one warp's 16-byte copies of a row


@gluon.jit
def pointer_of(i_part, part_0_ptr, part_1_ptr, part_2_ptr, NUM_PARTS: gl.constexpr):
    ptr = part_0_ptr
    if NUM_PARTS == 3:
        if i_part == 1:
            ptr = part_1_ptr
        if i_part == 2:
            ptr = part_2_ptr
        ptr = gl.multiple_of(ptr, 16)
    return ptr


@gluon.jit
def part_of(i_part, weights, biases, scale, NUM_PARTS: gl.constexpr, HAS_BIAS: gl.constexpr):
    """What belongs to a program's part: its weight's and bias's pointers, whether it has a bias, its scale."""
    weight_ptr = pointer_of(i_part, weights[0], weights[1], weights[2], NUM_PARTS)
    bias_ptr = pointer_of(i_part, biases[0], biases[1], biases[2], NUM_PARTS)
    if NUM_PARTS == 3:
        scale = gl.where(i_part == 0, scale, 1.0)
    return weight_ptr, bias_ptr, ((HAS_BIAS >> i_part) & 1) != 0, scale


@gluon.jit
def finish(y, bias, residual, scale, GELU: gl.constexpr):
    """What follows the product, in fp32."""
    y = (y + bias) * scale
    if GELU:
        y = 0.5 * y * (1.0 + gl.erf(y * 0.7071067811865476))
    return y + residual


@gluon.jit
def _paced_linear_kernel(
    x_ptr,  # (1, K) fp16/bf16
    weight_0_ptr,  # (N, K)
    weight_1_ptr,  # (N, K), as weight_2 the same as weight_0 unless NUM_PARTS is 3
    weight_2_ptr,  # (N, K)
    bias_0_ptr,  # (N,) or not read
    bias_1_ptr,  # (N,) or not read
    bias_2_ptr,  # (N,) or not read
    norm_weight_ptr,  # (K,) or not read
    norm_bias_ptr,  # (K,) or not read
    residual_ptr,  # (1, N) or not read
    out_ptr,  # (1, NUM_PARTS * N)
    scale,
    eps,
    N,
    K: gl.constexpr,
    NUM_PARTS: gl.constexpr,
    HAS_BIAS: gl.constexpr,  # a bit a part
    HAS_NORM: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    GELU: gl.constexpr,
    PACE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    launch_dependents()
    # A row of weights a warp: sums over K stay within a warp, and each thread reads back what it copied itself.
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, BLOCK_K // 32], [1, 32], [NUM_WARPS, 1], [1, 0])
    LAYOUT_N: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    LAYOUT_K: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    LAYOUT_NORM: gl.constexpr = gl.BlockedLayout([BLOCK_K // 32], [32], [NUM_WARPS], [0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    SHARED_NORM: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    NUM_CHUNKS: gl.constexpr = K // BLOCK_K
    WARP_ROWS: gl.constexpr = BLOCK_N // NUM_WARPS
    i_part = gl.program_id(1)
    first_n = gl.program_id(0) * BLOCK_N
    weight_ptr, bias_ptr, has_bias, scale = part_of(
        i_part, (weight_0_ptr, weight_1_ptr, weight_2_ptr), (bias_0_ptr, bias_1_ptr, bias_2_ptr), scale, NUM_PARTS, HAS_BIAS
    )

    dtype: gl.constexpr = x_ptr.dtype.element_ty
    warps = gl.arange(0, NUM_WARPS, layout=LAYOUT_N)
    offs_k = gl.arange(0, BLOCK_K, layout=LAYOUT_K)
    weights = ()
    for i in gl.static_range(NUM_CHUNKS):
        for i_n in gl.static_range(WARP_ROWS):
            offs_n = first_n + i_n * NUM_WARPS + warps
            w = gl.allocate_shared_memory(dtype, [NUM_WARPS, BLOCK_K], SHARED)
            rows = weight_ptr + offs_n.to(gl.int64)[:, None] * K + offs_k[None, :]
            async_load(w, rows + i * BLOCK_K, eviction_policy="evict_first")
            weights = weights + (w,)  # noqa: RUF005  Gluon knows no unpacking
        commit_group()
        wait_group(PACE - 1)
    norm_weights, norm_biases = (), ()
    if HAS_NORM:
        offs_norm = gl.arange(0, BLOCK_K, layout=LAYOUT_NORM)
        for i in gl.static_range(NUM_CHUNKS):
            g = gl.allocate_shared_memory(dtype, [BLOCK_K], SHARED_NORM)
            b = gl.allocate_shared_memory(dtype, [BLOCK_K], SHARED_NORM)
            async_load(g, norm_weight_ptr + i * BLOCK_K + offs_norm)
            async_load(b, norm_bias_ptr + i * BLOCK_K + offs_norm)
            norm_weights, norm_biases = norm_weights + (g,), norm_biases + (b,)  # noqa: RUF005
        commit_group()
    biases = ()
    for i_n in gl.static_range(WARP_ROWS):
        offs_n = first_n + i_n * NUM_WARPS + warps
        bias = gl.zeros([NUM_WARPS], gl.float32, layout=LAYOUT_N)
        if HAS_BIAS != 0:
            bias = gl.load(bias_ptr + offs_n, mask=has_bias, other=0.0).to(gl.float32)
        biases = biases + (bias,)  # noqa: RUF005
    wait_for_previous()  # all above is constant; x and the residual are the previous kernels' work

    x, acc, residuals = (), (), ()
    for i in gl.static_range(NUM_CHUNKS):
        x = x + (gl.load(x_ptr + offs_k[None, :] + warps[:, None] * 0 + i * BLOCK_K),)  # noqa: RUF005
    for i_n in gl.static_range(WARP_ROWS):
        residual = gl.zeros([NUM_WARPS], gl.float32, layout=LAYOUT_N)
        if HAS_RESIDUAL:
            residual = gl.load(residual_ptr + first_n + i_n * NUM_WARPS + warps).to(gl.float32)
        residuals = residuals + (residual,)  # noqa: RUF005
        acc = acc + (gl.zeros([NUM_WARPS, BLOCK_K], gl.float32, layout=LAYOUT),)  # noqa: RUF005
    wait_group(0)
    if HAS_NORM:
        total = gl.zeros([NUM_WARPS, BLOCK_K], gl.float32, layout=LAYOUT)
        squares = gl.zeros([NUM_WARPS, BLOCK_K], gl.float32, layout=LAYOUT)
        for i in gl.static_range(NUM_CHUNKS):
            total += x[i].to(gl.float32)
            squares += x[i].to(gl.float32) * x[i].to(gl.float32)
        mean = gl.sum(total, axis=1) / K
        rstd = gl.rsqrt(gl.maximum(gl.sum(squares, axis=1) / K - mean * mean, 0.0) + eps)
    for i in gl.static_range(NUM_CHUNKS):
        x_i = x[i].to(gl.float32)
        if HAS_NORM:
            g = norm_weights[i].load(LAYOUT_K).to(gl.float32)
            x_i = (x_i - mean[:, None]) * rstd[:, None] * g[None, :] + norm_biases[i].load(LAYOUT_K).to(gl.float32)[None, :]
        added = ()
        for i_n in gl.static_range(WARP_ROWS):
            w = weights[i * WARP_ROWS + i_n].load(LAYOUT).to(gl.float32)
            added = added + (acc[i_n] + w * x_i,)  # noqa: RUF005
        acc = added
    for i_n in gl.static_range(WARP_ROWS):
        y = finish(gl.sum(acc[i_n], axis=1), biases[i_n], residuals[i_n], scale, GELU)
        gl.store(out_ptr + i_part * N + first_n + i_n * NUM_WARPS + warps, y.to(dtype))


def covers_linear(N: int, K: int, has_norm: bool, BLOCK_N: int, SPLIT_K: int, num_warps: int) -> bool:
    """Whether `_paced_linear_kernel` takes these: whole tiles, in no more shared memory than there is, K in one part."""
    nbytes = 2 * K * (BLOCK_N + 2 * has_norm)
    return N % BLOCK_N == 0 and K % 64 == 0 and SPLIT_K == 1 and num_warps <= BLOCK_N and nbytes <= SHARED_MEMORY


def paced_linear(call: LinearCall, out: torch.Tensor, BLOCK_N: int, num_warps: int, PACE: int) -> None:
    """Launches `_paced_linear_kernel`. out: (1, len(weights) * N), is written."""
    N, K = call.weights[0].shape
    kernel = _paced_linear_kernel[(N // BLOCK_N, len(call.weights))](
        **call.arguments(),
        out_ptr=out,
        PACE=PACE,
        BLOCK_N=BLOCK_N,
        BLOCK_K=min(MAX_CHUNK, K & -K),
        NUM_WARPS=num_warps,
        num_warps=num_warps,
        launch_pdl=True,
    )
    prefer_shared_memory(kernel)
