"""The tables of README and RESULTS.md: which rows and columns of a file they show, and how its numbers read.

After "±" stands a time's spread, rounded up; in brackets the least and the greatest.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Container, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from whisper_triton.benchmarks.plots import NAMES, named, values
from whisper_triton.benchmarks.record import parts_of

OURS, STOCK, DYNAMIC = "accelerate", "stock static+compile", "stock dynamic"
README_GPU = "NVIDIA H200"  # whose rows README shows where it shows one GPU's, if there are any

MOST_COMMANDS = 2  # that a caption lists for a GPU, where record.py measures the same

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
VARIANT = Column("variant", ("variant",), lambda variant: variant.replace(OURS, NAMES[OURS]))
TIMESTAMPS = Column("timestamps", ("timestamps",), lambda value: "with" if value else "without")
STOCK_OVER_OURS = measured("stock / ours", "stock/ours")
ALTERNATIVES = [
    measured("SDPA cuDNN", "cudnn_us", optional=True),
    measured("SDPA flash", "flash_us", optional=True),
    measured("SDPA efficient", "efficient_us", optional=True),
    measured("SDPA math", "math_us", optional=True),
    measured("FlexAttention", "flex_us", optional=True),
]


class Table(NamedTuple):
    """How rows become a table: `select` says which are shown, `prepare` which are one line; `columns` may depend on them."""

    columns: Sequence[Column] | Callable[[Sequence[Row]], list[Column]]
    prepare: Callable[[Sequence[Row]], Sequence[Row]] = lambda rows: rows
    benchmark: str | None = None  # only these, where rows of a file say of which benchmark they are
    file: str | None = None  # that the rows are in, where the table has another name
    select: Callable[[Sequence[Row]], Sequence[Row]] | None = None


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


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def numbers(*found: float) -> str:
    return ", ".join(map(number, found))


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
    def text(time: float, floor: float) -> str:
        return f"{number(time)} ({number(floor)})"

    links = values(rows, "link")
    return [MODEL, BATCH, *(Column(f"{link}, us (floor)", (f"{link}: us", f"{link}: floor_us"), text) for link in links)]


def reshaping_columns(rows: Sequence[Row]) -> list[Column]:
    def text(older: float, newer: float) -> str:
        return f"{number(older)} / {number(newer)} = {number(older / newer)}"

    times = [
        Column(
            f"{how}, us: reshaping / reshape-free", tuple(f"{how}: {form}_us" for form in ("reshaping", "reshape_free")), text
        )
        for how in values(rows, "how")
    ]
    return [MODEL, BATCH, Column("tokens", ("T",)), Column("part", ("part",)), *times]


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
    "calls": Table(generate_columns, BY_VARIANT, file="generate", select=only(variant=(OURS, STOCK, DYNAMIC))),
    "generate": Table(generate_details, BY_VARIANT),
    "steps": Table(
        [
            MODEL,
            BATCH,
            measured("ms", "ms", "spread_ms"),
            Column("share of the bandwidth", ("share_%",), "{:.0f} %".format),
            measured("stock compiled, ms", "compiled_ms", "compiled_spread_ms", optional=True),
            measured("times stock compiled", "compiled/ours", optional=True),
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
            measured("stock compiled / ours", "compiled/ours", optional=True),
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
    "select_token": Table(
        [
            BATCH,
            TIMESTAMPS,
            measured("ours, us", "ours_us", "spread_us"),
            measured("ours sampling, us", "ours_sampling_us"),
            measured("ours top-k, us", "ours_top_k_us", optional=True),
            measured("stock eager, us", "stock_eager_us"),
            measured("stock in a graph, us", "stock_graph_us", optional=True),
            Column("stock's launches", ("stock_launches",)),
        ],
    ),
    "decode_attention": Table(
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
    "cross_attention": Table(
        [
            BATCH,
            measured("floor", "floor_us"),
            measured("ours", "ours_us", "spread_us"),
            measured("ours, apart", "apart_us", "apart_spread_us"),
            *ALTERNATIVES,
            measured("compiled", "compiled_us", optional=True),
            measured("best of these / ours", "best/ours"),
        ],
    ),
    "append_attention": Table(
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


def commands(rows: Sequence[Row], name: str) -> list[str]:
    """By which the rows were measured; of commands that differ in models and batches alone the one that measures as much.

    Batches of which there is no row, as of a run that was ended, are left out.
    """
    found: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for said in values(rows, "command") or [f"python benchmarks/{name}.py"]:
        words, given = shlex.split(said), {"--model": "", "--batch": ""}
        for i, word in enumerate(words[:-1]):
            if word in given:
                given[word], words[i + 1] = words[i + 1], word
        measured_batches = {str(row["B"]) for row in rows if row.get("command") == said and "B" in row}
        batches = [B for B in given["--batch"].split(",") if B in measured_batches] or given["--batch"].split(",")
        batches_of = found.setdefault(tuple(words), {})
        for model in given["--model"].split(","):
            batches_of.setdefault(model, []).extend(batches)
    lines = []
    for words, batches_of in found.items():
        models_of: dict[str, list[str]] = {}
        for model, batches in batches_of.items():
            models_of.setdefault(",".join(sorted(set(batches), key=lambda B: (len(B), B))), []).append(model)
        for batches, models in models_of.items():
            all_of = {"--model": ",".join(models), "--batch": batches}
            # Where one of these words is repeated, its value was.
            told = [all_of.get(word, word) if before == word else word for before, word in pairwise(("", *words))]
            lines.append(shlex.join(told))
    return lines


def recorded(rows: Sequence[Row], name: str) -> str | None:
    """The command of record.py that measures all these rows anew; None where it measures no such."""
    models, batches = values(rows, "model"), sorted(values(rows, "B"))
    measured = {(part.model, B) for part in parts_of("cuda", [name], models, batches) for B in part.batches}
    if not measured.issuperset((row.get("model"), row.get("B")) for row in rows):
        return None
    chosen = ["--models", ",".join(models), "--batch", ",".join(map(str, batches))]
    return shlex.join(["python", "benchmarks/record.py", "--output", "new", "--only", name, *chosen])


def caption(rows: Sequence[Row], name: str) -> str:
    """By which commands, on what, when and with which versions the rows were measured; GPU by GPU."""
    places: dict[str, list[str]] = {}
    for gpu in values(rows, "gpu"):
        own = [row for row in rows if row["gpu"] == gpu]
        listed = commands(own, name)
        if len(listed) > MOST_COMMANDS and (command := recorded(own, name)):
            listed = [command]
        when = f"{', '.join(sorted(values(own, 'date')))} at revision {', '.join(values(own, 'revision'))}"
        places.setdefault(", ".join(f"`{command}`" for command in listed), []).append(f"on {gpu}, {when}")
    said = [f"{by} {' and '.join(where)}" for by, where in places.items()]
    with_what = [", ".join(named("dtype", dtype) for dtype in values(rows, "dtype"))]
    versions = ("driver", "torch", "triton", "transformers")
    with_what += [f"{column} {', '.join(map(str, found))}" for column in versions if (found := values(rows, column))]
    notes = "".join(f" ({source})" for source in values(rows, "source"))
    return f"{'; '.join([*said, ', '.join(with_what)])}{notes}:"


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
