"""Self-attention of a decode step: writes the new keys and values into the cache and attends, in one launch.

    key_cache[b, h, p + t] = key[b, t, h]; value_cache likewise, p = cache_position[b]
    out[b, t, h] = softmax(scale * query[b, t, h] . key_cache[b, h, : p + t + 1].T) @ value_cache[b, h, : p + t + 1]

One program a head and sequence: it keeps the new tokens' keys and values in registers, writes them once and never reads
them back, so no other program waits for them. Self caches of Whisper hold at most 448 slots, too few to be worth a split
over programs. Layouts: states (B, T, H, D), caches (B, H, S, D), result (B, T, H, D) as `out_proj` reads it.
The kernels: `_plain_append.py` for any GPU, and `_paced_append.py` for one token of a wide model on an H100 or H200, beside
kernels like it in a decoder's step.

Bytes moved: 2 * B * H * (p + T) * D elements read, 2 * B * H * T * D written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._checks import (
    check_apart,
    check_attention,
    check_caches,
    check_ended,
    check_flags,
    check_gradients,
    check_numbers,
    check_positions,
    check_states,
)
from ._dispatch import register, triton
from ._paced import MIN_WIDTH, PACED_HEAD_DIMS, are_aligned, give_up, has_paced_copies
from ._paced_append import PacedTiles, choose_append_tiles, paced_append
from ._plain_append import plain_append
from .decode_attention import LOG2E, attend_reference, forget_ended
from .update_kv_cache import update_kv_cache_reference


def append_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    *,
    scale: float,
    read_ahead: bool = False,
    ended: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `append_attention` computes, in PyTorch: `update_kv_cache`, then causal `decode_attention`."""
    _check(query, key, value, key_cache, value_cache, cache_position, scale, read_ahead, ended, is_reference=True)
    update_kv_cache_reference(key, value, key_cache, value_cache, cache_position)
    B, T = query.shape[:2]
    limit = (cache_position.reshape(-1, 1) + torch.arange(1, T + 1, device=query.device)).expand(B, -1)
    return attend_reference(query, key_cache, value_cache, forget_ended(limit, ended), scale)


class Tiles(NamedTuple):
    """How a launch is cut: keys a tile, warps a program, stages of the load pipeline."""

    BLOCK_S: int
    num_warps: int
    num_stages: int


def choose_tiles(B: int, T: int, H: int, D: int, itemsize: int, has_copies: bool = False) -> Tiles | PacedTiles:
    """Tiles from shapes alone; `itemsize`: bytes an element, `has_copies`: paced copies are to be had.

    Few heads leave the chip empty and want long tiles, many want small programs: the best compromise over lengths 20, 100
    and 440 at batches 1, 8 and 32 of 20 heads (fp16, D = 64), measured by benchmarks/tune_attention.py on one H100 80GB
    HBM3, 2026-11-22. Wider rows: fewer keys, the same registers.
    """
    if has_copies and T == 1 and D in PACED_HEAD_DIMS and H * D >= MIN_WIDTH:
        return choose_append_tiles(B)
    BLOCK_S, num_warps = (128, 4) if B * H <= 320 else (32, 1)
    if T > 1:
        BLOCK_S, num_warps = 32, 4
    return Tiles(max(16, BLOCK_S * 128 // (triton.next_power_of_2(D) * itemsize)), num_warps, num_stages=2)


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    read_ahead: bool,
    ended: torch.Tensor | None = None,
    tiles: Tiles | PacedTiles | None = None,
) -> None:
    check_apart(key_cache, value_cache)
    B, T, H, D = query.shape
    if tiles is None:
        # Paced copies have been measured in a step alone, whose links read ahead.
        has_copies = read_ahead and has_paced_copies(query.device, query.dtype) and are_aligned(key_cache, value_cache)
        tiles = choose_tiles(B, T, H, D, query.element_size(), has_copies)
    arguments = query, key, value, key_cache, value_cache, cache_position, out, scale * LOG2E, read_ahead, ended
    if isinstance(tiles, PacedTiles):
        try:
            return paced_append(*arguments, tiles)
        except Exception as error:
            give_up(error, query.device)
        tiles = choose_tiles(B, T, H, D, query.element_size())
    plain_append(*arguments, *tiles)


def _run_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    read_ahead: bool,
    ended: torch.Tensor | None,
) -> None:
    out.copy_(append_attention_reference(query, key, value, key_cache, value_cache, cache_position, scale=scale, ended=ended))


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    read_ahead: bool,
    ended: torch.Tensor | None,
) -> None:
    return None


# The result is an argument: an op that mutates a cache returns nothing, so that Inductor can functionalise it.
_op = register(
    "append_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    " Tensor cache_position, Tensor(c!) out, float scale, bool read_ahead, Tensor? ended) -> ()",
    kernel=_launch,
    reference=_run_reference,
    fake=_fake,
)


def append_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    *,
    scale: float,
    read_ahead: bool = False,
    ended: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes T new keys and values at `cache_position` and attends causally to all up to and with them, in one launch.

    Args:
        query, key, value: (B, T, H, D), T from 1 to 16, D one of 32, 64, 80, 96, 128; fp32, fp16 or bf16; any strides
            with a dense last dimension, as all tensors here.
        key_cache, value_cache: (B, H, S, D), the query's dtype, without a common element. Mutated: slots cache_position ..
            cache_position + T - 1.
        cache_position: int64 or int32 on the same device, 0-dim or (B,): the slot of the first new token.
        scale: multiplies the scores, in fp32. Whisper scales its query in the model's dtype and passes 1.0.
        read_ahead: promises that between what wrote cache_position, the slots before it and `ended` and this call there is a
            kernel launched without dependent launch or the beginning of a graph's replay; see `decode_attention`.
        ended: (B,) int64 or int32 on the same device: sequences whose number is not 0 have ended. They are written as the
            others are, but none of their cached keys is read, and what is returned for them is not meaningful.

    A token that falls outside the S slots is not written (the position is on the device, where nothing can be raised),
    and what is returned for it is not meaningful.

    Returns:
        (B, T, H, D), contiguous, the query's dtype: what `out_proj` reads as (B, T, H * D).

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit, or inputs that need gradients; the caches are then
            untouched.
    """
    _check(query, key, value, key_cache, value_cache, cache_position, scale, read_ahead, ended)
    check_gradients("append_attention", query, key, value, key_cache, value_cache)
    out = query.new_empty(query.shape)
    _op(query, key, value, key_cache, value_cache, cache_position, out, scale, read_ahead, ended)
    return out


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_position: torch.Tensor,
    scale: float,
    read_ahead: bool,
    ended: torch.Tensor | None,
    is_reference: bool = False,
) -> None:
    states = {"query": query, "key": key, "value": value, "key_cache": key_cache, "value_cache": value_cache}
    check_states(**states, is_reference=is_reference)
    check_caches(query, key_cache, value_cache, mutated=True)
    check_attention(query)
    if key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            f"query, key and value differ in shape: {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    check_positions("cache_position", cache_position, query.shape[0], query.device)
    check_ended(ended, query.shape[0], query.device)
    check_numbers(scale=scale)
    check_flags(read_ahead=read_ahead)
