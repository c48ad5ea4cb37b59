"""Looks whether a model still is what its graphs are of, taken while a GPU decodes instead of before it begins.

Such a look is a walk over all modules and weights, up to 1.4 ms on a slow processor (benchmarks/NOTES.md, generate, 23). In a
call of `generate` whose tokens our own loop chooses, and with no code of the user's on the way there, nobody sees anything
before that loop has queued its first steps. So the graphs are replayed as they are, if only their weights' memory is still
there, and the looks are taken when the GPU has something to do, or else before a module runs. Where one finds another model,
what was computed is thrown away, and the call made anew by looks in time: `generation.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

LATE: ContextVar[LateLooks | None] = ContextVar("whisper_triton_late", default=None)  # of the innermost `generate` call


class ChangedError(BaseException):
    """The model is not what the graphs are of that have been replayed in this call.

    It never leaves `generate`, and is no `Exception`, which somebody on the way might take for one of stock's.
    """


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


def end_lateness() -> None:
    """As `take_late_looks`; from here on looks are taken in time, as others' code may run that sees what they are about."""
    take_late_looks()
    LATE.set(None)
