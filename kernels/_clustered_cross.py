"""Cross-attention of one token, a cluster of programs a head and row, with the layer norm and the projection of its query in
the same launch, or without them: see `_cluster.py`.

    q = (layer_norm(x) @ weight[h].T + bias[h]) * scale     rounded to x's dtype, as a launch of its own would leave it
    out[b, h] = softmax(q . key_cache[b, h].T) @ value_cache[b, h]

Each program attends to an eighth of the keys, and the first one joins the states. Where the query is projected here, each
computes an eighth of it before, and sends it to all. Weights, keys and values come by paced copies, before the wait for the
kernel before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._arguments import cache_arguments
from ._cluster import (
    BARRIERS,
    NUM_CTAS,
    ROWS,
    ClusterTiles,
    along_keys,
    attend,
    check_call,
    cluster_begin,
    exchange,
    exchanged_floats,
    first_keys,
    join_states,
    keys_layout,
    launch_clusters,
    read_eight,
    send_to_all,
    split_shared,
    wait_for_cluster,
)
from ._clustered_linear import BLOCK_K, ask_for_norm, ask_for_weights, linear_layout, multiply, rows_of_warps
from ._dispatch import triton
from ._paced import (
    async_copy_global_to_shared,
    commit_group,
    gl,
    gluon,
    launch_dependents,
    wait_for_previous,
    wait_group,
)


@gluon.jit
def _clustered_cross_kernel(
    query_ptr,  # (B, 1, H, D) fp16/bf16; with HAS_PROJECTION x (B, K)
    weight_ptr,  # (H * D, K); as the next three, read with HAS_PROJECTION alone
    bias_ptr,  # (H * D,)
    norm_weight_ptr,  # (K,)
    norm_bias_ptr,  # (K,)
    key_cache_ptr,  # (B, H, S, D)
    value_cache_ptr,  # (B, H, S, D)
    out_ptr,  # (B, 1, H, D)
    ended_ptr,  # (B,) int; not read unless HAS_ENDED
    scale,
    eps,
    qk_scale,
    stride_q_b,
    stride_q_h,
    stride_kc_b,
    stride_kc_h,
    stride_kc_s,
    stride_vc_b,
    stride_vc_h,
    stride_vc_s,
    H,
    S,
    HAS_PROJECTION: gl.constexpr,
    HAS_ENDED: gl.constexpr,
    K: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    NUM_PIECES: gl.constexpr,
    PACE: gl.constexpr,
    BLOCK_K: gl.constexpr,
    ROWS: gl.constexpr,
    BARRIERS_SIZE: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    NUM_CTAS: gl.constexpr,
):
    launch_dependents()
    LINEAR: gl.constexpr = linear_layout(BLOCK_K, NUM_WARPS, NUM_CTAS)
    KEYS: gl.constexpr = keys_layout(HEAD_DIM, NUM_WARPS, NUM_CTAS)
    SHARED: gl.constexpr = split_shared(4, NUM_CTAS)
    NUM_STATES: gl.constexpr = NUM_CTAS * NUM_WARPS
    WARP_ROWS: gl.constexpr = HEAD_DIM // NUM_STATES
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    barriers = cluster_begin(
        HEAD_DIM + NUM_STATES * (HEAD_DIM + 4), 4 * HEAD_DIM * HAS_PROJECTION, NUM_STATES * (4 * HEAD_DIM + 8)
    )
    here = barriers + BARRIERS_SIZE
    i_h = gl.program_id(0).to(gl.int64)
    i_b = gl.program_id(1).to(gl.int64)
    if HAS_ENDED:
        S = gl.where(gl.load(ended_ptr + i_b) == 0, S, 0)

    if HAS_PROJECTION:
        weights = ask_for_weights((weight_ptr + i_h * HEAD_DIM * K,), K, WARP_ROWS, PACE, BLOCK_K, NUM_WARPS, NUM_CTAS)
        norm = ask_for_norm(norm_weight_ptr, norm_bias_ptr, K, BLOCK_K, NUM_WARPS, NUM_CTAS)
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, KEYS))))
    elements = along_keys(offs_d)
    first_s = first_keys(NUM_PIECES * NUM_WARPS, KEYS, ROWS, NUM_WARPS, NUM_CTAS)
    key_cache_ptr += i_b * stride_kc_b + i_h * stride_kc_h
    value_cache_ptr += i_b * stride_vc_b + i_h * stride_vc_h
    keys, values = (), ()
    for i in gl.static_range(2 * NUM_PIECES):
        offs_s = first_s + i % NUM_PIECES * (ROWS * NUM_WARPS)
        mask = gl.expand_dims(offs_s < S, 3) & (elements < HEAD_DIM)
        piece = gl.allocate_shared_memory(dtype, [NUM_CTAS, NUM_WARPS, ROWS, HEAD_DIM], SHARED)
        if i < NUM_PIECES:
            ptrs = key_cache_ptr + gl.expand_dims(offs_s * stride_kc_s, 3) + elements
            async_copy_global_to_shared(piece, ptrs, mask=mask, eviction_policy="evict_first")
            keys = keys + (piece,)  # noqa: RUF005  Gluon knows no unpacking
        else:
            ptrs = value_cache_ptr + gl.expand_dims(offs_s * stride_vc_s, 3) + elements
            async_copy_global_to_shared(piece, ptrs, mask=mask, eviction_policy="evict_first")  # past S: zeros
            values = values + (piece,)  # noqa: RUF005
        commit_group()
        wait_group(PACE - 1)
    if HAS_PROJECTION:
        rows = rows_of_warps(WARP_ROWS, LINEAR, NUM_WARPS, NUM_CTAS)
        biases = ()
        for i_n in gl.static_range(WARP_ROWS):
            biases = biases + (gl.load(bias_ptr + i_h * HEAD_DIM + rows + i_n).to(gl.float32),)  # noqa: RUF005
        wait_for_cluster()
        wait_for_previous()  # all above is constant during a step; x is the previous kernel's work
        products = multiply(query_ptr + i_b * K, weights, norm, eps, K, WARP_ROWS, BLOCK_K, NUM_WARPS, NUM_CTAS)
        for i_n in gl.static_range(WARP_ROWS):
            part = (products[i_n] + biases[i_n]) * scale
            send_to_all(barriers, here + 4 * (rows + i_n), part.to(dtype).to(gl.float32), NUM_CTAS)
        exchange(barriers, 0)
        q = read_eight(here + 4 * offs_d)
    else:
        wait_for_cluster()
        wait_for_previous()
        q = gl.load(query_ptr + i_b * stride_q_b + i_h * stride_q_h + offs_d).to(gl.float32)
        wait_group(0)

    no_score = gl.full([NUM_CTAS, NUM_WARPS, ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(3, KEYS))
    no_value = gl.zeros([1, 1, 1, HEAD_DIM], gl.float32, layout=KEYS)
    m, l, o = attend(along_keys(q * qk_scale), keys, values, first_s, ROWS * NUM_WARPS, S, no_score, no_value, KEYS)
    out_ptr += (i_b * H + i_h) * HEAD_DIM
    join_states(barriers, here + 4 * HEAD_DIM, m, l, o, out_ptr, HAS_ENDED, HEAD_DIM, KEYS, NUM_WARPS, NUM_CTAS)


class Projection(NamedTuple):
    """What makes a query of x: weight (H * D, K), bias (H * D,), layer norm (K,), (K,) and epsilon, scale."""

    weight: torch.Tensor
    bias: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor
    eps: float
    scale: float


def clustered_cross(
    query: torch.Tensor,
    projection: Projection | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    qk_scale: float,
    ended: torch.Tensor | None,
    tiles: ClusterTiles,
) -> torch.Tensor:
    """Launches `_clustered_cross_kernel` over all slots; returns (B, 1, H, D).

    query: (B, 1, H, D), or with a projection x (B, K). `qk_scale` is for a softmax in base 2.

    Raises:
        ValueError: what `check_call` does not take.
    """
    B, H, S, D = key_cache.shape
    check_call(query, (key_cache, value_cache), query.shape[1] % BLOCK_K if projection else None, tiles.num_warps)
    out = query.new_empty(B, 1, H, D)
    weight, bias, norm_weight, norm_bias, eps, scale = projection or (query, query, query, query, 0.0, 1.0)
    launch_clusters(
        _clustered_cross_kernel,
        (H, B),
        exchanged_floats(1, D, tiles.num_warps),
        tiles.num_warps,
        NUM_CTAS,
        B == 1,
        PACE=tiles.PACE,
        BLOCK_K=BLOCK_K,
        ROWS=ROWS,
        BARRIERS_SIZE=BARRIERS,
        query_ptr=query,
        weight_ptr=weight,
        bias_ptr=bias,
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        **cache_arguments(key_cache, value_cache),
        out_ptr=out,
        ended_ptr=query if ended is None else ended,
        scale=scale,
        eps=eps,
        qk_scale=qk_scale,
        stride_q_b=query.stride(0),
        stride_q_h=0 if projection else query.stride(2),
        H=H,
        S=S,
        HAS_PROJECTION=projection is not None,
        HAS_ENDED=ended is not None,
        K=query.shape[1] if projection else 0,
        HEAD_DIM=D,
        NUM_PIECES=triton.cdiv(S, NUM_CTAS * tiles.num_warps * ROWS),
    )
    return out
