"""Weights and caches of all cross-attention layers, and the table of addresses by which `project_cross_kv` finds them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch

from ._checks import HEAD_DIMS, check_kinds, check_mutated, check_states, check_tensors, share_memory


class CrossTable(NamedTuple):
    """Where the layers' weights and caches lie: built once by `cross_table`, and anew in each call once they have moved."""

    key_weights: list[torch.Tensor]  # (H * D, C) each
    value_weights: list[torch.Tensor]  # (H * D, C) each
    value_biases: list[torch.Tensor]  # (H * D,) each, or no tensor at all
    key_caches: list[torch.Tensor]  # (B, H, S, D) each
    value_caches: list[torch.Tensor]  # (B, H, S, D) each
    pointers: torch.Tensor  # (5, L) int64 on the device, as the kernel reads it
    addresses: torch.Tensor  # the same on the host

    @property
    def is_aligned(self) -> bool:
        """All of them begin at a multiple of 16 bytes."""
        return not (self.addresses % 16).any()


def cross_table(
    key_weights: Sequence[torch.Tensor],
    value_weights: Sequence[torch.Tensor],
    value_biases: Sequence[torch.Tensor] | None,
    key_caches: Sequence[torch.Tensor],
    value_caches: Sequence[torch.Tensor],
) -> CrossTable:
    """Checks a decoder's cross-attention weights and caches, and writes their addresses to the device.

    Args:
        key_weights, value_weights: a contiguous (H * D, C) for each layer. value_biases: a contiguous (H * D,) for each, or
            None. Whisper's keys have none.
        key_caches, value_caches: a (B, H, S, D) for each layer, all of the same strides, dense in the last dimension, no two
            with a common element; D one of 32, 64, 80, 96, 128. What `project_cross_kv` mutates.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit.
    """
    given = {"key_weights": key_weights, "value_weights": value_weights, "key_caches": key_caches, "value_caches": value_caches}
    check_kinds(Sequence, **given, **({} if value_biases is None else {"value_biases": value_biases}))
    biases = list(value_biases or ())
    lists = [list(key_weights), list(value_weights), biases, list(key_caches), list(value_caches)]
    L = len(lists[0])
    if L == 0 or any(len(tensors) not in (L, 0 if tensors is biases else L) for tensors in lists):
        raise ValueError(f"as many of each are wanted as layers, at least one: got {[len(tensors) for tensors in lists]}")
    weights, caches = lists[0] + lists[1], lists[3] + lists[4]
    kinds = ("key_weight", "value_weight", "value_bias", "key_cache", "value_cache")
    named = [{f"{kind} {i}": t for i, t in enumerate(tensors)} for kind, tensors in zip(kinds, lists, strict=True)]
    for tensors in named:
        check_tensors(**tensors)
    check_states(**named[3], **named[4], is_reference=True)  # what kernels do not take is refused where they are launched
    check_mutated(**named[3], **named[4])
    first, C = caches[0], weights[0].shape[-1] if weights[0].dim() else 0
    _, H, _, D = first.shape
    if D not in HEAD_DIMS or first.numel() == 0 or C == 0:
        raise ValueError(f"head dim must be one of {HEAD_DIMS} and nothing empty, got caches {tuple(first.shape)}, {C=}")
    for cache in caches:
        if cache.shape != first.shape or cache.stride() != first.stride():
            raise ValueError(
                f"caches must all have shape {tuple(first.shape)} and strides {first.stride()}, got {tuple(cache.shape)} and "
                f"{cache.stride()}"
            )
    for tensors, shape in ((weights, (H * D, C)), (biases, (H * D,))):
        for tensor in tensors:
            if tensor.shape != shape or not tensor.is_contiguous():
                raise ValueError(f"{shape} is wanted, contiguous, got {tuple(tensor.shape)}, strides {tensor.stride()}")
            if tensor.dtype != first.dtype or tensor.device != first.device:
                raise ValueError(f"{tensor.dtype} on {tensor.device} does not go with caches {first.dtype} on {first.device}")
    for (a, one), (b, other) in combinations((named[3] | named[4]).items(), 2):
        if share_memory(one, other):
            distance = other.data_ptr() - one.data_ptr()
            raise ValueError(f"{a} and {b} share memory: strides {one.stride()}, {distance} bytes from the one to the other")
    addresses = addresses_of(*lists)
    return CrossTable(*lists, addresses.to(first.device), addresses)


def addresses_of(
    key_weights: list[torch.Tensor],
    value_weights: list[torch.Tensor],
    value_biases: list[torch.Tensor],
    key_caches: list[torch.Tensor],
    value_caches: list[torch.Tensor],
) -> torch.Tensor:
    """(5, L) int64 on the host; without biases the last row, which is not read then, repeats the first."""
    lists = key_weights, value_weights, key_caches, value_caches, value_biases or key_weights
    return torch.tensor([[t.data_ptr() for t in tensors] for tensors in lists], dtype=torch.int64, device="cpu")
