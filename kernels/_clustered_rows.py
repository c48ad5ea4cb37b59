"""A linear layer of 2 to 32 rows with bias and residual on tensor cores, its K shared by the programs of a cluster: see
`_cluster.py`.

    out = x @ weight.T + bias + residual

For fc2, whose K is long: `_paced_rows.py` leaves sums of its parts to another launch. Here each program sends its part of every
column to the one that adds it up. Weights come by paced copies, before the wait for the kernel before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._cluster import cluster_begin, exchange, launch_clusters, shared_floats, wait_for_cluster
from ._dispatch import triton
from ._paced import (
    async_copy_global_to_shared,
    commit_group,
    constexpr_function,
    gl,
    gluon,
    launch_dependents,
    mma_v2,
    wait_for_previous,
    wait_group,
)

NUM_CTAS = 4
BLOCK_K = 256  # columns of a program's chunk, of which each warp has a share


@constexpr_function
def mma_layout(num_warps, num_ctas):
    """(warp of the cluster, row of weights, row of x)."""
    split = [[1 << i, 0, 0] for i in range(num_ctas.bit_length() - 1)]
    return gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8], cga_layout=split)


@constexpr_function
def copy_layout(warp_k, num_warps, num_ctas):
    """(warp of the cluster, row of weights, column of its share)."""
    split = [[1 << i, 0, 0] for i in range(num_ctas.bit_length() - 1)]
    return gl.BlockedLayout([1, 1, 8], [1, 256 // warp_k, warp_k // 8], [num_warps, 1, 1], [2, 1, 0], cga_layout=split)


@constexpr_function
def weights_shared(warp_k, num_ctas):
    split = [[1 << i, 0, 0] for i in range(num_ctas.bit_length() - 1)]
    return gl.SwizzledSharedLayout(8, 64 // warp_k, warp_k // 8, order=[2, 1, 0], cga_layout=split)


@constexpr_function
def sums_layout(num_warps, num_ctas):
    """(program, column of out that it adds up, row), the columns fastest, as they lie in memory."""
    split = [[1 << i, 0, 0] for i in range(num_ctas.bit_length() - 1)]
    return gl.BlockedLayout([1, 1, 1], [1, 8, 4], [1, 1, num_warps], [1, 2, 0], cga_layout=split)


@gluon.jit(do_not_specialize_on_alignment=("B",))
def _clustered_rows_kernel(
    x_ptr,  # (B, K) fp16/bf16
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,)
    residual_ptr,  # (B, N)
    out_ptr,  # (B, N)
    B,
    N,
    K: gl.constexpr,
    PACE: gl.constexpr,
    BLOCK_B: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    NUM_CTAS: gl.constexpr,
):
    launch_dependents()
    cluster_begin()
    WARP_K: gl.constexpr = BLOCK_K // NUM_WARPS
    NUM_PARTS: gl.constexpr = NUM_CTAS * NUM_WARPS
    NUM_CHUNKS: gl.constexpr = K // (NUM_CTAS * BLOCK_K)
    OWN_N: gl.constexpr = BLOCK_N // NUM_CTAS  # columns that a program adds up
    MMA: gl.constexpr = mma_layout(NUM_WARPS, NUM_CTAS)
    LAYOUT_W: gl.constexpr = gl.DotOperandLayout(0, MMA, WARP_K // 8)
    LAYOUT_X: gl.constexpr = gl.DotOperandLayout(1, MMA, WARP_K // 8)
    COPY: gl.constexpr = copy_layout(WARP_K, NUM_WARPS, NUM_CTAS)
    SHARED: gl.constexpr = weights_shared(WARP_K, NUM_CTAS)
    SUMS: gl.constexpr = sums_layout(NUM_WARPS, NUM_CTAS)
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    first_n = gl.program_id(0) * BLOCK_N

    copy_i = gl.arange(0, NUM_PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, COPY)))
    copy_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, COPY)))[None, :, None]
    copy_k = gl.arange(0, WARP_K, layout=gl.SliceLayout(0, gl.SliceLayout(1, COPY)))[None, None, :]
    copy_i = (copy_i // NUM_WARPS * (K // NUM_CTAS) + copy_i % NUM_WARPS * WARP_K)[:, None, None]
    rows = gl.minimum(first_n + copy_n, N - 1).to(gl.int64)  # what lies past the last row is computed, not stored
    rows = weight_ptr + rows * K + copy_i + copy_k
    weights = ()
    for i in gl.static_range(NUM_CHUNKS):
        w = gl.allocate_shared_memory(dtype, [NUM_PARTS, BLOCK_N, WARP_K], SHARED)
        async_copy_global_to_shared(w, rows + i * BLOCK_K, eviction_policy="evict_first")
        weights = weights + (w,)  # noqa: RUF005  Gluon knows no unpacking
        commit_group()
        wait_group(PACE - 1)
    sums_c = gl.arange(0, NUM_CTAS, layout=gl.SliceLayout(1, gl.SliceLayout(2, SUMS)))[:, None, None]
    sums_n = gl.arange(0, OWN_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, SUMS)))[None, :, None]
    sums_b = gl.arange(0, BLOCK_B, layout=gl.SliceLayout(0, gl.SliceLayout(1, SUMS)))[None, None, :]
    offs_n = first_n + sums_c * OWN_N + sums_n
    bias = gl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(gl.float32)
    here = shared_floats(NUM_PARTS * OWN_N * BLOCK_B)
    wait_for_cluster()
    wait_for_previous()  # all above is constant; x and the residual are the previous kernels' work

    x_i = gl.arange(0, NUM_PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT_X)))
    x_i = (x_i // NUM_WARPS * (K // NUM_CTAS) + x_i % NUM_WARPS * WARP_K)[:, None, None]
    x_k = gl.arange(0, WARP_K, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT_X)))[None, :, None]
    x_b = gl.arange(0, BLOCK_B, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT_X)))[None, None, :]
    x = ()
    for i in gl.static_range(NUM_CHUNKS):
        x = x + (gl.load(x_ptr + x_b * K + x_i + x_k + i * BLOCK_K, mask=x_b < B, other=0.0),)  # noqa: RUF005
    mask = (offs_n < N) & (sums_b < B)
    y = bias + gl.load(residual_ptr + sums_b * N + offs_n, mask=mask, other=0.0).to(gl.float32)
    wait_group(0)
    acc = gl.zeros([NUM_PARTS, BLOCK_N, BLOCK_B], gl.float32, layout=MMA)
    for i in gl.static_range(NUM_CHUNKS):
        acc = mma_v2(weights[i].load(LAYOUT_W), x[i], acc)
    acc_i = gl.arange(0, NUM_PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, MMA)))[:, None, None]
    acc_n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
    acc_b = gl.arange(0, BLOCK_B, layout=gl.SliceLayout(0, gl.SliceLayout(1, MMA)))[None, None, :]
    place = here + 4 * ((acc_i * OWN_N + acc_n % OWN_N) * BLOCK_B + acc_b)
    gl.inline_asm_elementwise(  # two neighbours a thread, to the program that adds up their column
        "{ .reg .b32 a; mapa.shared::cluster.u32 a, $2, $4; st.shared::cluster.v2.f32 [a], {$6, $7};"
        " mov.u32 $0, 0; mov.u32 $1, 0; }",
        "=r,=r,r,r,r,r,f,f", [place, acc_n // OWN_N, acc], dtype=gl.int32, is_pure=False, pack=2,
    )  # fmt: skip
    exchange()
    place = here + 4 * (sums_n * BLOCK_B + sums_b + 0 * sums_c)
    for i in gl.static_range(NUM_PARTS):  # in this order, whoever sent first
        y += gl.inline_asm_elementwise(
            "ld.shared.f32 $0, [$1];", "=f,r", [place + 4 * i * OWN_N * BLOCK_B], dtype=gl.float32, is_pure=False, pack=1
        )
    gl.store(out_ptr + sums_b * N + offs_n, y.to(dtype), mask=mask)


class RowTiles(NamedTuple):
    """Columns a cluster, warps a program, chunks on their way."""

    BLOCK_N: int
    num_warps: int
    PACE: int


def clustered_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, tiles: RowTiles
) -> torch.Tensor:
    """Launches `_clustered_rows_kernel`; returns (B, N)."""
    (B, K), N = x.shape, weight.shape[0]
    BLOCK_B, out = max(8, triton.next_power_of_2(B)), torch.empty_like(residual)
    launch_clusters(
        _clustered_rows_kernel,
        (triton.cdiv(N, tiles.BLOCK_N),),
        tiles.num_warps * tiles.BLOCK_N * BLOCK_B,
        tiles.num_warps,
        NUM_CTAS,
        False,
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias,
        residual_ptr=residual,
        out_ptr=out,
        B=B,
        N=N,
        K=K,
        PACE=tiles.PACE,
        BLOCK_B=BLOCK_B,
        BLOCK_N=tiles.BLOCK_N,
        BLOCK_K=BLOCK_K,
    )
    return out
