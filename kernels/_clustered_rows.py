"""`skinny_linear` of 2 to 32 rows on tensor cores, its K shared by the programs of a cluster: see `_cluster.py`.

Each program multiplies its part of K alone, and sends its part of every column to the one that adds it up. So what stands
between x and the product, and the product itself, is a part as long as in `_paced_rows.py`, and the parts of fc2 need no other
launch. What the layer norm needs of a whole row the programs tell each other. Weights come by paced copies, before the wait for
the kernel before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._cluster import (
    BARRIERS,
    cluster_begin,
    exchange,
    launch_clusters,
    send,
    split,
    split_layout,
    split_shared,
    wait_for_cluster,
)
from ._dispatch import triton
from ._linear_call import LinearCall
from ._paced import (
    async_copy_global_to_shared,
    commit_group,
    constexpr_function,
    gl,
    gluon,
    has_paced_copies,
    launch_dependents,
    mma_v2,
    wait_for_previous,
    wait_group,
)
from ._paced_linear import finish, part_of

MAX_BLOCK_K = 256  # columns of a program's chunk, of which each warp has a share


@constexpr_function
def mma_layout(num_warps, num_ctas):
    """(warp of the cluster, row of weights, row of x)."""
    return gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8], cga_layout=split(3, num_ctas))


@constexpr_function
def copy_layout(warp_k, num_warps, num_ctas):
    """(warp of the cluster, row of weights, column of its share)."""
    return split_layout([1, 1, 8], [1, 256 // warp_k, warp_k // 8], [num_warps, 1, 1], num_ctas)


@constexpr_function
def copy_norm_layout(warp_k, num_warps, num_ctas):
    """(warp of the cluster, column of its share)."""
    return split_layout([1, 8], [256 // warp_k, warp_k // 8], [num_warps, 1], num_ctas)


@constexpr_function
def weights_shared(warp_k, num_ctas):
    return gl.SwizzledSharedLayout(8, 64 // warp_k, warp_k // 8, order=[2, 1, 0], cga_layout=split(3, num_ctas))


@constexpr_function
def sums_layout(num_warps, num_ctas):
    """(program, column of out that it adds up, row), the columns fastest, as they lie in memory."""
    return gl.BlockedLayout([1, 1, 1], [1, 8, 4], [1, 1, num_warps], [1, 2, 0], cga_layout=split(3, num_ctas))


@constexpr_function
def send_moments(num_ctas):
    """Four lanes hold the moments of a row: each sends them to another program."""
    return send(num_ctas, "r", "$1", "$2", ["$3", "$4"], alike=4) + " mov.u32 $0, 0; }"


@gluon.jit
def columns_of(offs, K: gl.constexpr, WARP_K: gl.constexpr, NUM_WARPS: gl.constexpr, NUM_CTAS: gl.constexpr):
    """Where the first chunk of each warp of the cluster begins in a row."""
    return offs // NUM_WARPS * (K // NUM_CTAS) + offs % NUM_WARPS * WARP_K


@gluon.jit(do_not_specialize_on_alignment=("B",))
def _clustered_rows_kernel(
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
    out_ptr,  # (B, NUM_PARTS * N)
    scale,
    eps,
    B,
    N,
    K: gl.constexpr,
    NUM_PARTS: gl.constexpr,
    HAS_BIAS: gl.constexpr,  # a bit a part
    HAS_NORM: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    GELU: gl.constexpr,
    PACE: gl.constexpr,
    BLOCK_B: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BARRIERS_SIZE: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    NUM_CTAS: gl.constexpr,
):
    launch_dependents()
    WARP_K: gl.constexpr = BLOCK_K // NUM_WARPS
    ALL_WARPS: gl.constexpr = NUM_CTAS * NUM_WARPS
    NUM_CHUNKS: gl.constexpr = K // (NUM_CTAS * BLOCK_K)
    OWN_N: gl.constexpr = BLOCK_N // NUM_CTAS  # columns that a program adds up
    STRIDE: gl.constexpr = BLOCK_B + 4  # of them in shared memory: in banks of their own
    # Weights are the tensor cores' first operand, as in `_paced_rows.py`, and columns come in an order that suits the copies.
    MMA: gl.constexpr = mma_layout(NUM_WARPS, NUM_CTAS)
    LAYOUT_W: gl.constexpr = gl.DotOperandLayout(0, MMA, WARP_K // 8)
    LAYOUT_X: gl.constexpr = gl.DotOperandLayout(1, MMA, WARP_K // 8)
    LAYOUT_XK: gl.constexpr = gl.SliceLayout(2, LAYOUT_X)
    MOMENTS: gl.constexpr = gl.SliceLayout(1, LAYOUT_X)
    COPY: gl.constexpr = copy_layout(WARP_K, NUM_WARPS, NUM_CTAS)
    COPY_NORM: gl.constexpr = copy_norm_layout(WARP_K, NUM_WARPS, NUM_CTAS)
    SHARED: gl.constexpr = weights_shared(WARP_K, NUM_CTAS)
    SHARED_NORM: gl.constexpr = split_shared(2, NUM_CTAS)
    SUMS: gl.constexpr = sums_layout(NUM_WARPS, NUM_CTAS)
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    barriers = cluster_begin(
        ALL_WARPS * (OWN_N * STRIDE + 2 * BLOCK_B), 8 * ALL_WARPS * BLOCK_B * HAS_NORM, 4 * ALL_WARPS * OWN_N * BLOCK_B
    )
    here = barriers + BARRIERS_SIZE
    told = here + 4 * ALL_WARPS * OWN_N * STRIDE  # moments, by warp and row
    first_n = gl.program_id(0) * BLOCK_N
    i_part = gl.program_id(1)
    weight_ptr, bias_ptr, has_bias, scale = part_of(
        i_part, (weight_0_ptr, weight_1_ptr, weight_2_ptr), (bias_0_ptr, bias_1_ptr, bias_2_ptr), scale, NUM_PARTS, HAS_BIAS
    )

    copy_i = gl.arange(0, ALL_WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, COPY)))
    copy_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, COPY)))[None, :, None]
    copy_k = gl.arange(0, WARP_K, layout=gl.SliceLayout(0, gl.SliceLayout(1, COPY)))[None, None, :]
    copy_k += columns_of(copy_i, K, WARP_K, NUM_WARPS, NUM_CTAS)[:, None, None]
    rows = gl.minimum(first_n + copy_n, N - 1).to(gl.int64)  # what lies past the last row is computed, not stored
    rows = weight_ptr + rows * K + copy_k
    weights = ()
    for i in gl.static_range(NUM_CHUNKS):
        w = gl.allocate_shared_memory(dtype, [ALL_WARPS, BLOCK_N, WARP_K], SHARED)
        async_copy_global_to_shared(w, rows + i * BLOCK_K, eviction_policy="evict_first")
        weights = weights + (w,)  # noqa: RUF005  Gluon knows no unpacking
        commit_group()
        wait_group(PACE - 1)
    norm_weights, norm_biases = (), ()
    if HAS_NORM:
        norm_i = gl.arange(0, ALL_WARPS, layout=gl.SliceLayout(1, COPY_NORM))
        norm_k = gl.arange(0, WARP_K, layout=gl.SliceLayout(0, COPY_NORM))[None, :]
        norm_k += columns_of(norm_i, K, WARP_K, NUM_WARPS, NUM_CTAS)[:, None]
        for i in gl.static_range(NUM_CHUNKS):
            g = gl.allocate_shared_memory(dtype, [ALL_WARPS, WARP_K], SHARED_NORM)
            b = gl.allocate_shared_memory(dtype, [ALL_WARPS, WARP_K], SHARED_NORM)
            async_copy_global_to_shared(g, norm_weight_ptr + norm_k + i * BLOCK_K)
            async_copy_global_to_shared(b, norm_bias_ptr + norm_k + i * BLOCK_K)
            norm_weights, norm_biases = norm_weights + (g,), norm_biases + (b,)  # noqa: RUF005
        commit_group()
    sums_c = gl.arange(0, NUM_CTAS, layout=gl.SliceLayout(1, gl.SliceLayout(2, SUMS)))[:, None, None]
    sums_n = gl.arange(0, OWN_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, SUMS)))[None, :, None]
    sums_b = gl.arange(0, BLOCK_B, layout=gl.SliceLayout(0, gl.SliceLayout(1, SUMS)))[None, None, :]
    offs_n = first_n + sums_c * OWN_N + sums_n
    bias = gl.zeros([NUM_CTAS, OWN_N, 1], gl.float32, layout=SUMS)
    if HAS_BIAS != 0:
        bias = gl.load(bias_ptr + offs_n, mask=(offs_n < N) & has_bias, other=0.0).to(gl.float32)
    wait_for_cluster()
    wait_for_previous()  # all above is constant; x and the residual are the previous kernels' work

    x_i = gl.arange(0, ALL_WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT_X)))
    x_k = gl.arange(0, WARP_K, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT_X)))[None, :, None]
    x_k += columns_of(x_i, K, WARP_K, NUM_WARPS, NUM_CTAS)[:, None, None]
    x_b = gl.arange(0, BLOCK_B, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT_X)))[None, None, :]
    x = ()
    for i in gl.static_range(NUM_CHUNKS):
        x = x + (gl.load(x_ptr + x_b * K + x_k + i * BLOCK_K, mask=x_b < B, other=0.0),)  # noqa: RUF005
    mask = (offs_n < N) & (sums_b < B)
    residual = gl.zeros([NUM_CTAS, OWN_N, BLOCK_B], gl.float32, layout=SUMS)
    if HAS_RESIDUAL:
        residual = gl.load(residual_ptr + sums_b * N + offs_n, mask=mask, other=0.0).to(gl.float32)
    if HAS_NORM:
        total = gl.zeros([ALL_WARPS, WARP_K, BLOCK_B], gl.float32, layout=LAYOUT_X)
        squares = gl.zeros([ALL_WARPS, WARP_K, BLOCK_B], gl.float32, layout=LAYOUT_X)
        for i in gl.static_range(NUM_CHUNKS):
            x_i = x[i].to(gl.float32)
            total += x_i
            squares += x_i * x_i
        tell: gl.constexpr = send_moments(NUM_CTAS)
        told_i = gl.arange(0, ALL_WARPS, layout=gl.SliceLayout(1, MOMENTS))[:, None]
        told_b = gl.arange(0, BLOCK_B, layout=gl.SliceLayout(0, MOMENTS))
        place = told + 8 * (told_i * BLOCK_B + told_b[None, :])
        moments = gl.sum(total, axis=1), gl.sum(squares, axis=1)
        gl.inline_asm_elementwise(
            tell, "=r,r,r,f,f", [place, barriers, moments[0], moments[1]], dtype=gl.int32, is_pure=False, pack=1
        )
        exchange(barriers, 0)
        total = gl.zeros([BLOCK_B], gl.float32, layout=gl.SliceLayout(0, MOMENTS))
        squares = gl.zeros([BLOCK_B], gl.float32, layout=gl.SliceLayout(0, MOMENTS))
        for i in gl.static_range(ALL_WARPS):
            total_i, squares_i = gl.inline_asm_elementwise(
                "ld.shared.v2.f32 {$0, $1}, [$2];", "=f,=f,r", [told + 8 * (i * BLOCK_B + told_b)],
                dtype=(gl.float32, gl.float32), is_pure=False, pack=1,
            )  # fmt: skip
            total += total_i
            squares += squares_i
        mean = total / K
        rstd = gl.rsqrt(gl.maximum(squares / K - mean * mean, 0.0) + eps)
        shift = gl.expand_dims(gl.expand_dims(-mean * rstd, 0), 1)
        rstd = gl.expand_dims(gl.expand_dims(rstd, 0), 1)
    wait_group(0)
    acc = gl.zeros([ALL_WARPS, BLOCK_N, BLOCK_B], gl.float32, layout=MMA)
    for i in gl.static_range(NUM_CHUNKS):
        x_i = x[i]
        if HAS_NORM:
            g = norm_weights[i].load(LAYOUT_XK).to(gl.float32)[:, :, None]
            b = norm_biases[i].load(LAYOUT_XK).to(gl.float32)[:, :, None]
            x_i = ((x_i.to(gl.float32) * rstd + shift) * g + b).to(dtype)
        acc = mma_v2(weights[i].load(LAYOUT_W), x_i, acc)
    acc_i = gl.arange(0, ALL_WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, MMA)))[:, None, None]
    acc_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
    acc_b = gl.arange(0, BLOCK_B, layout=gl.SliceLayout(0, gl.SliceLayout(1, MMA)))[None, None, :]
    place = here + 4 * ((acc_i * OWN_N + acc_n % OWN_N) * STRIDE + acc_b)
    gl.inline_asm_elementwise(  # two neighbours a thread, to the program that adds up their column
        "{ .reg .b32 a, b; mapa.shared::cluster.u32 a, $2, $4; mapa.shared::cluster.u32 b, $6, $4;"
        " st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [a], {$8, $9}, [b]; mov.u32 $0, 0; mov.u32 $1, 0; }",
        "=r,=r,r,r,r,r,r,r,f,f", [place, acc_n // OWN_N, barriers + 8, acc], dtype=gl.int32, is_pure=False, pack=2,
    )  # fmt: skip
    exchange(barriers, 1)
    place = here + 4 * (sums_n * STRIDE + sums_b + 0 * sums_c)
    y = gl.zeros([NUM_CTAS, OWN_N, BLOCK_B], gl.float32, layout=SUMS)
    for i in gl.static_range(ALL_WARPS):  # in this order, whoever sent first
        y += gl.inline_asm_elementwise(
            "ld.shared.f32 $0, [$1];", "=f,r", [place + 4 * i * OWN_N * STRIDE], dtype=gl.float32, is_pure=False, pack=1
        )
    y = finish(y, bias, residual, scale, GELU)
    gl.store(out_ptr + (sums_b * NUM_PARTS + i_part) * N + offs_n, y.to(dtype), mask=mask)


class RowTiles(NamedTuple):
    """Columns a cluster, programs of a cluster, warps a program, chunks on their way."""

    BLOCK_N: int
    NUM_CTAS: int
    num_warps: int
    PACE: int

    def block_k(self, K: int) -> int:
        """The widest chunk of a program, 0 if there is none."""
        part = K // self.NUM_CTAS
        widest = min(MAX_BLOCK_K, part & -part)
        return widest if K % self.NUM_CTAS == 0 and widest >= 16 * self.num_warps else 0


def clustered_rows(call: LinearCall, tiles: RowTiles) -> torch.Tensor:
    """Launches `_clustered_rows_kernel`; returns (B, len(weights) * N).

    Raises:
        ValueError: tiles that do not fit.
    """
    (B, K), N, parts = call.x.shape, call.weights[0].shape[0], len(call.weights)
    BLOCK_B, out = max(8, triton.next_power_of_2(B)), call.x.new_empty(B, parts * N)
    BLOCK_N, NUM_CTAS, num_warps, PACE = tiles
    if not (has_paced_copies(call.x.device, call.x.dtype) and BLOCK_N % 16 == 0 and NUM_CTAS in (2, 4) and tiles.block_k(K)):
        raise ValueError(
            "clusters of two or four programs are for fp16 or bf16 on an H100, 16 columns or more and a share of K a warp,"
            f" got {tuple(call.x.shape)} {call.x.dtype} on {call.x.device}, {tiles}"
        )
    arguments = call.arguments()
    launch_clusters(
        _clustered_rows_kernel,
        (triton.cdiv(N, BLOCK_N), parts),
        NUM_CTAS * num_warps * (BLOCK_N // NUM_CTAS * (BLOCK_B + 4) + 2 * BLOCK_B),
        num_warps,
        NUM_CTAS,
        False,
        **arguments,
        out_ptr=out,
        B=B,
        PACE=PACE,
        BLOCK_B=BLOCK_B,
        BLOCK_N=BLOCK_N,
        BLOCK_K=tiles.block_k(K),
        BARRIERS_SIZE=BARRIERS,
    )
    return out
