"""Drawing a token for `select_token`: the random stream, and the choice among a row's k greatest values, ties included.

A token is kept if its value is no smaller than the k-th greatest, as stock's `TopKLogitsWarper` has it. The first launch leaves
the values, and the maximum of every group of 32 of them. At least k values reach the k-th greatest of the maxima, and those
above it lie in fewer than k groups: the k-th greatest value is searched among these, bit by bit, and none is sorted.
"""

from __future__ import annotations

import torch

from ._dispatch import tl, triton

GROUP = 32  # values to a maximum
MAX_TOP_K = 128


def _multiply(a: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low half of the product of two 32-bit numbers."""
    high, low = a * (x >> 16), a * (x & 0xFFFF)
    return (high + (low >> 16)) >> 16, ((high << 16) + low) & 0xFFFFFFFF


def random_bits(seeds: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """32 random bits for each row's seed, token and length: Philox4x32-10 (Salmon et al., SC'11)."""
    seeds, c0, c1 = torch.broadcast_tensors(seeds, tokens, lengths)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seeds & 0xFFFFFFFF, (seeds >> 32) & 0xFFFFFFFF
    for _ in range(10):
        (high_0, low_0), (high_2, low_2) = _multiply(0xD2511F53, c0), _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0


def gumbel_reference(seeds: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """What is added to values whose greatest is then a draw from their softmax."""
    v = ((random_bits(seeds, tokens, lengths).float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(torch.where(v < 0.015625, v * (1 + v * (0.5 + v * (1 / 3 + v * 0.25))), -torch.log(1 - v)))


def keep_top_k(scores: torch.Tensor, top_k: int | torch.Tensor) -> torch.Tensor:
    """scores (B, V), -inf below a row's k-th greatest."""
    place = torch.as_tensor(top_k, device=scores.device).clamp(1, scores.shape[1]) - 1
    least = scores.sort(-1, descending=True).values.index_select(1, place.view(1))
    return scores.masked_fill(scores < least, -torch.inf)


@triton.jit
def gumbel(seed, tokens, length):
    """As above."""
    zeros = tokens * 0
    bits, _, _, _ = tl.philox(seed, tokens, zeros + length, zeros, zeros)
    # An exponential variate, exact in its small values, which are those that win.
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    small = v * (1.0 + v * (0.5 + v * (0.3333333333333333 + v * 0.25)))
    return -tl.log(tl.where(v < 0.015625, small, -tl.log(1.0 - v)))


@triton.jit
def _ordered(x):
    """Integers in the order of the floats, of which the two zeros are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _kth_greatest(x, k):
    """The greatest number that at least k of the int32 `x` reach; the smallest of all where x are fewer."""
    found = tl.full((), -2147483648, tl.int32)
    for i in range(32):
        higher = found ^ (tl.full((), 1, tl.int32) << (31 - i))
        found = tl.where(tl.sum((x >= higher).to(tl.int32), axis=0) >= k, higher, found)
    return found


@triton.jit
def draw_from_top_k(
    values_ptr,  # (groups, GROUP) fp32 of the row: scores by temperature, -inf where a token is suppressed
    maxima_ptr,  # (groups,) fp32
    order_ptr,  # (groups,) int32, for this program to write
    groups,
    first_group,  # those before it are of tokens that may not be drawn
    k,  # at most MAX_TOP_K
    temperature,
    seed,
    length,
    text_groups,  # the groups of tokens from 0 on; those after them are of tokens from `time` on
    time,
    BLOCK_G: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_TOP_K: tl.constexpr,
):
    """The token of the row that is drawn, 0 where there is none to draw, and its log-probability among those kept, with the
    scores as they were before they were divided by the temperature."""
    offs_g = tl.arange(0, BLOCK_G)
    maxima = tl.load(maxima_ptr + offs_g, mask=offs_g < groups, other=float("-inf"))
    is_left = (maxima > float("-inf")) & (offs_g >= first_group)
    # Below every float's: what is not left reaches nothing.
    g = tl.where(is_left, _ordered(maxima), -2147483648)
    least = _kth_greatest(g, k)
    above, at = is_left & (g > least), is_left & (g == least)
    num_above = tl.sum(above.to(tl.int32), axis=0)
    count = num_above + tl.sum(at.to(tl.int32), axis=0)
    # Those above it, fewer than k, come first.
    place_above = tl.cumsum(above.to(tl.int32), axis=0) - 1
    place_at = num_above + tl.cumsum(at.to(tl.int32), axis=0) - 1
    tl.store(order_ptr + tl.where(above, place_above, place_at), offs_g, mask=above | at)
    tl.debug_barrier()  # read by other threads than have written it

    offs = tl.arange(0, MAX_TOP_K * GROUP)
    group = tl.load(order_ptr + offs // GROUP, mask=offs // GROUP < count, other=0)
    x = tl.load(values_ptr + group * GROUP + offs % GROUP, mask=offs // GROUP < count, other=float("-inf"))
    least = tl.maximum(least, _kth_greatest(_ordered(x), k))

    best, token = tl.full((), float("-inf"), tl.float32), tl.full((), 0, tl.int32)
    top = tl.max(tl.where(is_left, maxima, float("-inf")), axis=0)
    x_drawn, total = top, tl.full((), 0.0, tl.float32)
    # Once, but for ties beyond measure.
    for start in range(0, count, MAX_TOP_K):
        i = start + offs // GROUP
        group = tl.load(order_ptr + i, mask=i < count, other=0)
        x = tl.load(values_ptr + group * GROUP + offs % GROUP, mask=i < count, other=float("-inf"))
        tokens = group * GROUP + offs % GROUP + tl.where(group < text_groups, 0, time - text_groups * GROUP)
        is_kept = _ordered(x) >= least
        total += tl.sum(tl.where(is_kept, tl.exp((x - top) * temperature), 0.0), axis=0)
        key = tl.where(is_kept, x + gumbel(seed, tokens, length), float("-inf"))
        best_here, i_best = tl.max(key, axis=0, return_indices=True)
        if best_here > best:
            # Loaded again: to look for it among those at hand would take registers for all of them.
            best, drawn = best_here, tl.load(order_ptr + start + i_best // GROUP) * GROUP + i_best % GROUP
            x_drawn = tl.load(values_ptr + drawn)
            token = drawn + tl.where(drawn < text_groups * GROUP, 0, time - text_groups * GROUP)
    return token, (x_drawn - top) * temperature - tl.log(total)
