"""The tables of README and RESULTS.md: which rows and columns of a file they show.

Of calls that were timed, brackets hold the least and the greatest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence

from whisper_triton.benchmarks.captions import caption
from whisper_triton.benchmarks.columns import (
    BATCH,
    MODEL,
    TIMESTAMPS,
    Column,
    Row,
    Table,
    decimals,
    measured,
    number,
    numbers,
    percent,
)
from whisper_triton.benchmarks.kernel_tables import KERNELS
from whisper_triton.benchmarks.plots import NAMES, named, values

OURS, STOCK, DYNAMIC = "accelerate", "stock static+compile", "stock dynamic"
DISTURBED = 0.05  # of a step's time: a spread from which on it tells of other work beside it
README_GPU = "NVIDIA H200"  # whose rows README shows where it shows one GPU's, if there are any

VARIANT = Column("variant", ("variant",), lambda variant: variant.replace(OURS, NAMES[OURS]))


def pivot(key: str, *same: str) -> Callable[[Sequence[Row]], list[Row]]:
    """Makes one row of those equal in GPU, dtype and the columns `same`: what they hold as "value of key: column"."""

    def merge(rows: Sequence[Row]) -> list[Row]:
        merged: dict[tuple[object, ...], Row] = {}
        for row in rows:
            kept = {column: row.get(column) for column in ("gpu", "dtype", *same)}
            rest = {f"{row[key]}: {column}": value for column, value in row.items() if column not in kept}
            merged.setdefault(tuple(kept.values()), kept).update(rest)
        return list(merged.values())

    return merge


def of_each(names: Sequence[str], unit: str = "us") -> list[Column]:
    """A column of times for each value of the key that a `pivot` was made by; all may be missing."""
    return [measured(f"{name}, {unit}", f"{name}: {unit}", f"{name}: spread_{unit}", optional=True) for name in names]


def calls_text(rate: float, ms: float, least: float, greatest: float) -> str:
    places = decimals(rate, 3)
    return f"{rate:.{places}f} ({rate * ms / greatest:.{places}f}-{rate * ms / least:.{places}f})"


def generate_columns(rows: Sequence[Row]) -> list[Column]:
    variants = sorted(values(rows, "variant"), key=lambda variant: variant == OURS)
    rates = [
        Column(f"{NAMES.get(v, v)}, tok/s", tuple(f"{v}: {c}" for c in ("tok/s", "ms", "min_ms", "max_ms")), calls_text)
        for v in variants
    ]
    gains = [
        Column(f"times {v}", (f"{OURS}: tok/s", f"{v}: tok/s"), lambda ours, stock: number(ours / stock), optional=True)
        for v in (DYNAMIC, STOCK)
    ]
    return [MODEL, BATCH, *rates, *gains]


def generate_details(rows: Sequence[Row]) -> list[Column]:
    ours = NAMES[OURS]
    return [
        *generate_columns(rows),
        measured(f"{ours}, ms a token", f"{OURS}: ms/token", optional=True),
        measured(f"{ours}, RTFx", f"{OURS}: RTFx", optional=True),
        Column(f"{ours}, tokens equal to stock's", (f"{OURS}: equal_tokens",), percent, optional=True),
        *(
            Column(f"{what}: {STOCK}, {ours}", (f"{STOCK}: {column}", f"{OURS}: {column}"), numbers, optional=True)
            for what, column in (("GB beyond the model", "extra_GB"), ("first call, s", "first_s"))
        ),
    ]


def link_columns(rows: Sequence[Row]) -> list[Column]:
    def text(time: float, floor: float, spread: float | None) -> str:
        return f"{number(time, spread)} ({number(floor)})"

    columns = [
        Column(f"{link}, us (floor)", (f"{link}: us", f"{link}: floor_us"), text, spread=f"{link}: spread_us")
        for link in values(rows, "link")
    ]
    return [MODEL, BATCH, *columns]


def reshaping_columns(rows: Sequence[Row]) -> list[Column]:
    def text(older: float, older_spread: float, newer: float, newer_spread: float) -> str:
        return f"{number(older, older_spread)} / {number(newer, newer_spread)} = {number(older / newer)}"

    forms = ("reshaping_us", "reshaping_spread_us", "reshape_free_us", "reshape_free_spread_us")
    times = [
        Column(f"{how}, us: reshaping / reshape-free", tuple(f"{how}: {form}" for form in forms), text)
        for how in values(rows, "how")
    ]
    return [MODEL, BATCH, Column("tokens", ("T",)), Column("part", ("part",)), *times]


def of_compiled_steps(header: str) -> Column:
    """Stock's compiled step over ours, where neither was disturbed: without other work their spreads are a few per mille."""

    def text(ratio: float, ms: float, spread: float, compiled_ms: float, compiled_spread: float) -> str:
        return number(ratio) if max(spread / ms, compiled_spread / compiled_ms) < DISTURBED else "-"

    of = ("compiled/ours", "ms", "spread_ms", "compiled_ms", "compiled_spread_ms")
    return Column(header, of, text, optional=True)


