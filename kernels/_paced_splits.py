"""What the paced kernels share whose programs share a head: where each leaves the softmax states of its keys, and how the last
of them joins these.
"""

from __future__ import annotations

import torch

from ._arguments import cache_arguments
from ._dispatch import triton
from ._paced import barrier, gl, gluon, join_softmax


@gluon.jit
def hand_over(
    m,  # (warps,) softmax states: maxima in base 2, sums, accumulators
    l,  # (warps,)
    o,  # (warps, D)
    i_split,
    num_splits,  # of this head: programs that hand over
    i_head,  # of the batch's heads, 64 bits
    partial_ptr,  # (heads, MAX_SPLITS * warps, D) fp32
    max_ptr,  # (heads, MAX_SPLITS * warps) fp32
    sum_ptr,  # (heads, MAX_SPLITS * warps) fp32
    out_ptr,  # (heads, D)
    counter_ptr,  # (heads,) int32, 0 before and after: programs of a head that are done
    HAS_ENDED: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    MAX_SPLITS: gl.constexpr,
    BLOCK_SPLITS: gl.constexpr,  # the power of two from MAX_SPLITS * warps on
    NUM_WARPS: gl.constexpr,
):
    """A program's share of a head, a state a warp; the last of the head's programs joins them all and writes the result."""
    LAYOUT: gl.constexpr = o.type.layout
    LAYOUT_JOIN: gl.constexpr = gl.BlockedLayout([1, 4], [128 // HEAD_DIM, HEAD_DIM // 4], [NUM_WARPS, 1], [1, 0])
    first_state = i_head * (MAX_SPLITS * NUM_WARPS)
    first_row = first_state + i_split * NUM_WARPS
    rows = first_row + gl.arange(0, NUM_WARPS, layout=gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    offs_w = gl.arange(0, NUM_WARPS, layout=m.type.layout)
    gl.store(partial_ptr + rows[:, None] * HEAD_DIM + columns[None, :], o)
    gl.store(max_ptr + first_row + offs_w, m)
    gl.store(sum_ptr + first_row + offs_w, l)
    barrier()  # all threads' stores come before the count that tells of them
    if gl.atomic_add(counter_ptr + i_head, 1, sem="acq_rel") == num_splits - 1:
        gl.store(counter_ptr + i_head, 0)
        offs_i = gl.arange(0, BLOCK_SPLITS, layout=gl.SliceLayout(1, LAYOUT_JOIN))
        offs_o = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT_JOIN))
        mask_i = offs_i < num_splits * NUM_WARPS
        # From the L2: other programs have just written them.
        m_i = gl.load(max_ptr + first_state + offs_i, mask=mask_i, other=float("-inf"), cache_modifier=".cg")
        l_i = gl.load(sum_ptr + first_state + offs_i, mask=mask_i, other=0.0, cache_modifier=".cg")
        mask_io = mask_i[:, None] & (offs_o < HEAD_DIM)[None, :]
        o_ptrs = partial_ptr + (first_state + offs_i)[:, None] * HEAD_DIM + offs_o[None, :]
        o_i = gl.load(o_ptrs, mask=mask_io, other=0.0, cache_modifier=".cg")
        out = join_softmax(m_i, l_i, o_i, HAS_ENDED)
        gl.store(out_ptr + i_head * HEAD_DIM + offs_o, out.to(out_ptr.dtype.element_ty))


def split_arguments(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    qk_scale: float,
    counters: torch.Tensor,
    ended: torch.Tensor | None,
    splits: int,
    num_warps: int,
) -> tuple[torch.Tensor, dict[str, object]]:
    """The result (B, 1, H, D), to be written, and what each of these kernels takes, with buffers for the states of up to
    `splits` programs a head; the rest is as in `paced_attention`.
    """
    (B, _, H, D), S = query.shape, key_cache.shape[2]
    states = splits * num_warps
    out = query.new_empty(B, 1, H, D)
    partial = torch.empty(B, H, states, D, dtype=torch.float32, device=query.device)
    maxima, sums = torch.empty(2, B, H, states, dtype=torch.float32, device=query.device).unbind()
    return out, {
        "query_ptr": query,
        **cache_arguments(key_cache, value_cache),
        "partial_ptr": partial,
        "max_ptr": maxima,
        "sum_ptr": sums,
        "out_ptr": out,
        "counter_ptr": counters,
        "ended_ptr": query if ended is None else ended,
        "qk_scale": qk_scale,
        "stride_q_b": query.stride(0),
        "stride_q_h": query.stride(2),
        "H": H,
        "S": S,
        "HAS_ENDED": ended is not None,
        "BLOCK_SPLITS": triton.next_power_of_2(states),
        "HEAD_DIM": D,
        "NUM_WARPS": num_warps,
        "num_warps": num_warps,
        "launch_pdl": True,
    }
