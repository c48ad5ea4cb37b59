"""`append_attention` of one token, a cluster of programs a head and row, each of which attends to its share of the cached keys:
see `_cluster.py`.

The new key and value are written by the cluster's first program, which attends to them too, and which joins the states. The
cached ones are asked for all at once, by asynchronous copies: a share of them fits a program's shared memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._arguments import cache_arguments, position_arguments
from ._cluster import (
    BARRIERS,
    ROWS,
    along_keys,
    attend,
    cluster_begin,
    covers_heads,
    first_keys,
    join_states,
    keys_layout,
    launch_clusters,
    split_shared,
    wait_for_cluster,
)
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

MAX_SLOTS = 512  # of a self cache: Whisper has 448


@gluon.jit
def _clustered_append_kernel(
    query_ptr,  # (B, 1, H, D) fp16/bf16
    key_ptr,  # (B, 1, H, D)
    value_ptr,  # (B, 1, H, D)
    key_cache_ptr,  # (B, H, S, D)
    value_cache_ptr,  # (B, H, S, D)
    cache_position_ptr,  # () or (B,) int
    ended_ptr,  # (B,) int; not read unless HAS_ENDED
    out_ptr,  # (B, 1, H, D)
    qk_scale,
    stride_q_b,
    stride_q_h,
    stride_k_b,
    stride_k_h,
    stride_v_b,
    stride_v_h,
    stride_kc_b,
    stride_kc_h,
    stride_kc_s,
    stride_vc_b,
    stride_vc_h,
    stride_vc_s,
    stride_cp_b,
    H,
    S,
    HAS_ENDED: gl.constexpr,
    READ_AHEAD: gl.constexpr,  # position and cached tokens may be read before the previous kernel has finished
    HEAD_DIM: gl.constexpr,
    NUM_PIECES: gl.constexpr,
    ROWS: gl.constexpr,
    BARRIERS_SIZE: gl.constexpr,
    NUM_WARPS: gl.constexpr,
    NUM_CTAS: gl.constexpr,
):
    launch_dependents()
    KEYS: gl.constexpr = keys_layout(HEAD_DIM, NUM_WARPS, NUM_CTAS)
    SHARED: gl.constexpr = split_shared(4, NUM_CTAS)
    NUM_STATES: gl.constexpr = NUM_CTAS * NUM_WARPS
    dtype: gl.constexpr = key_cache_ptr.dtype.element_ty
    barriers = cluster_begin(NUM_STATES * (HEAD_DIM + 4), 0, NUM_STATES * (4 * HEAD_DIM + 8))
    if not READ_AHEAD:
        wait_for_previous()
    i_h = gl.program_id(0).to(gl.int64)
    i_b = gl.program_id(1).to(gl.int64)
    position = gl.load(cache_position_ptr + i_b * stride_cp_b).to(gl.int64)
    end = gl.minimum(gl.maximum(position, 0), S).to(gl.int32)  # of the keys that are in the cache already
    if HAS_ENDED:
        end = gl.where(gl.load(ended_ptr + i_b) == 0, end, 0)
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, KEYS))))
    elements = along_keys(offs_d)
    first_s = first_keys(NUM_WARPS, KEYS, ROWS, NUM_WARPS, NUM_CTAS)  # of few keys, too, each program has some
    key_cache_ptr += i_b * stride_kc_b + i_h * stride_kc_h
    value_cache_ptr += i_b * stride_vc_b + i_h * stride_vc_h
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
    wait_for_cluster()
    if READ_AHEAD:
        wait_for_previous()

    q = gl.load(query_ptr + i_b * stride_q_b + i_h * stride_q_h + offs_d).to(gl.float32) * qk_scale
    k_new = gl.load(key_ptr + i_b * stride_k_b + i_h * stride_k_h + offs_d)
    v_new = gl.load(value_ptr + i_b * stride_v_b + i_h * stride_v_h + offs_d)
    # Of what all programs hold alike the first one stores.
    mask_new = (position >= 0) & (position < S) & (offs_d < HEAD_DIM)
    gl.store(key_cache_ptr + position * stride_kc_s + offs_d, k_new, mask=mask_new)
    gl.store(value_cache_ptr + position * stride_vc_s + offs_d, v_new, mask=mask_new)
    q = along_keys(q)
    score_new = gl.sum(q * along_keys(k_new.to(gl.float32)), axis=3)
    score_new = gl.where(first_s == 0, score_new, float("-inf"))  # beside the first key
    wait_group(0)
    v_new = along_keys(v_new.to(gl.float32))
    m, l, o = attend(q, keys, values, first_s, NUM_STATES * ROWS, end, score_new, v_new, KEYS)
    out_ptr += (i_b * H + i_h) * HEAD_DIM
    join_states(barriers, barriers + BARRIERS_SIZE, m, l, o, out_ptr, False, HEAD_DIM, KEYS, NUM_WARPS, NUM_CTAS)


class ClusterTiles(NamedTuple):
    """Programs a head, warps a program: both powers of two."""

    NUM_CTAS: int
    num_warps: int


def covers_clusters(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, tiles: ClusterTiles) -> bool:
    """Whether `_clustered_append_kernel` takes these: one token, no more slots than Whisper has, heads that divide among the
    programs.
    """
    return (
        query.shape[1] == 1
        and key_cache.shape[2] <= MAX_SLOTS
        and tiles.NUM_CTAS in (2, 4, 8)
        and covers_heads(query, (key_cache, value_cache), tiles.num_warps)
    )


def clustered_append(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    out: torch.Tensor,
    qk_scale: float,
    read_ahead: bool,
    ended: torch.Tensor | None,
    tiles: ClusterTiles,
) -> None:
    """Launches `_clustered_append_kernel`. out: (B, 1, H, D), is written.

    `qk_scale` is for a softmax in base 2; `read_ahead` and `ended` as in `append_attention`.

    Raises:
        ValueError: what `covers_clusters` does not cover; the caches are then untouched.
    """
    if not covers_clusters(query, key_cache, value_cache, tiles):
        raise ValueError(
            "clusters are for one fp16 or bf16 token on an H100 and caches that begin and go on at multiples of 16"
            f" (`covers_clusters` in _clustered_append.py), got {tuple(query.shape)} {query.dtype} on {query.device}, caches"
            f" {tuple(key_cache.shape)} with strides {key_cache.stride()} and {value_cache.stride()}, {tiles}"
        )
    B, _, H, D = query.shape
    S = key_cache.shape[2]
    states = tiles.NUM_CTAS * tiles.num_warps
    launch_clusters(
        _clustered_append_kernel,
        (H, B),
        states * (D + 4),
        tiles.num_warps,
        tiles.NUM_CTAS,
        B == 1,
        query_ptr=query,
        key_ptr=key,
        value_ptr=value,
        **cache_arguments(key_cache, value_cache),
        **position_arguments(cache_position),
        ended_ptr=cache_position if ended is None else ended,
        out_ptr=out,
        qk_scale=qk_scale,
        stride_q_b=query.stride(0),
        stride_q_h=query.stride(2),
        stride_k_b=key.stride(0),
        stride_k_h=key.stride(2),
        stride_v_b=value.stride(0),
        stride_v_h=value.stride(2),
        H=H,
        S=S,
        HAS_ENDED=ended is not None,
        READ_AHEAD=read_ahead,
        HEAD_DIM=D,
        NUM_PIECES=triton.cdiv(S, states * ROWS),
        ROWS=ROWS,
        BARRIERS_SIZE=BARRIERS,
    )
