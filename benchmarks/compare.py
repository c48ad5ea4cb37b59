"""Compares two row files: what became faster or slower by more than its spread.

    python benchmarks/compare.py before.jsonl after.jsonl

Rows are matched by what identifies them: all columns that both files have and that hold neither a measurement nor where it was
made. Where both files hold rows of a GPU, only rows of the same GPU are compared, else those of each with those of each other.
Of each pair the main time and the tokens per second are set against each other, b / a; of rows that hold seconds alone, as of
first calls, each of them. A time is `faster` or `slower` where the ranges of the two, spread or least to greatest, do not
touch; the rest may be noise. A link's time is a difference, which may be about zero or below: it has no ratio then.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

VERSIONS = ("gpu", "driver", "torch", "triton", "transformers", "python")
ENVIRONMENT = (*VERSIONS, "revision", "date", "command", "source", "path")  # path: which code ran, which is no option
MAIN_TIMES = ("ms", "us", "ours_ms", "ours_us", "step_ms")
# A column is a measurement by its last word, as a rate or a ratio ("GB/s", "stock/ours"), or because it holds fractions.
MEASURED = re.compile(
    r"(^|_)(us|ms|s|MB|GB|bytes|%|RTFx|rtfx|errors?|launches|waits|equal|graphs|breaks|whole|why)$|/|^equal_|^spread"
)


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON lines file; ValueError, with the place, for what is none, and for an empty one."""
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a row but {line:.40}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def identifying(rows: Sequence[Row]) -> list[str]:
    """The columns, in order of appearance, that tell rows from each other whatever was measured."""
    columns = dict.fromkeys(
        column for row in rows for column in row if column not in ENVIRONMENT and not MEASURED.search(column)
    )
    return [column for column in columns if not any(isinstance(row.get(column), float) for row in rows)]


def by_identity(rows: Sequence[Row], columns: Sequence[str], path: Path) -> dict[str, Row]:
    """Rows by what identifies them, as text; ValueError where two are the same."""
    found: dict[str, Row] = {}
    for row in rows:
        said = " ".join(f"{column}={row[column]}" for column in columns if row.get(column) is not None)
        if said in found:
            raise ValueError(f"{path}: two rows with {said or 'nothing to identify them'}, and both files tell no more of them")
        found[said] = row
    return found


def main_times(a: Row, b: Row) -> list[str]:
    """The time that a benchmark is about: one of MAIN_TIMES, or else the first column of times that both rows have.

    Of rows that have none but seconds all of these.
    """
    both = [column for column in a if a[column] is not None and b.get(column) is not None]
    named = [column for column in MAIN_TIMES if column in both]
    others = [c for c in both if re.search("_(ms|us)$", c) and not re.search("spread|floor|min|max|first", c)]
    return [*named, *others][:1] or [column for column in both if column.endswith("_s")]


def unit_of(column: str) -> str:
    return column.rpartition("_")[2]


def time_range(row: Row, column: str) -> tuple[float, float] | None:
    """Between what a time lay: least and greatest where the row has them, else the time and its spread about it."""
    unit = unit_of(column)
    least, greatest, spread = (row.get(f"{name}_{unit}") for name in ("min", "max", "spread"))
    spread = row.get(f"{column.removesuffix(unit)}spread_{unit}", spread)  # a time's own, where it has one
    if least is not None and greatest is not None:
        return least, greatest
    return None if spread is None else (row[column] - spread, row[column] + spread)


def verdict(a: tuple[float, float] | None, b: tuple[float, float] | None) -> str:
    if a is None or b is None:
        return "no spread"
    return "faster" if b[1] < a[0] else "slower" if b[0] > a[1] else ""


def time_text(row: Row, column: str) -> str:
    limits = time_range(row, column)
    return f"{row[column]:.4g} {unit_of(column)}" + (f" ({limits[0]:.4g} to {limits[1]:.4g})" if limits else "")


