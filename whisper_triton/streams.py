"""The seeds of rows that are sampled: a row's depends on PyTorch's generator and on what the row hears, and on nothing else.

Not on its place in the batch, which stock's fallback changes from temperature to temperature, nor on what other rows do. So it
is made, on the device, of the bits of the row's own input: the features of its window, which are the same in any batch. The
encoder's states are not, as cuBLAS rounds differently for other batch sizes. They are taken where they are all there is: where
a user has given `encoder_outputs`. Equal rows are numbered in their order, so that they draw different tokens; which of them
draws what then depends on how many of them need a further temperature. Equal windows of one row, silence say, draw alike. What
stock's loop decodes, a batch of prompts padded on the left say, draws as stock does, row after row.
"""

from __future__ import annotations

import torch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _wrap(x: int) -> int:
    """As an int64 holds it."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


_STEP = _wrap(0x9E3779B97F4A7C15)  # SplitMix64's


class RandomStreams:
    """Of one call of `generate`, which draws one number from the device's generator, if it samples at all."""

    def __init__(self) -> None:
        self._seed: torch.Tensor | None = None
        self._features: torch.Tensor | None = None
        self._attempt = 0

    def begin_window(self) -> None:
        """What is decoded from here on is of new windows, at their first temperature."""
        self._attempt = 0

    def hear(self, features: torch.Tensor | None) -> None:
        """What the next to be decoded hear (B, mel bins, frames); None where it is not known."""
        self._features = features

    def next_attempt(self) -> tuple[torch.Tensor | None, int]:
        """The features of those that are decoded now, and which of their windows' temperatures this is."""
        heard, self._features = (self._features, self._attempt), None
        self._attempt += 1
        return heard

    def seeds(self, heard: tuple[torch.Tensor | None, int], states: torch.Tensor) -> torch.Tensor:
        """(B,) int64, for rows with these encoder's states (B, frames, C). Nothing waits for the device.

        Args:
            heard: what `next_attempt` returned.
        """
        features, attempt = heard
        if features is None or features.shape[0] != states.shape[0]:
            features = states
        if self._seed is None:
            self._seed = torch.randint(1 << 62, (), device=states.device)
        content = _content(features).to(states.device)
        # How many of the rows before it are equal to each.
        earlier = (content[:, None] == content).tril(-1).sum(1)
        return _mix(_mix(_mix(content + earlier * _STEP) ^ self._seed) + _wrap(attempt * _STEP))


def _content(rows: torch.Tensor) -> torch.Tensor:
    """A hash (B,) int64 of the bits of each row; of integers, whose sum is the same in any order."""
    bits = rows.detach().contiguous().view(_INTEGERS[rows.element_size()]).flatten(1)
    weights = _mix(torch.arange(1, bits.shape[1] + 1, device=bits.device) * _STEP) | 1
    return (bits.to(torch.int64) * weights).sum(1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser (Steele et al., OOPSLA'14), which each bit of an int64 leaves in all of its result's."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift_right(x, shift)) * _wrap(factor)
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch's shift brings the sign along
