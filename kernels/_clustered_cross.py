"""Cross-attention of one token, with the layer norm and the projection of its query or without, a cluster of programs a head
and row: see `_cluster.py`.

    q = (layer_norm(x) @ weight[h].T + bias[h]) * scale     rounded to x's dtype, as a launch of its own would leave it
    out[b, h] = softmax(q . key_cache[b, h].T) @ value_cache[b, h]

Each program computes an eighth of a head's query and sends it to all, attends to an eighth of the keys, and the first one joins
the states. Weights, keys and values come by paced copies, before the wait for the kernel before. Without the projection the
query is the caller's: `decode_attention` of few heads, whose splits need neither a second launch nor counters then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._arguments import cache_arguments
from ._cluster import (
    BARRIERS,
    NUM_CTAS,
    along_keys,
    attend,
    cluster_begin,
    covers_heads,
    exchange,
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
from ._linear_call import LinearCall
from ._paced import (
    MIN_WIDTH,
    ROWS,
    SHARED_MEMORY,
    async_load,
    commit_group,
    gl,
    gluon,
    launch_dependents,
    wait_for_previous,
    wait_group,
)


@gluon.jit
def _clustered_cross_kernel(
    x_ptr,  # (B, K) fp16/bf16; unless HAS_PROJECTION the query (B, 1, H, D)
    weight_ptr,  # (H * D, K); as the next three read if HAS_PROJECTION
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
    stride_x_b,
    stride_x_h,  # 0 if HAS_PROJECTION
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
    READ_AHEAD: gl.constexpr,
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
    if not READ_AHEAD:
        wait_for_previous()
    LINEAR: gl.constexpr = linear_layout(BLOCK_K, NUM_WARPS, NUM_CTAS)
    KEYS: gl.constexpr = keys_layout(HEAD_DIM, NUM_WARPS, NUM_CTAS)
    SHARED: gl.constexpr = split_shared(4, NUM_CTAS)
    NUM_STATES: gl.constexpr = NUM_CTAS * NUM_WARPS
    WARP_ROWS: gl.constexpr = HEAD_DIM // NUM_STATES
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    barriers = cluster_begin(
        HEAD_DIM + NUM_STATES * (HEAD_DIM + 4), 4 * HEAD_DIM * HAS_PROJECTION, NUM_STATES * (4 * HEAD_DIM + 8)
    )
    here = barriers + BARRIERS_SIZE
    i_h = gl.program_id(0).to(gl.int64)
    i_b = gl.program_id(1).to(gl.int64)
    if HAS_ENDED:
        S = gl.where(gl.load(ended_ptr + i_b) == 0, S, 0)

    if HAS_PROJECTION:
        weights = ask_for_weights(weight_ptr + i_h * HEAD_DIM * K, K, WARP_ROWS, PACE, BLOCK_K, NUM_WARPS, NUM_CTAS)
        norm = ask_for_norm(norm_weight_ptr, norm_bias_ptr, K, BLOCK_K, NUM_WARPS, NUM_CTAS)
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, KEYS))))
    elements = along_keys(offs_d)
    first_s = first_keys(NUM_PIECES * NUM_WARPS, KEYS, ROWS, NUM_WARPS, NUM_CTAS)
    key_cache_ptr += i_b * stride_kc_b + i_h * stride_kc_h
    value_cache_ptr += i_b * stride_vc_b + i_h * stride_vc_h
    keys, values = (), ()
    for i in gl.static_range(2 * NUM_PIECES):
        offs_s = first_s + i % NUM_PIECES * (ROWS * NUM_WARPS)
        mask = gl.expand_dims(offs_s < S, 3)
        piece = gl.allocate_shared_memory(dtype, [NUM_CTAS, NUM_WARPS, ROWS, HEAD_DIM], SHARED)
        if i < NUM_PIECES:
            ptrs = key_cache_ptr + gl.expand_dims(offs_s * stride_kc_s, 3) + elements
            async_load(piece, ptrs, mask=mask, eviction_policy="evict_first")
            keys = keys + (piece,)  # noqa: RUF005  Gluon knows no unpacking
        else:
            ptrs = value_cache_ptr + gl.expand_dims(offs_s * stride_vc_s, 3) + elements
            async_load(piece, ptrs, mask=mask, eviction_policy="evict_first")  # past S: zeros
            values = values + (piece,)  # noqa: RUF005
        commit_group()
        wait_group(PACE - 1)
    if HAS_PROJECTION:
        rows = rows_of_warps(WARP_ROWS, LINEAR, NUM_WARPS, NUM_CTAS)
        biases = ()
        for i_n in gl.static_range(WARP_ROWS):
            biases = biases + (gl.load(bias_ptr + i_h * HEAD_DIM + rows + i_n).to(gl.float32),)  # noqa: RUF005
    wait_for_cluster()
    wait_for_previous()  # what is read ahead is constant during a step; x is the previous kernel's work

    x_ptr += i_b * stride_x_b + i_h * stride_x_h
    if HAS_PROJECTION:
        products = multiply(x_ptr, weights, norm, eps, K, WARP_ROWS, BLOCK_K, NUM_WARPS, NUM_CTAS)
        for i_n in gl.static_range(WARP_ROWS):
            part = (products[i_n] + biases[i_n]) * scale
            send_to_all(barriers, here + 4 * (rows + i_n), part.to(dtype).to(gl.float32), NUM_CTAS)
        exchange(barriers, 0)
        q = read_eight(here + 4 * offs_d)
    else:
        q = gl.load(x_ptr + offs_d).to(gl.float32)
        wait_group(0)
    m, l, o = attend(along_keys(q * qk_scale), keys, values, first_s, ROWS * NUM_WARPS, S, KEYS)
    out_ptr += (i_b * H + i_h) * HEAD_DIM
    join_states(barriers, here + 4 * HEAD_DIM, m, l, o, out_ptr, HAS_ENDED, HEAD_DIM, KEYS, NUM_WARPS, NUM_CTAS)


class CrossTiles(NamedTuple):
    """Warps a program, pieces or chunks on their way."""

    num_warps: int
    PACE: int


def choose_cross_tiles(B: int) -> CrossTiles | None:
    """Tiles for B sequences, or None where two launches are faster. Measured by benchmarks/tune_step.py on one NVIDIA H200 in
    steps of large-v3 and medium, fp16, 2026-11-29; not on an H100, whose multiprocessors are the same.
    """
    return CrossTiles(4, 3) if B == 1 else None


MAX_KEYS = 2048  # more have not been measured


def covers_cross(call: LinearCall, key_cache: torch.Tensor, value_cache: torch.Tensor) -> bool:
    """Whether `_clustered_cross_kernel` takes these and is the faster way: one row of a wide model; from shapes, strides and
    the device alone.
    """
    B, H, S, D = key_cache.shape
    tiles = choose_cross_tiles(B)
    return tiles is not None and H * D >= MIN_WIDTH and S <= MAX_KEYS and fits_cross(call, key_cache, value_cache, tiles)


def fits_cross(call: LinearCall, key_cache: torch.Tensor, value_cache: torch.Tensor, tiles: CrossTiles) -> bool:
    """Whether the kernel takes these: a token a sequence, a bias, whole chunks of columns, rows of a head for each warp, no
    more shared memory than there is, and offsets within a head that 32 bits hold.
    """
    x, (_, _, S, D) = call.x, key_cache.shape
    return (
        x.shape[0] == key_cache.shape[0]
        and x.shape[1] % BLOCK_K == 0
        and call.biases[0] is not None
        and call.norm_weight is not None
        and D % (NUM_CTAS * tiles.num_warps) == 0
        and covers_heads(x, (key_cache, value_cache), tiles.num_warps)
        and shared_bytes(x.shape[1], S, D, tiles) <= SHARED_MEMORY
        and S * max(key_cache.stride(2), value_cache.stride(2)) < 1 << 31
    )


def shared_bytes(K: int, S: int, D: int, tiles: CrossTiles) -> int:
    """Of a program: its rows of the weight, the layer norm's, its keys and values, and what it declares."""
    states = NUM_CTAS * tiles.num_warps
    keys = triton.cdiv(S, states * ROWS) * tiles.num_warps * ROWS
    return 2 * K * (D // NUM_CTAS + 2) + 4 * keys * D + BARRIERS + 4 * (D + states * (D + 4))


def clustered_cross(
    call: LinearCall,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    qk_scale: float,
    ended: torch.Tensor | None,
    tiles: CrossTiles | None = None,
) -> torch.Tensor:
    """Launches `_clustered_cross_kernel` over all slots; returns (B, 1, H, D).

    call: the query's projection, x (B, K). `qk_scale` is for a softmax in base 2; tiles: other than `choose_cross_tiles` says.

    Raises:
        ValueError: what `fits_cross` says does not fit.
    """
    tiles = tiles or choose_cross_tiles(key_cache.shape[0])
    if tiles is None or not fits_cross(call, key_cache, value_cache, tiles):
        raise ValueError(
            "clusters are for a token a sequence in fp16 or bf16 on an H100 or H200, whole chunks of columns that fit shared"
            f" memory, caches that begin and go on at multiples of 16 (`fits_cross` in _clustered_cross.py), got {call.x.dtype}"
            f" {tuple(call.x.shape)} on {call.x.device}, caches {tuple(key_cache.shape)} with strides {key_cache.stride()} and"
            f" {value_cache.stride()}, {tiles}"
        )
    B, H, S, D = key_cache.shape
    out = call.x.new_empty(B, 1, H, D)
    states = NUM_CTAS * tiles.num_warps
    launch_clusters(
        _clustered_cross_kernel,
        (H, B),
        tiles.num_warps,
        B == 1,
        x_ptr=call.x,
        weight_ptr=call.weights[0],
        bias_ptr=call.biases[0],
        norm_weight_ptr=call.norm_weight,
        norm_bias_ptr=call.norm_bias,
        **cache_arguments(key_cache, value_cache),
        out_ptr=out,
        ended_ptr=call.x if ended is None else ended,
        scale=call.scale,
        eps=call.eps,
        qk_scale=qk_scale,
        stride_x_b=call.x.shape[1],
        stride_x_h=0,
        H=H,
        S=S,
        HAS_PROJECTION=True,
        HAS_ENDED=ended is not None,
        READ_AHEAD=True,
        K=call.x.shape[1],
        HEAD_DIM=D,
        NUM_PIECES=triton.cdiv(S, states * ROWS),
        PACE=tiles.PACE,
        BLOCK_K=BLOCK_K,
        ROWS=ROWS,
        BARRIERS_SIZE=BARRIERS,
    )
    return out
