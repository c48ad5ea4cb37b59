"""Attention of few new tokens over a static cache, the keys split over programs (flash-decoding).

    out[b, t, h] = softmax(scale * query[b, t, h] . key_cache[b, h, :n].T) @ value_cache[b, h, :n]

with n = kv_length[b] for the last query token and one less for each token before it (`is_causal`), or n = kv_length[b]
for all of them. The cache is (B, H, S, D), the query (B, T, H, D) and so is the result, which `out_proj` reads as
(B, T, H * D): no transposed copy on either side. Slots from kv_length on are never read.

At batch 1 the H heads of Whisper cannot fill the chip, so each head's keys are cut into NUM_SPLITS chunks, one a program; a
second tiny kernel merges the partial softmax states in a fixed order, or, with `counters`, the last of a head's programs
does, or, in a cluster, the first. The split depends on shapes and the GPU alone, so results do not depend on the run or on the
other rows of the batch. Method: flash-decoding, https://pytorch.org/blog/flash-decoding/. The kernels: `_plain_attention.py`
for any GPU, and on an H100 or H200, over the cross caches of a wide model, `_clustered_attention.py` for few heads, and with
`counters` `_paced_attention.py`, for many heads `_paced_stream.py`.

Bytes moved: 2 * B * H * n * D elements (each key and value once).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._checks import (
    check_attention,
    check_caches,
    check_counters,
    check_ended,
    check_flags,
    check_gradients,
    check_numbers,
    check_positions,
    check_states,
)
from ._clustered_attention import clustered_attention, covers_clusters
from ._dispatch import register, triton
from ._paced import give_up
from ._paced_attention import covers_attention, paced_attention
from ._paced_stream import choose_stream_tiles, paced_stream
from ._plain_attention import plain_attention

LOG2E = 1.4426950408889634


def decode_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_length: torch.Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = True,
    read_ahead: bool = False,
    counters: torch.Tensor | None = None,
    ended: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `decode_attention` computes, in PyTorch: fp32 inside, float64 throughout for float64 inputs."""
    _check(query, key_cache, value_cache, kv_length, scale, is_causal, read_ahead, counters, ended, is_reference=True)
    B, T, _, _ = query.shape
    S = key_cache.shape[2]
    if kv_length is None and ended is None and (T == 1 or not is_causal):
        return attend_reference(query, key_cache, value_cache, None, scale)
    length = torch.full((B, 1), S, device=query.device) if kv_length is None else kv_length.reshape(-1, 1).expand(B, 1)
    tokens = torch.arange(T, device=query.device)
    limit = length.clamp(max=S) + (tokens - (T - 1)) * is_causal
    return attend_reference(query, key_cache, value_cache, forget_ended(limit, ended), scale)


def forget_ended(limit: torch.Tensor, ended: torch.Tensor | None) -> torch.Tensor:
    """Slots that queries see (B, T): none for sequences that have ended."""
    return limit if ended is None else limit.masked_fill(ended[:, None] != 0, 0)


def attend_reference(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, limit: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention of (B, T, H, D) over (B, H, S, D) in which query t of row b sees the slots before `limit[b, t]`, or all."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    if limit is None:
        scores = query.transpose(1, 2).to(dtype) @ key_cache.to(dtype).transpose(2, 3) * scale
        return (scores.softmax(-1) @ value_cache.to(dtype)).transpose(1, 2).to(query.dtype).contiguous()
    slots = torch.arange(key_cache.shape[2], device=query.device)
    visible = slots < limit[:, None, :, None]  # (B, 1, T, S)
    used = visible.any(2)[..., None]  # (B, 1, S, 1): an unused slot may hold anything, NaN too
    scores = query.transpose(1, 2).to(dtype) @ key_cache.to(dtype).masked_fill(~used, 0).transpose(2, 3) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).masked_fill(~visible, 0)  # no key at all: 0, not NaN
    out = weights @ value_cache.to(dtype).masked_fill(~used, 0)
    return out.transpose(1, 2).to(query.dtype).contiguous()


class Tiles(NamedTuple):
    """How a launch is cut: keys a tile, programs a head, warps a program, stages of the load pipeline."""

    BLOCK_S: int
    NUM_SPLITS: int
    num_warps: int
    num_stages: int


# One query token, fp16, D = 64, 1500 keys: measured by benchmarks/tune_attention.py on one H100 80GB HBM3, 2026-11-23.
# Up to so many heads in the batch (B * H): keys a tile, programs in all (0: one a head), warps a program.
MEASURED_TILES = (
    (30, 128, 240, 4),
    (70, 64, 480, 2),
    (100, 128, 240, 4),
    (140, 32, 720, 2),
    (180, 32, 960, 1),
    (264, 128, 0, 4),
    (300, 32, 1400, 2),
    (360, 32, 1920, 1),
    (520, 64, 0, 4),
    (600, 32, 2240, 2),
    (720, 32, 0, 4),
    (1040, 64, 0, 4),
    (1200, 32, 2400, 2),
)
MANY_HEADS = (128, 0, 4)
# Where the last program of a head joins its splits, in the decoder's step; measured by benchmarks/tune_step.py on the same GPU,
# 2026-11-24, at 20 and 160 heads (there beside slower linear layers than the present ones). Up to so many heads in the batch:
# keys a tile, programs a head, warps a program.
MEASURED_JOINED_TILES = (
    (30, 256, 6, 8),
    (180, 128, 12, 4),
)


