"""The inner loops of decode attention: one query, or a tile of few, over the keys [start, end) of one head.

Both keep an online softmax (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867) in fp32 and base 2: the caller
multiplies the query, or the scores, by `scale * log2(e)`.
"""

from __future__ import annotations

from ._dispatch import tl, triton


@triton.jit
def safe_max(m):
    """`m` where it is finite, else 0, so that exp2(-inf - m) is 0 and not NaN where no key was seen."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def load_tile(ptr, stride_s, offs_s, offs_d, mask_s, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `offs_s` of a (S, D) slice; 0 where masked, so that what lies in an unused slot never counts."""
    mask = mask_s[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    return tl.load(ptr + offs_s.to(tl.int64)[:, None] * stride_s + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def attend_one(
    q,  # (BLOCK_D,) fp32, already times scale * log2(e)
    key_ptr,
    value_ptr,
    stride_k_s,
    stride_v_s,
    start,
    end,
    m_i,  # (BLOCK_S,) fp32: every row of the tile has its own softmax state ...
    l_i,  # (BLOCK_S,)
    acc,  # (BLOCK_S, BLOCK_D) ... so that nothing is exchanged between warps until all keys are read
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_d = tl.arange(0, BLOCK_D)
    for i_s in range(start, end, BLOCK_S):
        offs_s = i_s + tl.arange(0, BLOCK_S)
        mask_s = offs_s < end
        k = load_tile(key_ptr, stride_k_s, offs_s, offs_d, mask_s, HEAD_DIM, BLOCK_D).to(tl.float32)
        v = load_tile(value_ptr, stride_v_s, offs_s, offs_d, mask_s, HEAD_DIM, BLOCK_D).to(tl.float32)
        score = tl.where(mask_s, tl.sum(q[None, :] * k, axis=1), float("-inf"))
        m_new = tl.maximum(m_i, score)
        alpha = tl.exp2(m_i - safe_max(m_new))
        p = tl.exp2(score - safe_max(m_new))
        l_i = l_i * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * v
        m_i = m_new
    return m_i, l_i, acc


@triton.jit
def merge_rows(m_i, l_i, acc):
    """Joins softmax states that saw different keys: (N,), (N,), (N, D) -> scalar, scalar, (D,)."""
    m = tl.max(m_i, axis=0)
    alpha = tl.exp2(m_i - safe_max(m))
    return m, tl.sum(l_i * alpha, axis=0), tl.sum(acc * alpha[:, None], axis=0)


@triton.jit
def attend_few(
    q,  # (BLOCK_T, BLOCK_D), the cache's dtype
    limit,  # (BLOCK_T,): query t sees the slots before limit[t]
    qk_scale,
    key_ptr,
    value_ptr,
    stride_k_s,
    stride_v_s,
    start,
    end,
    m_i,  # (BLOCK_T,) fp32
    l_i,  # (BLOCK_T,)
    acc,  # (BLOCK_T, BLOCK_D)
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    offs_d = tl.arange(0, BLOCK_D)
    for i_s in range(start, end, BLOCK_S):
        offs_s = i_s + tl.arange(0, BLOCK_S)
        mask_s = offs_s < end
        k = load_tile(key_ptr, stride_k_s, offs_s, offs_d, mask_s, HEAD_DIM, BLOCK_D)
        v = load_tile(value_ptr, stride_v_s, offs_s, offs_d, mask_s, HEAD_DIM, BLOCK_D)
        visible = mask_s[None, :] & (offs_s[None, :] < limit[:, None])
        m_i, l_i, acc = attend_tile(q, k, v, visible, qk_scale, m_i, l_i, acc)
    return m_i, l_i, acc


@triton.jit
def attend_tile(q, k, v, visible, qk_scale, m_i, l_i, acc):
    """One tile of keys (N, D) and values (N, D) for the queries (BLOCK_T, D); `visible` (BLOCK_T, N)."""
    # "ieee": Triton would otherwise round fp32 inputs to tf32.
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    score = tl.where(visible, score, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(score, axis=1))
    alpha = tl.exp2(m_i - safe_max(m_new))
    p = tl.exp2(score - safe_max(m_new)[:, None])
    l_i = l_i * alpha + tl.sum(p, axis=1)
    acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return m_new, l_i, acc


@triton.jit
def normalise(l_i, acc):
    """acc / l_i, and 0 for a query that saw no key. `l_i` has one dimension less than `acc`, or is broadcastable."""
    return acc / tl.where(l_i == 0.0, 1.0, l_i)
