"""Makes of the row files of several runs those of benchmarks/rows/, one a benchmark.

    python benchmarks/merge.py new newer                    # benchmarks/rows/ then holds what these two measured
    python benchmarks/merge.py benchmarks/rows new          # what was measured anew, in place of the same rows of before

All files NAME.jsonl and NAME.*.jsonl of the folders become NAME.jsonl: of rows that measure the same on GPUs of one name, told
as compare.py tells them, the last folder's, sorted by model and batch. Benchmarks that none of the folders has stay as they
are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from whisper_triton.benchmarks.compare import Row, by_identity, identifying, read_rows
from whisper_triton.benchmarks.record import MODELS

ROWS = Path(__file__).parent / "rows"


def files_of(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each name, folder by folder."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.jsonl")):
            found.setdefault(path.name.partition(".")[0], []).append(path)
    return found


def merge(name: str, paths: Sequence[Path]) -> list[Row]:
    """The rows of files of one name; ValueError for a file of none, and for rows that cannot be told from each other."""
    parts: dict[object, list[tuple[Path, list[Row]]]] = {}  # a file may hold rows of two benchmarks, with different columns
    for path in paths:
        own: dict[object, list[Row]] = {}
        for row in read_rows(path):
            benchmark = row.get("benchmark", name)  # before rows said theirs, a file held those of one
            own.setdefault((benchmark, row.get("gpu")), []).append(row)
        for part, rows in own.items():
            parts.setdefault(part, []).append((path, rows))
    merged: list[Row] = []
    for files in parts.values():
        columns = [identifying(rows) for _, rows in files]
        shared = [column for column in columns[0] if all(column in other for other in columns)]
        found: dict[str, Row] = {}
        for path, rows in files:
            found |= by_identity(rows, shared, path)
        merged += found.values()
    return sorted(merged, key=lambda row: (row.get("benchmark", name), *place_of(row)))


def place_of(row: Row) -> tuple[int, str, int, str]:
    """Where a row of a benchmark stands: the models that README shows first, in their order, batch by batch, GPU by GPU."""
    model = str(row.get("model"))
    return MODELS.index(model) if model in MODELS else len(MODELS), model, row.get("B", 0), str(row.get("gpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="where row files lie")
    parser.add_argument("--output", type=Path, default=ROWS, metavar="DIR", help="where they go; benchmarks/rows/ by default")
    args = parser.parse_args()
    try:
        merged = {name: merge(name, paths) for name, paths in files_of(args.folders).items()}
    except ValueError as error:
        parser.error(str(error))
    if not merged:
        parser.error("there are no row files")
    if args.output.resolve() == ROWS.resolve() and any(row.get("gpu") == "none" for rows in merged.values() for row in rows):
        parser.error(f"some of these rows are of a CPU, whose speed {ROWS} does not hold: name another folder by --output")
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows in merged.items():
        (args.output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
