"""Benchmarks as tasks: one after the other, with progress on stderr, rows kept as they come, and tables at the end.

`parser_for` and `measure_named` are the command line of all benchmarks that go by model and batch. Without a GPU, or with
`--device cpu`, they run on a tiny shape, results checked, to show that they run: times mean nothing then, `compiled` only
traces, nothing is captured, and a row file is written only where one is named.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from whisper_triton.benchmarks.harness import Place, Row, print_table, write_rows
from whisper_triton.benchmarks.models import SHAPES
from whisper_triton.kernels._dispatch import failed_gpus, why_reference

from whisper_triton.bench import MOST_ROWS, read_numbers
from whisper_triton.checkpoints import CheckpointError

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


def numbers(text: str) -> list[int]:
    """The type of an argument that takes several, separated by commas."""
    try:
        return read_numbers(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def number_to(most: int = MOST_ROWS) -> Callable[[str], int]:
    """The type of an argument that takes one from 1 to `most`."""

    def number(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and 0 < int(text) <= most):
            raise argparse.ArgumentTypeError(f"takes a number from 1 to {most}, got {text!r}")
        return int(text)

    return number


def names_of(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """The type of an argument that takes some of these, separated by semicolons."""

    def names(text: str) -> tuple[str, ...]:
        if not set(chosen := text.split(";")) <= set(known):
            raise argparse.ArgumentTypeError(f"takes {'; '.join(known)}, got {text!r}")
        return tuple(chosen)

    return names


def device(text: str) -> str:
    """The type of `--device`."""
    if text not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"takes cuda or cpu, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is nothing to measure without a GPU, and torch finds none")
    return text


def parser_for(description: str, model: str, batch: str = "1,8") -> argparse.ArgumentParser:
    """What the benchmarks' command lines share; `model` and `batch` are defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = f"of {', '.join(SHAPES)}, or a checkpoint; several separated by commas (on a CPU: toy)"
    parser.add_argument("--model", help=f"{named}; {model} unless given")
    parser.add_argument("--batch", type=numbers, default=batch, help="batch sizes, separated by commas")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default, help="cuda, or cpu: only to see that it runs")
    parser.add_argument("--output", type=Path, help="row file to write; by default one in benchmarks/rows/, none on a CPU")
    parser.set_defaults(default_model=model)
    return parser


@torch.no_grad()
def measure_named(
    args: argparse.Namespace,
    name: str,
    benches: dict[str, Bench],
    loader: Callable[[Place], Callable[[str], Any]],
    dtype: torch.dtype = torch.float16,
) -> list[Row]:
    """Runs `benches` for each model and batch that `parser_for`'s arguments name, and returns the rows.

    `loader(place)(model)` is what a bench gets. The rows go to benchmarks/rows/NAME.jsonl unless `args` say otherwise.
    `dtype` is that of a GPU.
    """
    is_cpu = args.device == "cpu"
    if is_cpu:
        torch.set_num_threads(1)  # a second one brings such shapes nothing, and waits where the cores are busy
    torch.manual_seed(0)
    place = Place.on(args.device, torch.float32 if is_cpu else dtype)
    models = (args.model or ("toy" if is_cpu else args.default_model)).split(",")
    output = args.output or (None if is_cpu else Path(__file__).parent / "rows" / f"{name}.jsonl")
    try:
        return run(sweep(benches, place, loader(place), models, args.batch), output, device=args.device)
    except CheckpointError as error:
        raise SystemExit(str(error)) from error
