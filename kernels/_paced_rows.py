"""`skinny_linear` of up to 64 rows on tensor cores, whose weights come by paced asynchronous copies: see `_paced.py`.

A program computes a tile of output columns, or, where the rows of weights are many, as in an LM head, one tile after the other:
then each chunk's place in shared memory is asked to be filled with the next tile's as soon as it has been read, so that as many
bytes are on their way between tiles as within one, and programs neither end nor begin meanwhile.
"""

from __future__ import annotations

import torch

from ._dispatch import multiprocessors, triton
from ._linear_call import LinearCall
from ._paced import (
    SHARED_MEMORY,
    async_load,
    commit_group,
    gl,
    gluon,
    launch_dependents,
    mma_v2,
    wait_for_previous,
    wait_group,
)
from ._paced_linear import finish, part_of

MAX_BLOCK_B = 32  # rows of x a program
BLOCK_K = 256  # columns of a chunk, of which each warp has a share


@gluon.jit(do_not_specialize_on_alignment=("B",))
def _paced_rows_kernel(
    x_ptr,  # (B, K) fp16/bf16
    weight_0_ptr,  # (N, K)
    weight_1_ptr,  # (N, K), as weight_2 the same as weight_0 unless NUM_PARTS is 3
    weight_2_ptr,  # (N, K)
    bias_0_ptr,  # (N,) or not read
    bias_1_ptr,  # (N,) or not read
    bias_2_ptr,  # (N,) or not read
    norm_weight_ptr,  # (K,) or not read
    norm_bias_ptr,  # (K,) or not read
    residual_ptr,  # (B, N) or not read
    out_ptr,  # (B, NUM_PARTS * N), or (SPLIT_K, B, N) fp32
    scale,
    eps,
    B,
    N,
    K: gl.constexpr,
    NUM_PARTS: gl.constexpr,
    SPLIT_K: gl.constexpr,
    HAS_BIAS: gl.constexpr,  # a bit a part
    HAS_NORM: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    GELU: gl.constexpr,
    ROW_TILES: gl.constexpr,
    HAS_MANY_TILES: gl.constexpr,  # a program; then there is one part, and neither bias nor residual
    PACE: gl.constexpr,
    BLOCK_B: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    launch_dependents()
    # (warp, row of weights, column of its share): each warp multiplies its columns of K alone, and they are added at the end.
    # Weights are the tensor cores' first operand, of 16 rows at least, so that x need not be padded to more than 8.
    # Columns may come in any order that x and weights share, so a thread takes as many neighbours of a row as it can.
    WARP_K: gl.constexpr = BLOCK_K // NUM_WARPS
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [NUM_WARPS, 1, 1], [1, 16, 8])
    LAYOUT_W: gl.constexpr = gl.DotOperandLayout(0, MMA, WARP_K // 8)
    LAYOUT_X: gl.constexpr = gl.DotOperandLayout(1, MMA, WARP_K // 8)
    LAYOUT_XK: gl.constexpr = gl.SliceLayout(2, LAYOUT_X)
    # What warps have each a part of comes together through shared memory, all parts of an element to one thread.
    JOIN: gl.constexpr = gl.BlockedLayout([NUM_WARPS, 2, 1], [1, 16, 2], [1, 1, NUM_WARPS], [1, 2, 0])
    JOIN_MOMENTS: gl.constexpr = gl.BlockedLayout([NUM_WARPS, 1], [4, 8], [NUM_WARPS, 1], [0, 1])
    MOMENTS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT_X))
    LAYOUT_OUT: gl.constexpr = gl.SliceLayout(0, JOIN)
    COPY: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 256 // WARP_K, WARP_K // 8], [NUM_WARPS, 1, 1], [2, 1, 0])
    COPY_NORM: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WARP_K, WARP_K // 8], [NUM_WARPS, 1], [1, 0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 64 // WARP_K, WARP_K // 8, order=[2, 1, 0])
    SHARED_NORM: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    NUM_CHUNKS: gl.constexpr = K // SPLIT_K // BLOCK_K
    i_part, i_split = gl.program_id(1), gl.program_id(2)
    first_n = gl.program_id(0) // ROW_TILES * BLOCK_N
    first_k = i_split * (K // SPLIT_K)
    weight_ptr, bias_ptr, has_bias, scale = part_of(
        i_part, (weight_0_ptr, weight_1_ptr, weight_2_ptr), (bias_0_ptr, bias_1_ptr, bias_2_ptr), scale, NUM_PARTS, HAS_BIAS
    )

    dtype: gl.constexpr = x_ptr.dtype.element_ty
    copy_w = gl.arange(0, NUM_WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, COPY)))[:, None, None]
    copy_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, COPY)))[None, :, None]
    copy_k = gl.arange(0, WARP_K, layout=gl.SliceLayout(0, gl.SliceLayout(1, COPY)))[None, None, :]
    rows = gl.minimum(first_n + copy_n, N - 1).to(gl.int64)  # what lies past the last row is computed, not stored
    rows = weight_ptr + rows * K + first_k + copy_w * WARP_K + copy_k
    weights = ()
    for i in gl.static_range(NUM_CHUNKS):
        w = gl.allocate_shared_memory(dtype, [NUM_WARPS, BLOCK_N, WARP_K], SHARED)
        async_load(w, rows + i * BLOCK_K, eviction_policy="evict_first" if ROW_TILES == 1 else "")
        weights = weights + (w,)  # noqa: RUF005  Gluon knows no unpacking
        commit_group()
        wait_group(PACE - 1)
    norm_weights, norm_biases = (), ()
    if HAS_NORM:
        norm_w = gl.arange(0, NUM_WARPS, layout=gl.SliceLayout(1, COPY_NORM))[:, None]
        offs_norm = norm_w * WARP_K + gl.arange(0, WARP_K, layout=gl.SliceLayout(0, COPY_NORM))[None, :]
        for i in gl.static_range(NUM_CHUNKS):
            g = gl.allocate_shared_memory(dtype, [NUM_WARPS, WARP_K], SHARED_NORM)
            b = gl.allocate_shared_memory(dtype, [NUM_WARPS, WARP_K], SHARED_NORM)
            async_load(g, norm_weight_ptr + i * BLOCK_K + offs_norm)
            async_load(b, norm_bias_ptr + i * BLOCK_K + offs_norm)
            norm_weights, norm_biases = norm_weights + (g,), norm_biases + (b,)  # noqa: RUF005
        commit_group()
    offs_n = first_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT_OUT))
    bias = gl.zeros([BLOCK_N], gl.float32, layout=gl.SliceLayout(1, LAYOUT_OUT))
    if HAS_BIAS != 0 and SPLIT_K == 1:
        bias = gl.load(bias_ptr + offs_n, mask=(offs_n < N) & has_bias, other=0.0).to(gl.float32)
    wait_for_previous()  # all above is constant; x and the residual are the previous kernels' work

    first_b = gl.program_id(0) % ROW_TILES * BLOCK_B
    x_w = gl.arange(0, NUM_WARPS, layout=gl.SliceLayout(1, LAYOUT_XK))[:, None, None]
    x_k = gl.arange(0, WARP_K, layout=gl.SliceLayout(0, LAYOUT_XK))[None, :, None]
    x_b = first_b + gl.arange(0, BLOCK_B, layout=MOMENTS)[None, None, :]
    x_ptrs = x_ptr + x_b * K + first_k + x_w * WARP_K + x_k
    x = ()
    for i in gl.static_range(NUM_CHUNKS):
        x = x + (gl.load(x_ptrs + i * BLOCK_K, mask=x_b < B, other=0.0),)  # noqa: RUF005
    offs_b = first_b + gl.arange(0, BLOCK_B, layout=gl.SliceLayout(0, LAYOUT_OUT))
    mask = (offs_n < N)[:, None] & (offs_b < B)[None, :]
    residual = gl.zeros([BLOCK_N, BLOCK_B], gl.float32, layout=LAYOUT_OUT)
    if HAS_RESIDUAL:
        residual = gl.load(residual_ptr + offs_b[None, :] * N + offs_n[:, None], mask=mask, other=0.0).to(gl.float32)
    if HAS_NORM:
        total = gl.zeros([NUM_WARPS, WARP_K, BLOCK_B], gl.float32, layout=LAYOUT_X)
        squares = gl.zeros([NUM_WARPS, WARP_K, BLOCK_B], gl.float32, layout=LAYOUT_X)
        for i in gl.static_range(NUM_CHUNKS):
            x_i = x[i].to(gl.float32)
            total += x_i
            squares += x_i * x_i
        total_parts = gl.allocate_shared_memory(gl.float32, [NUM_WARPS, BLOCK_B], SHARED_NORM)
        squares_parts = gl.allocate_shared_memory(gl.float32, [NUM_WARPS, BLOCK_B], SHARED_NORM)
        total_parts.store(gl.sum(total, axis=1))
        squares_parts.store(gl.sum(squares, axis=1))
        mean = gl.sum(total_parts.load(JOIN_MOMENTS), axis=0) / K
        rstd = gl.rsqrt(gl.maximum(gl.sum(squares_parts.load(JOIN_MOMENTS), axis=0) / K - mean * mean, 0.0) + eps)
        shift = gl.convert_layout(-mean * rstd, MOMENTS)[None, None, :]  # moves nothing: the same threads hold them
        rstd = gl.convert_layout(rstd, MOMENTS)[None, None, :]
    wait_group(0)
    acc, operands = gl.zeros([NUM_WARPS, BLOCK_N, BLOCK_B], gl.float32, layout=MMA), ()
    for i in gl.static_range(NUM_CHUNKS):
        x_i = x[i]
        if HAS_NORM:
            g = norm_weights[i].load(LAYOUT_XK).to(gl.float32)[:, :, None]
            b = norm_biases[i].load(LAYOUT_XK).to(gl.float32)[:, :, None]
            x_i = ((x_i.to(gl.float32) * rstd + shift) * g + b).to(dtype)
        if HAS_MANY_TILES:
            operands = operands + (x_i,)  # noqa: RUF005
        else:
            acc = mma_v2(weights[i].load(LAYOUT_W), x_i, acc)
    if HAS_MANY_TILES:
        num_programs = gl.num_programs(0)
        for i_tile in range(gl.program_id(0), gl.cdiv(N, BLOCK_N), num_programs):
            next_n = (i_tile + num_programs) * BLOCK_N
            next_rows = gl.minimum(next_n + copy_n, N - 1).to(gl.int64)
            next_rows = weight_ptr + next_rows * K + copy_w * WARP_K + copy_k
            acc = gl.zeros([NUM_WARPS, BLOCK_N, BLOCK_B], gl.float32, layout=MMA)
            for i in gl.static_range(NUM_CHUNKS):
                wait_group(NUM_CHUNKS - 1)  # each chunk after this one has been asked for, of this tile or of the next
                acc = mma_v2(weights[i].load(LAYOUT_W), operands[i], acc)
                if next_n < N:
                    async_load(weights[i], next_rows + i * BLOCK_K, eviction_policy="evict_first")
                commit_group()
            y = gl.sum(gl.convert_layout(acc, JOIN), axis=0) * scale
            columns = i_tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT_OUT))
            mask_out = (columns < N)[:, None] & (offs_b < B)[None, :]
            gl.store(out_ptr + offs_b[None, :] * N + columns[:, None], y.to(dtype), mask=mask_out)
    else:
        y = gl.sum(gl.convert_layout(acc, JOIN), axis=0)
        if SPLIT_K > 1:
            gl.store(out_ptr + (i_split * B + offs_b[None, :]) * N + offs_n[:, None], y, mask=mask)
        else:
            y = finish(y, bias[:, None], residual, scale, GELU)
            gl.store(out_ptr + (offs_b[None, :] * NUM_PARTS + i_part) * N + offs_n[:, None], y.to(dtype), mask=mask)


