"""What the tests of bad input share: arguments made wrong in every way, and the check of a refusal.

A test case that is marked `bad_input` is one bad input; counts.py counts those that passed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch

Arguments = dict[str, Any]


class Bad(NamedTuple):
    """A change of good arguments, in place, and what the error must say: the offending value."""

    name: str
    change: Callable[[Arguments], object]
    message: str


def replaced(what: str, argument: str, change: Callable[[Any], Any], message: str) -> Bad:
    """The one `argument` changed."""
    return Bad(f"{argument}: {what}", lambda given: given.update({argument: change(given[argument])}), message)


def shape_of(tensor: torch.Tensor) -> str:
    """How a message writes the shape, as a pattern."""
    return re.escape(str(tuple(tensor.shape)))


def wrong_kinds(argument: str) -> list[Bad]:
    """Things that are no tensor in memory, on the device of the others."""
    refusal = rf"{argument}( 1)? must be a tensor( on the device)?, got"
    return [
        replaced("None", argument, lambda t: None, f"{refusal} NoneType"),
        replaced("a list", argument, lambda t: t.tolist(), f"{refusal} (list|int|float)"),
        replaced("a NumPy array", argument, lambda t: t.cpu().numpy(), f"{refusal} ndarray"),
        replaced("sparse", argument, torch.Tensor.to_sparse, f"{refusal} .*sparse_coo"),
        replaced("on meta", argument, lambda t: t.to("meta"), r"meta"),
    ]


def wrong_dtypes(argument: str, dtypes: Iterable[torch.dtype]) -> list[Bad]:
    return [replaced(f"{dtype}"[6:], argument, lambda t, d=dtype: t.to(d), re.escape(str(dtype))) for dtype in dtypes]


def wrong_shapes(argument: str, example: torch.Tensor) -> list[Bad]:
    """A dimension more or less, and each dimension empty or one longer."""

    def longer(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)

    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"one dim more": lambda t: t[None]}
    for dim in range(example.dim()):
        changes["one dim less"] = lambda t: t[0]
        changes[f"dim {dim} empty"] = lambda t, dim=dim: t.narrow(dim, 0, 0)
        changes[f"dim {dim} longer"] = lambda t, dim=dim: longer(t, dim)
    return [replaced(what, argument, change, shape_of(change(example))) for what, change in changes.items()]


def undense(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, each followed by a gap."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    """The first row, seen as often as there are rows: what is written to one is written to all."""
    return tensor[:1].expand_as(tensor)


def overlapping(tensor: torch.Tensor) -> torch.Tensor:
    """The same shape, dense in the last dimension, whose neighbours before it share half of their elements."""
    strides = [1]
    for size in reversed(tensor.shape[1:]):
        strides.insert(0, strides[0] * max(1, size // 2 if len(strides) == 1 else size))
    return tensor.contiguous().as_strided(tensor.shape, strides)


def tensors_in(value: object) -> list[torch.Tensor]:
    """The tensors in memory among nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return [] if value.is_meta or value.layout != torch.strided else [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for one in value for tensor in tensors_in(one)] if isinstance(value, list | tuple) else []


def assert_refused(
    call: Callable[..., object], given: Arguments, bad: Bad, error: type[Exception] | tuple[type[Exception], ...] = ValueError
) -> None:
    """`call` raises and says why, and all memory that it was given, the bad tensor's too, is as before, bit for bit."""
    good = dict(given)
    bad.change(given)
    tensors = [*tensors_in(good), *tensors_in(given)]
    before = [bits_of(tensor) for tensor in tensors]
    with pytest.raises(error, match=bad.message):
        call(**given)
    for tensor, bits in zip(tensors, before, strict=True):
        assert torch.equal(bits_of(tensor), bits)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the bytes of the whole buffer that `tensor` is a view of."""
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return raw.set_(tensor.untyped_storage()).clone()