def choose_tiles(B: int, T: int, H: int, S: int, D: int, itemsize: int, joins: bool = False) -> Tiles:
    """Tiles from shapes alone (never from values: the split of the keys is part of the result's rounding).

    `itemsize`: bytes an element; `joins`: the splits are joined in the same launch. A tile of wider rows than the measured ones
    holds fewer keys, so that it fits the same registers.
    """
    BLOCK_S, programs, num_warps = next((tiles for heads, *tiles in MEASURED_TILES if heads >= B * H), MANY_HEADS)
    if joins:
        few = next(((keys, n * B * H, warps) for heads, keys, n, warps in MEASURED_JOINED_TILES if heads >= B * H), None)
        BLOCK_S, programs, num_warps = few or (BLOCK_S, programs, num_warps)
    if S <= 512:  # a self cache: too few keys to be worth the second launch that joins the splits
        BLOCK_S, programs, num_warps = 128, 0, 4
    if T > 1:
        BLOCK_S, num_warps = 32, 4
    BLOCK_S = max(16, BLOCK_S * 128 // (triton.next_power_of_2(D) * itemsize))
    splits = max(1, min(programs // (B * H), S // 64, triton.cdiv(S, BLOCK_S)))
    return Tiles(BLOCK_S, splits, num_warps, num_stages=2)


def _launch(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_length: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    read_ahead: bool,
    counters: torch.Tensor | None = None,
    ended: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    B, T, H, D = query.shape
    S = key_cache.shape[2]
    caches = key_cache, value_cache
    joins = counters is not None and T == 1
    if kv_length is None and tiles is None:  # all slots, as in a cross cache
        try:
            if joins and read_ahead and covers_attention(query, *caches):
                stream = choose_stream_tiles(B * H, D)
                arguments = query, *caches, scale * LOG2E, counters, ended
                return paced_attention(*arguments) if stream is None else paced_stream(*arguments, stream)
            if not joins and covers_clusters(query, *caches):
                return clustered_attention(query, *caches, scale * LOG2E, ended, read_ahead)
        except Exception as error:
            give_up(error, query.device)
    tiles = tiles or choose_tiles(B, T, H, S, D, query.element_size(), joins)
    return plain_attention(query, *caches, kv_length, scale * LOG2E, is_causal, read_ahead, counters, ended, *tiles)


def _run_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_length: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    read_ahead: bool,
    counters: torch.Tensor | None,
    ended: torch.Tensor | None,
) -> torch.Tensor:
    return decode_attention_reference(query, key_cache, value_cache, kv_length, scale=scale, is_causal=is_causal, ended=ended)


def _fake(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_length: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    read_ahead: bool,
    counters: torch.Tensor | None,
    ended: torch.Tensor | None,
) -> torch.Tensor:
    return query.new_empty(query.shape)


# Not declared as mutated: the counters are after a call what they were before it.
_op = register(
    "decode_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor? kv_length, float scale, bool is_causal,"
    " bool read_ahead, Tensor? counters, Tensor? ended) -> Tensor",
    kernel=_launch,
    reference=_run_reference,
    fake=_fake,
)


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_length: torch.Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = True,
    read_ahead: bool = False,
    counters: torch.Tensor | None = None,
    ended: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attends from T new tokens to a static cache; nothing is mutated.

    Args:
        query: (B, T, H, D), T from 1 to 16, D one of 32, 64, 80, 96, 128; fp32, fp16 or bf16; any strides with a dense
            last dimension, as all tensors here.
        key_cache, value_cache: (B, H, S, D), the query's dtype.
        kv_length: int64 or int32 on the same device, 0-dim or (B,): how many slots hold keys, the T new tokens' own
            included. None: all S, as in the cross cache. A length past S counts as S.
        scale: multiplies the scores, in fp32. Whisper scales its query in the model's dtype and passes 1.0.
        is_causal: each of the T tokens sees one slot less than the next (self-attention). False: all see kv_length slots.
        read_ahead: promises that between what wrote the caches and kv_length and this call there is a kernel launched without
            dependent launch, as PyTorch's all are, or the beginning of a graph's replay. They are then read while the kernels
            before this call still run. True of a cross cache in a replayed step. No effect before compute capability 9.0.
        counters: (B * H,) int32 zeros on the same device, or more of them. With them the splits of one token (T = 1) are
            joined by each head's last program instead of by a second launch. They are zeros again afterwards; two calls
            that may run at the same time must not share them.
        ended: (B,) int64 or int32 on the same device: sequences whose number is not 0 have ended. None of their keys is
            read, and what is returned for them is 0. With `read_ahead` it may be read as early as the caches.

    Returns:
        (B, T, H, D), contiguous, the query's dtype: what `out_proj` reads as (B, T, H * D). A query that sees no key
        gives 0, and so may one whose scores are all -inf, where PyTorch gives NaN.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit, or inputs that need gradients.
    """
    _check(query, key_cache, value_cache, kv_length, scale, is_causal, read_ahead, counters, ended)
    check_gradients("decode_attention", query, key_cache, value_cache)
    return _op(query, key_cache, value_cache, kv_length, scale, is_causal, read_ahead, counters, ended)


def _check(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_length: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    read_ahead: bool,
    counters: torch.Tensor | None,
    ended: torch.Tensor | None,
    is_reference: bool = False,
) -> None:
    check_states(query=query, key_cache=key_cache, value_cache=value_cache, is_reference=is_reference)
    check_caches(query, key_cache, value_cache)
    check_attention(query)
    if kv_length is not None:
        check_positions("kv_length", kv_length, query.shape[0], query.device)
    if counters is not None:
        check_counters(counters, query.shape[0] * query.shape[2], query.device)
    check_ended(ended, query.shape[0], query.device)
    check_numbers(scale=scale)
    check_flags(is_causal=is_causal, read_ahead=read_ahead)
