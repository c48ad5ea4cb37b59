"""Benchmarks as tasks: one after the other, with progress on stderr, rows kept as they come, and tables at the end."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from whisper_triton.benchmarks.harness import Place, Row, print_table, write_rows
from whisper_triton.kernels._dispatch import failed_gpus, why_reference

Bench = Callable[[Place, Any, int], list[Row]]  # of a shape or a model, and a batch size
Task = tuple[str, Callable[[], list[Row]]]


def sweep(
    benches: dict[str, Bench], place: Place, load: Callable[[str], Any], names: Sequence[str], batches: Sequence[int]
) -> list[Task]:
    """The tasks of `run` that call each bench for what `load` makes of each name, and each batch size.

    One of those is held at a time. The rows say the name and the dtype too.
    """
    load = functools.lru_cache(maxsize=1)(load)

    def task(bench: Bench, name: str, B: int) -> list[Row]:
        torch.compiler.reset()  # else the next shape is compiled for any, and after a few none is
        facts = {"model": name, "dtype": str(place.dtype).removeprefix("torch.")}
        return [facts | row for row in bench(place, load(name), B)]

    return [
        (f"{label}, {name}, batch {B}", functools.partial(task, benches[label], name, B))
        for name, B, label in itertools.product(names, batches, benches)
    ]


def run(tasks: Sequence[Task], output: Path | None, command: str | None = None, device: str = "cuda") -> list[Row]:
    """Runs (label, task) one after the other, shows on stderr how far it is, and prints a table a benchmark.

    The row file is written after each task: what was measured is kept if a later one fails.
    """
    rows: list[Row] = []
    with tqdm(tasks, file=sys.stderr) as bar:
        for label, task in bar:
            bar.set_description(label)
            rows += task()
            for gpu in failed_gpus():  # or references would be timed as kernels
                raise SystemExit(f"{label}: {why_reference(torch.device('cuda', gpu))}")
            if output is not None:
                write_rows(output, rows, command, device)
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        print(f"\n{benchmark}")
        print_table([{k: v for k, v in row.items() if k != "benchmark"} for row in rows if row["benchmark"] == benchmark])
    return rows
