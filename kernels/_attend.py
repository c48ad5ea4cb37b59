"""The inner loops of decode attention: one query, or a tile of few, over the keys [start, end) of one head.

Both keep an online softmax (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867) in fp32 and base 2: the caller
multiplies the query, or the scores, by `scale * log2(e)`.
"""

from __future__ import annotations

import torch

from ._dispatch import capability, tl, triton


def fit_registers(
    BLOCK_S: int, num_warps: int, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor
) -> dict[str, int]:
    """The launch arguments of a tile, cut down for one query token to what a program's registers hold.

    A thread holds its part of a tile of keys and of values, twice, and of an fp32 sum. tests/cross_compile.py builds every
    tile for every GPU.
    """
    T, D = query.shape[1], query.shape[3]
    arch = capability(query.device)
    # Where rows do not begin at multiples of 16 bytes, each element is loaded by itself and wants an address.
    k_b, k_h, k_s, _ = key_cache.stride()
    v_b, v_h, v_s, _ = value_cache.stride()
    is_odd = (k_b | k_h | k_s | v_b | v_h | v_s | key_cache.data_ptr() | value_cache.data_ptr()) % 16 != 0
    most = 16 if is_odd else 64 if query.dtype == torch.float16 and D == 64 and arch[0] != 10 else 32
    elements = BLOCK_S * triton.next_power_of_2(D)
    if T == 1:
        while elements > most * 32 * num_warps:
            if BLOCK_S > 16:
                BLOCK_S, elements = BLOCK_S // 2, elements // 2
            else:
                num_warps *= 2
    tile = {"BLOCK_S": BLOCK_S, "num_warps": num_warps}
    # Left to itself, NVIDIA's assembler aims at more programs at a time and spills a few bytes. So it is told otherwise, but
    # not for the tiles measured on compute capability 9.0, which spill nothing and lose up to a fifth of their speed with
    # more registers; of them, only 16 elements a thread want a few more than the 72 that they get.
    if arch == (9, 0) and not is_odd and query.dtype == torch.float16 and D == 64:
        return tile | {"maxnreg": 80} if T == 1 and elements == 16 * 32 * num_warps else tile
    return tile if arch == (0, 0) else tile | {"maxnreg": 255}


@triton.jit
def safe_max(m):
    """`m` where it is finite, else 0, so that exp2(-inf - m) is 0 and not NaN where no key was seen."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def load_tile(
    ptr,
    stride_s,
    start,
    end,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_STREAMED: tl.constexpr,  # not read again soon: leave the L2 to what is
):
    """Rows start .. start + BLOCK_S - 1 of a (S, D) slice; 0 from row `end` on, so an unused slot's content never counts."""
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (start + offs_s < end)[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    # 64 bits for where the tile begins, 32 within it: wide offsets a row would cost the registers that hold the data.
    ptr += tl.cast(start, tl.int64) * stride_s
    ptrs = ptr + (offs_s * stride_s)[:, None] + offs_d[None, :]
    return tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_first" if IS_STREAMED else "")


@triton.jit
def load_keys_values(
    key_ptr,
    value_ptr,
    stride_k_s,
    stride_v_s,
    start,
    end,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_STREAMED: tl.constexpr,
):
    """The tile of keys and of values that begins at `start`: (BLOCK_S, BLOCK_D) each."""
    k = load_tile(key_ptr, stride_k_s, start, end, HEAD_DIM, BLOCK_S, BLOCK_D, IS_STREAMED)
    v = load_tile(value_ptr, stride_v_s, start, end, HEAD_DIM, BLOCK_S, BLOCK_D, IS_STREAMED)
    return k, v


@triton.jit
def attend_one(
    q,  # (BLOCK_D,) fp32, already times scale * log2(e)
    k_next,  # (BLOCK_S, BLOCK_D): the first tile, which the caller loads as early as it may
    v_next,
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
    IS_STREAMED: tl.constexpr,
):
    for i_s in range(start, end, BLOCK_S):
        # The next tile is on its way while this one is computed: Triton pipelines only loops around `tl.dot`.
        k, v = k_next.to(tl.float32), v_next.to(tl.float32)
        k_next, v_next = load_keys_values(
            key_ptr, value_ptr, stride_k_s, stride_v_s, i_s + BLOCK_S, end, HEAD_DIM, BLOCK_S, BLOCK_D, IS_STREAMED
        )
        score = tl.where(i_s + tl.arange(0, BLOCK_S) < end, tl.sum(q[None, :] * k, axis=1), float("-inf"))
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
    IS_STREAMED: tl.constexpr,
):
    for i_s in range(start, end, BLOCK_S):
        k, v = load_keys_values(key_ptr, value_ptr, stride_k_s, stride_v_s, i_s, end, HEAD_DIM, BLOCK_S, BLOCK_D, IS_STREAMED)
        offs_s = i_s + tl.arange(0, BLOCK_S)
        visible = (offs_s < end)[None, :] & (offs_s[None, :] < limit[:, None])
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