def compare_rows(name: str, a: Row, b: Row) -> list[list[str]]:
    """Lines of the table, one a time, the verdict last."""
    columns = main_times(a, b)
    rates = f"{b['tok/s'] / a['tok/s']:.3f}" if a.get("tok/s") and b.get("tok/s") else "-"
    if not columns:
        return [[name, "-", "-", "-", rates, "no spread" if rates != "-" else "no time"]]
    lines = []
    for column in columns:
        label = name if len(columns) == 1 else f"{name}: {column.removesuffix('_s').replace('_', ' ')}"
        ratio = f"{b[column] / a[column]:.3f}" if min(a[column], b[column]) > 0 else "-"
        judged = verdict(time_range(a, column), time_range(b, column))
        lines.append([label, *(time_text(row, column) for row in (a, b)), ratio, rates, judged])
    return lines


def environment(rows: Sequence[Row], columns: Sequence[str]) -> dict[str, list[str]]:
    return {column: sorted({str(row[column]) for row in rows if row.get(column) is not None}) for column in columns}


def by_gpu(rows: Sequence[Row]) -> dict[str | None, list[Row]]:
    found: dict[str | None, list[Row]] = {}
    for row in rows:
        found.setdefault(row.get("gpu"), []).append(row)
    return found


def compare(a: Path, b: Path) -> str:
    """A table of the pairs of rows, what stands in one file only, and a warning where GPU or versions differ.

    Raises ValueError for a file that is none of rows, and where rows of one GPU cannot be told from each other.
    """
    rows = read_rows(a), read_rows(b)
    lines = []
    for letter, path, own in zip("ab", (a, b), rows, strict=True):
        known = environment(own, ENVIRONMENT)
        said = "; ".join(f"{column} {', '.join(known[column])}" for column in ("gpu", "revision", "date") if known[column])
        lines.append(f"{letter}: {path}" + (f" ({said})" if said else ""))

    benchmarks = [{row["benchmark"] for row in own if "benchmark" in row} for own in rows]
    if all(benchmarks) and not benchmarks[0] & benchmarks[1]:
        held = [", ".join(sorted(names)) for names in benchmarks]
        raise ValueError(f"{a} and {b} hold no benchmark both: {held[0]} and {held[1]}")
    gpus = by_gpu(rows[0]), by_gpu(rows[1])
    same = [(gpu, gpu) for gpu in gpus[0] if gpu in gpus[1]]
    meeting = same or list(itertools.product(*gpus))
    compared = [[row for row in own if row.get("gpu") in {pair[i] for pair in meeting}] for i, own in enumerate(rows)]
    where = [environment(own, VERSIONS) for own in compared]
    for column in VERSIONS:
        if where[0][column] != where[1][column]:
            texts = (", ".join(side[column]) or "unknown" for side in where)
            lines.append(f"warning: {column} differs: {' in a, '.join(texts)} in b")

    count, pairs, alone = 0, [], []
    for pair in meeting:
        parts = [own[gpu] for own, gpu in zip(gpus, pair, strict=True)]
        shared = [column for column in identifying(parts[0]) if column in identifying(parts[1])]
        before, after = (by_identity(part, shared, path) for part, path in zip(parts, (a, b), strict=True))
        # Only where there are several is a GPU named, for it takes half a line.
        on = "" if len(meeting) == 1 else f"{' / '.join(map(str, dict.fromkeys(pair)))}: "
        for name in [name for name in before if name in after]:
            count += 1
            pairs += compare_rows(on + name, before[name], after[name])
        alone += [f"only in a: {on}{name}" for name in before if name not in after]
        alone += [f"only in b: {on}{name}" for name in after if name not in before]
    for letter, own in zip("ab", gpus, strict=True):
        alone += [f"only in {letter}: all {len(own[gpu])} of {gpu}" for gpu in own if same and (gpu, gpu) not in same]
    if pairs:
        table = [["row", "a", "b", "b / a", "tok/s b / a", ""], *pairs]
        widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
        lines.append("")
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
        words = Counter(line[-1] for line in pairs)
        order = ("faster", "slower", "", "no spread", "no time")
        said = [f"{words[word]} {word or 'within the spread'}" for word in order if words[word]]
        of_each = f", {len(pairs)} times" if len(pairs) > count else ""
        lines += ["", f"{count} row{'s' * (count != 1)} of both{of_each}: {', '.join(said)}"]
    else:
        lines += ["", "no row of a is in b"]
    return "\n".join([*lines, *alone])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, help="row file to compare with")
    parser.add_argument("b", type=Path, help="row file that is judged")
    args = parser.parse_args()
    try:
        print(compare(args.a, args.b))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
