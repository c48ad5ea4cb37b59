"""What the tables in README and RESULTS.md are made of: columns, and how their numbers read.

After "±" stands a time's spread, rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from whisper_triton.benchmarks.plots import Row


def decimals(value: float, figures: int) -> int:
    """How many decimals show `figures` significant figures."""
    return max(0, figures - 1 - math.floor(math.log10(abs(value)))) if value else 0


def number(value: float, spread: float | None = None) -> str:
    """Three figures; with a spread those that it leaves, four at most, and its one figure, or two from 1 on, rounded up."""
    if not spread:
        return f"{value:.{decimals(value, 3)}f}"
    places = decimals(spread, 2 if f"{spread:e}".startswith("1") else 1)
    if abs(value) > spread:  # else it is about zero, and has no figures of its own
        places = min(places, decimals(value, 4))
    return f"{round(value, places) + 0.0:.{places}f} ± {math.ceil(spread * 10**places - 1e-9) / 10**places:.{places}f}"


class Column(NamedTuple):
    """A table's column: its text from those of a row's columns that it is `of`, "-" where the row has not all of them."""

    header: str
    of: tuple[str, ...]
    text: Callable[..., str] = str
    optional: bool = False  # left out where no row has a value
    spread: str | None = None  # a column that `text` takes last, None where a row lacks it

    def cell(self, row: Row) -> str:
        found = [row.get(column) for column in self.of]
        if any(value is None for value in found):
            return "-"
        return self.text(*found) if self.spread is None else self.text(*found, row.get(self.spread))


def measured(header: str, column: str, spread: str | None = None, optional: bool = False) -> Column:
    """A number, with its spread where a row has one."""
    return Column(header, (column,), number, optional, spread)


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def numbers(*found: float) -> str:
    return ", ".join(map(number, found))


# Of several tables.
MODEL, BATCH = Column("model", ("model",)), Column("batch", ("B",))
TIMESTAMPS = Column("timestamps", ("timestamps",), lambda value: "with" if value else "without")


class Table(NamedTuple):
    """How rows become a table: `select` says which are shown, `prepare` which are one line; `columns` may depend on them."""

    columns: Sequence[Column] | Callable[[Sequence[Row]], list[Column]]
    prepare: Callable[[Sequence[Row]], Sequence[Row]] = lambda rows: rows
    benchmark: str | None = None  # only these, where rows of a file say of which benchmark they are
    file: str | None = None  # that the rows are in, where the table has another name
    select: Callable[[Sequence[Row]], Sequence[Row]] | None = None