def of_one_gpu(rows: Sequence[Row]) -> list[Row]:
    """Those of README's GPU, or, where it has none, of the GPU that was measured last."""
    last = max(rows, key=lambda row: (row["gpu"] == README_GPU, row["date"], row["gpu"]))
    return [row for row in rows if row["gpu"] == last["gpu"]]


def only(**wanted: Container[object]) -> Callable[[Sequence[Row]], list[Row]]:
    """Rows of one GPU whose columns have one of the values that are wanted."""

    def select(rows: Sequence[Row]) -> list[Row]:
        return [row for row in of_one_gpu(rows) if all(row.get(column) in found for column, found in wanted.items())]

    return select


def layouts(rows: Sequence[Row]) -> list[Row]:
    """What FlashAttention's layout costs a captured or compiled step, at one length of those in use."""
    return [
        row
        for row in of_one_gpu(rows)
        if (row["how"] == "graph" and (row["cost"] == "transposes" or (row["cost"], row["length"]) == ("unread slots", 100)))
        or (row["how"] == "compiled" and row["cost"] == "launches")
    ]


BY_VARIANT = pivot("variant", "model", "B")
FLASH_WAYS = ("flash", "flash, slices", "flash, copies", "SDPA flash", "ours")
GROWING = ("growing, first pass", "growing, second pass", "growing, third pass")
PROCESSOR_WAYS = ("stock", "compiled", *GROWING, "ours", "ours, graph")
RESHAPING = Table(reshaping_columns, pivot("how", "model", "B", "T", "part", "layers"))
LAYOUT = Table(
    [
        MODEL,
        BATCH,
        *(Column(name, (name,)) for name in ("cost", "part", "length", "how")),
        *of_each(FLASH_WAYS),
        measured("flash / ours", "flash: way/ours", optional=True),
        measured("flash, slices / ours", "flash, slices: way/ours", optional=True),
        Column("graph breaks: flash, slices", ("flash, slices: graph_breaks",), optional=True),
        Column("graph breaks: ours", ("ours: graph_breaks",), optional=True),
    ],
    pivot("way", "model", "B", "cost", "part", "length", "how"),
)
REUSE = Table(
    [
        MODEL,
        Column("layers", ("layers",)),
        BATCH,
        Column("how", ("how",)),
        measured("recompute, us", "recompute_us", "recompute_spread_us"),
        measured("reuse, us", "reuse_us", "reuse_spread_us"),
        measured("recompute / reuse", "recompute/reuse"),
        Column("equal tokens", ("equal_tokens",), percent, optional=True),
    ],
)
PROCESSORS = Table(
    [
        BATCH,
        TIMESTAMPS,
        Column("what", ("what",)),
        *of_each(PROCESSOR_WAYS),
        measured("stock / ours, graph", "stock: over_ours", optional=True),
        measured("compiled / ours, graph", "compiled: over_ours", optional=True),
        Column("compiled whole", ("compiled: is_whole",), lambda whole: "yes" if whole else "no"),
        Column("stock's launches", ("stock: launches",), optional=True),
    ],
    pivot("how", "model", "B", "timestamps", "what"),
)
TABLES = {
    **KERNELS,
    "calls": Table(generate_columns, BY_VARIANT, file="generate", select=only(variant=(OURS, STOCK, DYNAMIC))),
    "generate": Table(generate_details, BY_VARIANT),
    "steps": Table(
        [
            MODEL,
            BATCH,
            measured("ms", "ms", "spread_ms"),
            Column("share of the bandwidth", ("share_%",), "{:.0f} %".format),
            measured("stock compiled, ms", "compiled_ms", "compiled_spread_ms", optional=True),
            of_compiled_steps("times stock compiled"),
        ],
        benchmark="step",
        file="decoder_step",
        select=only(B=range(1, 33)),
    ),
    "decoder_step": Table(
        [
            MODEL,
            BATCH,
            measured("ms", "ms", "spread_ms"),
            measured("floor, ms", "floor_ms"),
            Column("share of the bandwidth", ("share_%",), "{:.0f} %".format),
            measured("bandwidth, GB/s", "bandwidth_GB/s", optional=True),
            measured("modules in the graph, ms", "modules_ms", "modules_spread_ms", optional=True),
            measured("stock compiled, ms", "compiled_ms", "compiled_spread_ms", optional=True),
            of_compiled_steps("stock compiled / ours"),
        ],
        benchmark="step",
    ),
    "step_links": Table(
        link_columns,
        pivot("link", "model", "B"),
        benchmark="step_links",
        file="decoder_step",
    ),
    "encoder": Table(
        [
            MODEL,
            BATCH,
            measured("stock eager, ms", "eager_ms", "eager_spread_ms"),
            measured("stock compiled, ms", "compiled_ms", "compiled_spread_ms", optional=True),
            measured("call, ms", "call_ms", "call_spread_ms"),
            measured("replay, ms", "ours_ms", "spread_ms"),
            measured("floor, ms", "floor_ms"),
            Column("share of the rate", ("share_%",), "{:.0f} %".format),
            measured("rate, TFLOP/s", "TFLOP/s"),
        ],
    ),
    "encoder_at_once": Table(
        [
            MODEL,
            BATCH,
            Column("sequences at once", ("at_once",)),
            measured("replay, ms", "ours_ms", "spread_ms"),
            Column("share of the rate", ("share_%",), "{:.0f} %".format),
        ],
    ),
    "host_overhead": Table(
        [
            MODEL,
            BATCH,
            VARIANT,
            measured("call, ms", "ms", "spread_ms"),
            measured("GPU at work, ms", "busy_ms", optional=True),
            measured("the rest, ms", "host_ms", optional=True),
            measured("before the encoder", "before_ms"),
            measured("between it and the first step", "between_ms"),
            measured("after the last step", "after_ms"),
            measured("these three, ms", "around_ms", "around_spread_ms"),
        ],
    ),
    "detect_language": Table(
        [
            MODEL,
            BATCH,
            VARIANT,
            measured("language told, ms", "told_ms", "told_spread_ms"),
            measured("language detected, ms", "detected_ms", "detected_spread_ms"),
            measured("difference, ms", "detection_ms", "detection_spread_ms"),
        ],
    ),
    "first_call": Table(
        [
            MODEL,
            BATCH,
            VARIANT,
            measured("first call, s", "first_s"),
            measured("second, s", "second_s"),
            measured("another prompt, s", "other_prompt_s"),
            measured("more tokens, s", "longer_s"),
        ],
    ),
    "reshape_free": RESHAPING,
    "reshape_free_stack": RESHAPING._replace(
        file="reshape_free", select=only(part=("stack",), T=(1,), model=("large-v3",), how=("graph", "compiled"))
    ),
    "flash_layout": LAYOUT,
    "flash_layout_costs": LAYOUT._replace(file="flash_layout", select=layouts),
    "cross_kv_reuse": REUSE,
    "cross_kv_reuse_compiled": REUSE._replace(file="cross_kv_reuse", select=only(how=("compiled",))),
    "logits_processors": PROCESSORS,
    "logits_processors_choice": PROCESSORS._replace(
        file="logits_processors", select=only(what=("choice",), how=("stock", "compiled", "ours, graph"))
    ),
}


