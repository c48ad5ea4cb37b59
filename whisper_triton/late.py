"""Looks whether a model still is what its graphs are of, taken while a GPU decodes instead of before it begins.

Such a look is a walk over all modules and weights, up to a millisecond on a processor whose caches hold something else by now.
In a call of `generate` whose tokens our own loop chooses, nobody sees anything before that loop has queued its first steps. So
the graphs are replayed as they are, if only their weights' memory is still there, and the looks are taken when the GPU has
something to do. Where one finds another model, what was computed is thrown away, and the call made anew by looks in time:
`generation.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

LATE: ContextVar[LateLooks | None] = ContextVar("whisper_triton_late", default=None)  # of the innermost `generate` call


class ChangedError(Exception):
    """The model is not what the graphs are of that have been replayed in this call; never seen outside of `generate`."""


class LateLooks:
    """The looks that a call of `generate` has put off."""

    def __init__(self) -> None:
        self.put_off: list[Callable[[], bool]] = []

    def take(self) -> None:
        """Takes them all.

        Raises:
            ChangedError: one of them finds something else.
        """
        looks, self.put_off = self.put_off, []
        if not all(look() for look in looks):
            raise ChangedError


def is_so(look: Callable[[], bool]) -> bool:
    """What `look` finds; or True where it is put off."""
    late = LATE.get()
    if late is None:
        return look()
    late.put_off.append(look)
    return True


def are_put_off() -> bool:
    late = LATE.get()
    return late is not None and bool(late.put_off)


def take_late_looks() -> None:
    """Takes what looks have been put off: before anybody sees what they are about.

    Raises:
        ChangedError: as `LateLooks.take`.
    """
    late = LATE.get()
    if late is not None:
        late.take()


def find_a_change() -> bool:
    """Takes what looks have been put off; returns whether one has found another model."""
    try:
        take_late_looks()
    except ChangedError:
        return True
    return False


def end_lateness() -> None:
    """As `take_late_looks`; from here on looks are taken in time, as others' code may run that sees what they are about."""
    take_late_looks()
    LATE.set(None)
