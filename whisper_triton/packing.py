"""The weights of several linear layers as one, for one matrix product instead of several: q, k and v of an attention.

`pack` moves the parameters into one tensor and makes each a view of its part, so there is no second copy, and whatever
writes a parameter writes the whole. The parameters stay the same objects under the same names; only their `data` moves, and
what replaces it (`.to()`, `.half()`, a copy of the model) ends the packing, which `pack` then finds and does anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .graphs import CAPTURES


def pack(linears: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Packs layers of one input width; what is packed already stays where it is.

    Returns:
        The weight (sum of N, K) and the bias (sum of N,), which is zero for a layer without one; None if none has one.

    Raises:
        ValueError: the layers differ in input width, dtype or device.
    """
    weights = [linear.weight for linear in linears]
    kinds = {(weight.shape[1], weight.dtype, weight.device) for weight in weights}
    if len(kinds) != 1:
        raise ValueError(f"layers of one input width, dtype and device are wanted, got {sorted(map(str, kinds))}")
    rows = [weight.shape[0] for weight in weights]
    bias = _join([linear.bias for linear in linears], rows)
    return _join(weights, rows), bias


def unpack(linears: Sequence[nn.Linear]) -> None:
    """Gives each parameter memory of its own again, where they are packed."""
    rows = [linear.weight.shape[0] for linear in linears]
    for parameters in ([linear.weight for linear in linears], [linear.bias for linear in linears]):
        if _find(parameters, rows) is not None:
            present = [parameter for parameter in parameters if parameter is not None]
            with torch.inference_mode(False):
                _move(present, [torch.empty_like(parameter.data) for parameter in present])


def _join(parameters: Sequence[nn.Parameter | None], rows: Sequence[int]) -> torch.Tensor | None:
    """One tensor of all `parameters`, each a view of its `rows` of it; zero where one is None."""
    present = [parameter for parameter in parameters if parameter is not None]
    if not present:
        return None
    packed = _find(parameters, rows)
    if packed is None:
        # Parameters must not become inference tensors, which nothing but inference mode may write again.
        with torch.inference_mode(False):
            packed = present[0].data.new_zeros(sum(rows), *present[0].shape[1:])
            parts = [part for p, part in zip(parameters, packed.split(list(rows)), strict=True) if p is not None]
            _move(present, parts)
    return packed


def _move(parameters: Sequence[nn.Parameter], places: Sequence[torch.Tensor]) -> None:
    """Copies each parameter to its place and leaves it there. Waits for the device."""
    for parameter, place in zip(parameters, places, strict=True):
        place.copy_(parameter.data)
    if places[0].is_cuda:
        # What other streams have been given to do reads the old memory, which is free below, and what comes next the new.
        with CAPTURES:
            torch.cuda.synchronize(places[0].device)
    for parameter, place in zip(parameters, places, strict=True):
        parameter.data = place


def _find(parameters: Sequence[nn.Parameter | None], rows: Sequence[int]) -> torch.Tensor | None:
    """The tensor that the parameters are already views of, one behind the other, or None. Waits for the device."""
    present = [parameter for parameter in parameters if parameter is not None]
    if not present:
        return None
    width = present[0].shape[1:].numel()
    storage, starts, start = present[0].untyped_storage(), [], 0
    for parameter, count in zip(parameters, rows, strict=True):
        if parameter is not None:
            starts.append(parameter.storage_offset() - start)
            if not parameter.is_contiguous() or parameter.untyped_storage().data_ptr() != storage.data_ptr():
                return None
        start += count * width
    # Alone in their storage: what lies beside them would be somebody else's.
    if set(starts) != {0} or storage.nbytes() != start * present[0].element_size():
        return None
    packed = present[0].data.as_strided((sum(rows), *present[0].shape[1:]), present[0].stride(), 0)
    missing = [
        part for parameter, part in zip(parameters, packed.split(list(rows)), strict=True) if parameter is None and part.any()
    ]
    return None if missing else packed
