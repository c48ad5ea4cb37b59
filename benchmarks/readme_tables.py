"""README's tables: which columns of a row file they show, and how its numbers read.

After "±" stands a time's spread, rounded up; in brackets the least and the greatest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from whisper_triton.benchmarks.plots import named, values

OURS, STOCK, DYNAMIC = "accelerate", "stock static+compile", "stock dynamic"

Row = dict[str, Any]


def decimals(value: float, figures: int) -> int:
    """How many decimals show `figures` significant figures."""
    return max(0, figures - 1 - math.floor(math.log10(abs(value)))) if value else 0


def number(value: float, spread: float | None = None) -> str:
    """Three figures; with a spread those that it leaves, four at most, and its one figure, or two from 1 on, rounded up."""
    if not spread:
        return f"{value:.{decimals(value, 3)}f}"
    places = min(decimals(value, 4), decimals(spread, 2 if f"{spread:e}".startswith("1") else 1))
    return f"{value:.{places}f} ± {math.ceil(spread * 10**places - 1e-9) / 10**places:.{places}f}"


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


MODEL, BATCH = Column("model", ("model",)), Column("batch", ("B",))
STOCK_OVER_OURS = measured("stock / ours", "stock/ours")
ALTERNATIVES = [
    measured("SDPA cuDNN", "cudnn_us", optional=True),
    measured("SDPA flash", "flash_us", optional=True),
    measured("SDPA efficient", "efficient_us", optional=True),
    measured("SDPA math", "math_us", optional=True),
    measured("FlexAttention", "flex_us", optional=True),
]


class Table(NamedTuple):
    """How rows become a table; `columns` may depend on the rows, and `prepare` on which are one line."""

    command: str  # for rows that do not say how they were made
    columns: Sequence[Column] | Callable[[Sequence[Row]], list[Column]]
    prepare: Callable[[Sequence[Row]], Sequence[Row]] = lambda rows: rows
    benchmark: str | None = None  # only these, where rows of a file say of which benchmark they are


def by_variant(rows: Sequence[Row]) -> list[Row]:
    """One row for all variants of a model and batch: their columns as "variant: column"."""
    merged: dict[tuple[object, ...], Row] = {}
    for row in rows:
        same = {column: row.get(column) for column in ("gpu", "dtype", "model", "B")}
        calls = {f"{row['variant']}: {column}": value for column, value in row.items() if column not in same}
        merged.setdefault(tuple(same.values()), same).update(calls)
    return list(merged.values())


def calls_text(rate: float, ms: float, least: float, greatest: float) -> str:
    places = decimals(rate, 3)
    return f"{rate:.{places}f} ({rate * ms / greatest:.{places}f}-{rate * ms / least:.{places}f})"


def generate_columns(rows: Sequence[Row]) -> list[Column]:
    variants = sorted(values(rows, "variant"), key=lambda variant: variant == OURS)
    rates = [
        Column(f"{v}, tok/s", tuple(f"{v}: {c}" for c in ("tok/s", "ms", "min_ms", "max_ms")), calls_text) for v in variants
    ]
    gains = [
        Column(f"{OURS} / {v}", (f"{OURS}: tok/s", f"{v}: tok/s"), lambda ours, stock: number(ours / stock), optional=True)
        for v in (DYNAMIC, STOCK)
    ]
    firsts = (f"{STOCK}: first_s", f"{OURS}: first_s")
    first = Column(f"first call, s: {STOCK}, {OURS}", firsts, lambda *s: ", ".join(map(number, s)), optional=True)
    return [MODEL, BATCH, *rates, *gains, first]


TABLES = {
    "generate": Table("python benchmarks/generate.py", generate_columns, by_variant),
    "generate_accelerate": Table(
        'python benchmarks/generate.py --variants "stock static+compile;accelerate"', generate_columns, by_variant
    ),
    "decoder_step": Table(
        "python benchmarks/decoder_step.py",
        [
            MODEL,
            BATCH,
            measured("ms", "ms", "spread_ms"),
            measured("floor, ms", "floor_ms"),
            Column("share of the bandwidth", ("share_%",), "{:.0f} %".format),
            measured("bandwidth, GB/s", "bandwidth_GB/s", optional=True),
            measured("stock compiled, ms", "compiled_ms", "compiled_spread_ms", optional=True),
            measured("stock compiled / ours", "compiled/ours", optional=True),
        ],
        benchmark="step",
    ),
    "encoder": Table(
        "python benchmarks/encoder.py --compile none",
        [
            MODEL,
            BATCH,
            measured("stock eager, ms", "eager_ms"),
            measured("stock compiled, ms", "compiled_ms", optional=True),
            measured("call, ms", "call_ms"),
            measured("replay, ms", "ours_ms", "spread_ms"),
            measured("floor, ms", "floor_ms"),
            Column("share of the rate", ("share_%",), "{:.0f} %".format),
            measured("rate, TFLOP/s", "TFLOP/s"),
        ],
    ),
    "select_token": Table(
        "python benchmarks/select_token.py",
        [
            BATCH,
            Column("timestamps", ("timestamps",), lambda value: "with" if value else "without"),
            measured("ours, us", "ours_us", "spread_us"),
            measured("ours sampling, us", "ours_sampling_us"),
            measured("ours top-k, us", "ours_top_k_us", optional=True),
            measured("stock eager, us", "stock_eager_us"),
            measured("stock in a graph, us", "stock_graph_us", optional=True),
            Column("stock's launches", ("stock_launches",)),
        ],
    ),
    "decode_attention": Table(
        "python benchmarks/decode_attention.py",
        [
            BATCH,
            measured("floor", "floor_us"),
            measured("ours", "ours_us", "spread_us"),
            measured("ours, joined in the launch", "joined_us", "joined_spread_us", optional=True),
            *ALTERNATIVES,
            measured("compiled reference", "compiled_us", optional=True),
            measured("best SDPA / ours", "best_sdpa/ours"),
        ],
    ),
    "append_attention": Table(
        "python benchmarks/append_attention.py",
        [
            BATCH,
            Column("length", ("length",)),
            measured("ours", "ours_us", "spread_us"),
            measured("stock", "stock_us"),
            measured("stock compiled", "compiled_us", optional=True),
            *ALTERNATIVES,
            STOCK_OVER_OURS,
        ],
    ),
    "update_kv_cache": Table(
        "python benchmarks/update_kv_cache.py",
        [
            BATCH,
            Column("tokens", ("T",)),
            measured("floor", "floor_us"),
            measured("ours", "ours_us", "spread_us"),
            measured("stock", "stock_us"),
            measured("stock compiled", "compiled_us", optional=True),
            STOCK_OVER_OURS,
        ],
    ),
}


def caption(rows: Sequence[Row], command: str) -> str:
    """By which command, on what, with which versions and when the rows were measured."""
    commands = ", ".join(f"`{said}`" for said in values(rows, "command") or [command])
    where = [", ".join(named(column, value) for value in values(rows, column)) for column in ("gpu", "dtype")]
    where += [
        f"{c} {', '.join(map(str, values(rows, c)))}" for c in ("driver", "torch", "triton", "transformers") if values(rows, c)
    ]
    when = f"{', '.join(sorted(values(rows, 'date')))} at revision {', '.join(values(rows, 'revision'))}"
    notes = "".join(f" ({source})" for source in values(rows, "source"))
    return f"{commands} on {', '.join(text for text in where if text)}; {when}{notes}:"


def render_table(name: str, rows: Sequence[Row]) -> str:
    """The caption and the table; ValueError if a column that the table needs is in no row."""
    table = TABLES[name]
    columns = list(table.columns(rows) if callable(table.columns) else table.columns)
    lines = table.prepare(rows)
    for column in ("dtype", "gpu"):
        if len(values(rows, column)) > 1:
            columns.insert(0, Column(column, (column,), lambda value, column=column: named(column, value)))
    there = {column for row in lines for column, value in row.items() if value is not None}
    for column in columns:
        if not column.optional and (missing := [part for part in column.of if part not in there]):
            raise ValueError(f"rows/{name}.jsonl: no row has the column {missing[0]}, which README's table shows")
    columns = [column for column in columns if there.issuperset(column.of)]
    cells = [[column.header for column in columns], ["---"] * len(columns), *([c.cell(row) for c in columns] for row in lines)]
    return f"{caption(rows, table.command)}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in cells)