def covers_rows(B: int, K: int, has_norm: bool, BLOCK_N: int, SPLIT_K: int, num_warps: int, PROGRAMS: int = 0) -> bool:
    """Whether `_paced_rows_kernel` takes these: K in whole chunks, weights in tensor-core tiles and in shared memory.

    What brings sums together takes the place of the weights, unless those of another tile are on their way to it.
    """
    moments = 8 * num_warps * MAX_BLOCK_B
    sums = 4 * num_warps * BLOCK_N * rows_of_programs(B)
    copied = 2 * K // SPLIT_K * (BLOCK_N + 2 * has_norm) + moments
    nbytes = copied + sums if PROGRAMS > 0 else max(copied, sums)
    return K % (SPLIT_K * BLOCK_K) == 0 and BLOCK_N >= 16 and num_warps in (4, 8, 16) and nbytes <= SHARED_MEMORY


def rows_of_programs(B: int) -> int:
    """How many of B rows a program takes."""
    return min(MAX_BLOCK_B, max(8, triton.next_power_of_2(B)))


def paced_rows(
    call: LinearCall, out: torch.Tensor, BLOCK_N: int, SPLIT_K: int, num_warps: int, PACE: int, PROGRAMS: int = 0
) -> None:
    """Launches `_paced_rows_kernel`. out: (B, len(weights) * N), or (SPLIT_K, B, N) fp32 sums, is written.

    PROGRAMS: so many a multiprocessor, each of which goes on from tile to tile; 0: a program a tile.
    """
    B, N = call.x.shape[0], call.weights[0].shape[0]
    block_b = rows_of_programs(B)
    row_tiles = triton.cdiv(B, block_b)
    programs = triton.cdiv(N, BLOCK_N) * row_tiles
    if PROGRAMS > 0:
        programs = min(programs, PROGRAMS * multiprocessors(call.x.device))
    _paced_rows_kernel[(programs, len(call.weights), SPLIT_K)](
        **call.arguments(SPLIT_K),
        out_ptr=out,
        B=B,
        SPLIT_K=SPLIT_K,
        ROW_TILES=row_tiles,
        HAS_MANY_TILES=PROGRAMS > 0,
        PACE=PACE,
        BLOCK_B=block_b,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        NUM_WARPS=num_warps,
        num_warps=num_warps,
        launch_pdl=True,
    )
