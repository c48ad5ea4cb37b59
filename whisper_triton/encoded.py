"""One encode a window: what `generate` has encoded last, for when it comes with the same features again.

Stock's `generate` encodes a window for the language, for no-speech and for every temperature. Its features are then the same
tensor, a copy, or a batch of some of its rows, so what counts is what they hold. Weights are told by their places and
versions, which somebody's callback may change in the middle of a call, and so are states, large as they are, that others hold
too. `generation.py` opens an `Encoded` for a call, `early.py` may fill it before stock has begun, and the encoder's override
asks it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from .graphs import modules_of
from .late import is_so

ENCODED: ContextVar[Encoded | None] = ContextVar("whisper_triton_encoded", default=None)  # of the innermost `generate` call
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Started(Protocol):
    """A graph of the encoder's that has been started."""

    parameters: list[nn.Parameter]  # the encoder's, while it `fits`

    def fits(self, encoder: nn.Module) -> bool:
        """Whether it still is what a pass of `encoder` would do, the places of the weights included."""

    def join(self) -> None:
        """To be called before anything reads the states."""


@dataclass
class _Kept:
    encoder: nn.Module
    weights: tuple[int, ...]
    features: torch.Tensor  # (B, mel bins, frames), nobody else's but with an early start
    states: torch.Tensor  # (B, frames / 2, C), which those have who asked for them
    graph: Started | None = None  # of an early start
    versions: tuple[int, int] = (0, 0)  # of both tensors
    # The states of some rows that were handed out last, with their version, and which rows they are.
    selected: tuple[weakref.ref[torch.Tensor], int, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        self.versions = self.versions_now()

    def versions_now(self) -> tuple[int, int]:
        return _version_of(self.features), _version_of(self.states)

    def has_its_weights(self) -> bool:
        """Whether the encoder's are those that the states come of; of a graph's, whether its passes are the same too."""
        if self.graph is None:
            return self.weights == weights_of(self.encoder)
        return self.graph.fits(self.encoder) and self.weights == versions_of(self.graph.parameters)


class Encoded:
    """The last features that were encoded in a call of `generate`, and their states."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def keep(self, encoder: nn.Module, features: torch.Tensor, states: torch.Tensor) -> None:
        """features: (B, mel bins, frames), copied. states: (B, frames / 2, C), copied if they count no versions.

        A version does not tell of writes through `.data`.
        """
        states = states.clone() if states.is_inference() else states
        self._kept = _Kept(encoder, weights_of(encoder), features.clone(), states)

    def keep_early(self, encoder: nn.Module, features: torch.Tensor, states: torch.Tensor, graph: Started) -> None:
        """As `keep`, but of features that the caller of `generate` may write into: their version tells.

        Args:
            graph: what makes the states, if it fits: that is looked at when they are asked for, or later.
        """
        self._kept = _Kept(encoder, versions_of(graph.parameters), features, states, graph)

    @property
    def is_early(self) -> bool:
        """Whether what is kept comes of a graph that was started early, whose passes are all alike."""
        return self._kept is not None and self._kept.graph is not None

    def copy_of(self, features: torch.Tensor) -> torch.Tensor | None:
        """A contiguous copy of features that were kept early, which are known by it from here on; None of any others."""
        kept = self._kept
        if kept is None or kept.features is not features or kept.versions != kept.versions_now():
            return None
        kept.features = features.clone(memory_format=torch.contiguous_format)
        kept.versions = kept.versions_now()
        return kept.features

    def forget(self) -> None:
        """Gives the memory back, before there is something new to keep."""
        self._kept = None

    def states_of(self, encoder: nn.Module, features: torch.Tensor) -> torch.Tensor | None:
        """The states of `features`, if each row is one of those kept; of all rows, the tensor kept.

        Waits for the device, but for features that were kept early, seen through a view of the whole, or copied by `copy_of`.
        """
        kept = self._kept
        if kept is None or kept.encoder is not encoder:
            return None
        if not (kept.has_its_weights() if kept.graph is None else is_so(kept.has_its_weights)):
            return None
        if kept.versions != kept.versions_now() or not _is_alike(features, kept.features):
            return None
        if kept.graph is not None:
            kept.graph.join()
        if _place_of(features) == _place_of(kept.features):
            return kept.states
        if features.shape[0] == kept.features.shape[0]:
            states = kept.states.clone() if kept.states.is_inference() else kept.states
            return states if torch.equal(features, kept.features) else None
        rows = (_sums(features)[:, None] == _sums(kept.features)).byte().argmax(1)
        if not torch.equal(features, kept.features.index_select(0, rows)):  # different rows may have the same sum
            return None
        states = kept.states.index_select(0, rows)
        kept.selected = weakref.ref(states), _version_of(states), rows
        return states

    def selection_of(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """All states that are kept (B, frames, C), and which rows (n,) of them `states` are, if these were handed out for some
        rows last, and neither has been written to since.
        """
        kept = self._kept
        if kept is None or kept.selected is None or kept.versions != kept.versions_now():
            return None
        selected, version, rows = kept.selected
        return (kept.states, rows) if selected() is states and version == _version_of(states) else None


def weights_of(encoder: nn.Module) -> tuple[int, ...]:
    """Places and versions of all weights.

    Writes through `.data`, and those of inference mode into weights that were made in it, count no version: they go unnoticed
    until the next call of `generate`.
    """
    weights = [p for module in modules_of(encoder) for p in module._parameters.values() if p is not None]
    # Of quantised and sharded weights, tensors of other classes, some have no place of their own.
    places = [weight.data_ptr() if type(weight) is nn.Parameter else id(weight) for weight in weights]
    return (*places, *versions_of(weights))


def versions_of(weights: Iterable[nn.Parameter]) -> tuple[int, ...]:
    """Of writes into weights; see `weights_of`."""
    return tuple([0 if weight.is_inference() else weight._version for weight in weights])


def _version_of(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_alike(features: torch.Tensor, kept: torch.Tensor) -> bool:
    return features.shape[1:] == kept.shape[1:] and (features.dtype, features.device) == (kept.dtype, kept.device)


def _place_of(features: torch.Tensor) -> tuple[object, ...]:
    return features.data_ptr(), features.shape, features.stride()


def _sums(features: torch.Tensor) -> torch.Tensor:
    """A number for each row; of integers, whose sum is the same in any order."""
    return features.contiguous().view(_INTEGERS[features.element_size()]).sum((1, 2), dtype=torch.int64)