# Those of a part of their file, which README may show or not.
EXCERPTS = {name for name, table in TABLES.items() if table.select is not None}


def short(name: str) -> str:
    """A GPU's name without maker and memory, which the caption has."""
    return re.sub(r"^NVIDIA | \d+ ?GB| HBM\w*", "", name)


def render_table(name: str, rows: Sequence[Row]) -> str:
    """The caption and the table; ValueError if a column that the table needs is in no row."""
    table = TABLES[name]
    rows = rows if table.select is None else table.select(rows)
    columns = list(table.columns(rows) if callable(table.columns) else table.columns)
    lines = table.prepare(rows)
    for column in ("dtype", "gpu"):
        if len(values(lines, column)) > 1:
            columns.insert(0, Column(column, (column,), lambda value, column=column: short(named(column, value))))
    there = {column for row in lines for column, value in row.items() if value is not None}
    for column in columns:
        if not column.optional and (missing := [part for part in column.of if part not in there]):
            raise ValueError(f"rows/{name}.jsonl: no row has the column {missing[0]}, which README's table shows")
    columns = [column for column in columns if there.issuperset(column.of)]
    cells = [[column.header for column in columns], ["---"] * len(columns), *([c.cell(row) for c in columns] for row in lines)]
    return f"{caption(rows, table.file or name)}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in cells)
