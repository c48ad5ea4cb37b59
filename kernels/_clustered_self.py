"""Layer norm, q/k/v projection, cache write and self-attention of one row in one launch, a cluster of programs a head: see
`_cluster.py`.

    q, k, v = layer_norm(x) @ weights[h].T + biases[h]      q times scale; rounded to x's dtype
    key_cache[h, p] = k; value_cache[h, p] = v
    out[h] = softmax(q . key_cache[h, : p + 1].T) @ value_cache[h, : p + 1]

Each program computes an eighth of all three, writes its part of the cache, and sends what it has to all; then it attends to an
eighth of the cached keys, the first one to the new key too, and joins the states. Weights and cached keys and values come by
paced copies, before the wait for the kernel before.
"""

from __future__ import annotations

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
)


@gluon.jit
def _clustered_self_kernel(
    x_ptr,  # (1, K) fp16/bf16
    weight_0_ptr,  # (H * D, K): q, k, v
    weight_1_ptr,
    weight_2_ptr,
    bias_0_ptr,  # (H * D,) or not read
    bias_1_ptr,
    bias_2_ptr,
    norm_weight_ptr,  # (K,)
    norm_bias_ptr,  # (K,)
    key_cache_ptr,  # (1, H, S, D)
    value_cache_ptr,  # (1, H, S, D)
    cache_position_ptr,  # () or (1,) int
    out_ptr,  # (1, 1, H, D)
    scale,
    eps,
    qk_scale,
    stride_kc_b,  # not read, as stride_vc_b: one row
    stride_kc_h,
    stride_kc_s,
    stride_vc_b,
    stride_vc_h,
    stride_vc_s,
    S,
    HAS_BIAS: gl.constexpr,  # a bit a part
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
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    barriers = cluster_begin(3 * HEAD_DIM + NUM_STATES * (HEAD_DIM + 4), 12 * HEAD_DIM, NUM_STATES * (4 * HEAD_DIM + 8))
    here = barriers + BARRIERS_SIZE
    i_h = gl.program_id(0).to(gl.int64)
    position = gl.load(cache_position_ptr).to(gl.int64)
    end = gl.minimum(gl.maximum(position, 0), S).to(gl.int32)  # of the keys that are in the cache already

    first = i_h * HEAD_DIM * K
    weight_ptrs = (weight_0_ptr + first, weight_1_ptr + first, weight_2_ptr + first)
    weights = ask_for_weights(weight_ptrs, K, WARP_ROWS, PACE, BLOCK_K, NUM_WARPS, NUM_CTAS)
    norm = ask_for_norm(norm_weight_ptr, norm_bias_ptr, K, BLOCK_K, NUM_WARPS, NUM_CTAS)
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, KEYS))))
    elements = along_keys(offs_d)
    first_s = first_keys(NUM_WARPS, KEYS, ROWS, NUM_WARPS, NUM_CTAS)  # of few keys, too, each program has some
    key_cache_ptr += i_h * stride_kc_h
    value_cache_ptr += i_h * stride_vc_h
    keys, values = (), ()
    for i in gl.static_range(NUM_PIECES):
        offs_s = first_s + i * (NUM_STATES * ROWS)
        mask = gl.expand_dims(offs_s < end, 3) & (elements < HEAD_DIM)
        k = gl.allocate_shared_memory(dtype, [NUM_CTAS, NUM_WARPS, ROWS, HEAD_DIM], SHARED)
        v = gl.allocate_shared_memory(dtype, [NUM_CTAS, NUM_WARPS, ROWS, HEAD_DIM], SHARED)
        async_copy_global_to_shared(k, key_cache_ptr + gl.expand_dims(offs_s * stride_kc_s, 3) + elements, mask=mask)
        async_copy_global_to_shared(v, value_cache_ptr + gl.expand_dims(offs_s * stride_vc_s, 3) + elements, mask=mask)
        keys, values = keys + (k,), values + (v,)  # noqa: RUF005  Gluon knows no unpacking
    commit_group()
    rows = rows_of_warps(WARP_ROWS, LINEAR, NUM_WARPS, NUM_CTAS)
    bias_ptrs = bias_0_ptr, bias_1_ptr, bias_2_ptr
    biases = ()
    for i in gl.static_range(3 * WARP_ROWS):
        bias = gl.zeros([NUM_CTAS, NUM_WARPS], gl.float32, layout=gl.SliceLayout(2, LINEAR))
        if (HAS_BIAS >> (i // WARP_ROWS)) & 1:
            bias = gl.load(bias_ptrs[i // WARP_ROWS] + i_h * HEAD_DIM + rows + i % WARP_ROWS).to(gl.float32)
        biases = biases + (bias,)  # noqa: RUF005
    wait_for_cluster()
    wait_for_previous()  # none of the kernels before writes what is read above; x is the previous one's work

    products = multiply(x_ptr, weights, norm, eps, K, 3 * WARP_ROWS, BLOCK_K, NUM_WARPS, NUM_CTAS)
    new = ()
    for i in gl.static_range(3 * WARP_ROWS):
        y = products[i] + biases[i]
        if i < WARP_ROWS:
            y = y * scale
        y = y.to(dtype)
        place = here + 4 * (i // WARP_ROWS * HEAD_DIM + rows + i % WARP_ROWS)
        send_to_all(barriers, place, y.to(gl.float32), NUM_CTAS)
        new = new + (y,)  # noqa: RUF005
    # None of the programs waits for these.
    is_inside = (rows >= 0) & (position >= 0) & (position < S)
    for i in gl.static_range(WARP_ROWS):
        gl.store(key_cache_ptr + position * stride_kc_s + rows + i, new[WARP_ROWS + i], mask=is_inside)
        gl.store(value_cache_ptr + position * stride_vc_s + rows + i, new[2 * WARP_ROWS + i], mask=is_inside)
    exchange(barriers, 0)

    place = here + 4 * offs_d
    q = along_keys(read_eight(place) * qk_scale)
    k_new, v_new = along_keys(read_eight(place + 4 * HEAD_DIM)), along_keys(read_eight(place + 8 * HEAD_DIM))
    score_new = gl.where(first_s == 0, gl.sum(q * k_new, axis=3), float("-inf"))  # beside the first key
    m, l, o = attend(q, keys, values, first_s, NUM_STATES * ROWS, end, score_new, v_new, KEYS)
    out_ptr += i_h * HEAD_DIM
    join_states(barriers, here + 12 * HEAD_DIM, m, l, o, out_ptr, False, HEAD_DIM, KEYS, NUM_WARPS, NUM_CTAS)


def clustered_self(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    eps: float,
    scale: float,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    qk_scale: float,
    tiles: ClusterTiles,
) -> torch.Tensor:
    """Launches `_clustered_self_kernel`; returns (1, 1, H, D).

    Raises:
        ValueError: what `check_call` does not take.
    """
    _, H, S, D = key_cache.shape
    check_call(x, (key_cache, value_cache), x.shape[1] % BLOCK_K, tiles.num_warps)
    out = x.new_empty(1, 1, H, D)
    arguments = {f"weight_{i}_ptr": weight for i, weight in enumerate(weights)}
    arguments |= {f"bias_{i}_ptr": x if bias is None else bias for i, bias in enumerate(biases)}
    launch_clusters(
        _clustered_self_kernel,
        (H,),
        exchanged_floats(3, D, tiles.num_warps),
        tiles.num_warps,
        NUM_CTAS,
        True,
        PACE=tiles.PACE,
        BLOCK_K=BLOCK_K,
        ROWS=ROWS,
        BARRIERS_SIZE=BARRIERS,
        x_ptr=x,
        **arguments,
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        **cache_arguments(key_cache, value_cache),
        cache_position_ptr=cache_position,
        out_ptr=out,
        scale=scale,
        eps=eps,
        qk_scale=qk_scale,
        S=S,
        HAS_BIAS=sum((bias is not None) << i for i, bias in enumerate(biases)),
        K=x.shape[1],
        HEAD_DIM=D,
        NUM_PIECES=triton.cdiv(S, NUM_CTAS * tiles.num_warps * ROWS),
    )
    return out
