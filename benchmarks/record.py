"""Measures anew all that README shows, on the GPU at hand: the benchmark behind each table, the most important first.

    python benchmarks/record.py --output new
    python benchmarks/record.py --output new --only generate --models large-v3 --batch 1,8 --limit 580

Each benchmark, model by model, is a process of its own, so that one that fails costs no other. It writes
DIR/BENCHMARK.MODEL.BATCHES.jsonl, the rows as they come, and what it prints to the .log beside it. What is running when the
`--limit` is reached is ended, and what is known to take longer than what is left is not begun. `benchmarks/merge.py` makes
of the files of one or several such runs those of benchmarks/rows/.

Without a GPU, or with `--device cpu`, all of it runs on a tiny shape, which shows that it runs and no more.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from whisper_triton.benchmarks.harness import Row, print_table
from whisper_triton.benchmarks.tasks import device, numbers

SCRIPTS = Path(__file__).parent
MODELS = ("large-v3", "turbo", "distil-large-v3", "medium")
LARGE = ("large-v3",)
# What a batch takes, most of it compiling stock's step twice, once with attention by name: large-v3's as timed on an H100, the
# others' as timed there without attention by name, and the first call of another compiled variant, from rows/generate.jsonl.
GENERATE_SECONDS = {"large-v3": 150, "medium": 110, "turbo": 50, "distil-large-v3": 45}
GENERATE = "generate.py --calls 6"
CROSS_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)


class Benchmark(NamedTuple):
    """What a row file is made by; models and batches in the order in which they matter."""

    rows: str  # the row file's name
    words: str  # script and options
    models: tuple[str, ...]
    batches: tuple[int, ...]
    seconds: dict[str, int] | None = None  # what a batch takes, by model, where that is known: then it has its own process


RECORDED = (
    Benchmark("generate", GENERATE, MODELS, (1, 8), GENERATE_SECONDS),
    Benchmark("decoder_step", "decoder_step.py --compile reduce-overhead", MODELS, (1, 8, 32, 2, 4, 16, 64)),
    Benchmark("host_overhead", "host_overhead.py", MODELS, (1, 8)),
    Benchmark("detect_language", "detect_language.py", ("large-v3", "turbo"), (1, 8)),
    Benchmark("first_call", "first_call.py", LARGE, (1,)),
    Benchmark("encoder", "encoder.py", LARGE, (1, 8)),
    Benchmark("decode_attention", "decode_attention.py", LARGE, CROSS_BATCHES),
    Benchmark("cross_attention", "cross_attention.py", LARGE, (1, 8, 2)),
    Benchmark("append_attention", "append_attention.py", LARGE, (1, 8, 32)),
    Benchmark("update_kv_cache", "update_kv_cache.py", LARGE, (1, 8)),
    Benchmark("select_token", "select_token.py", LARGE, (1, 8, 32)),
    Benchmark("cross_kv_reuse", "cross_kv_reuse.py", ("large-v3", "distil-large-v3"), (1, 8)),
    Benchmark("logits_processors", "logits_processors.py", LARGE, (1, 8)),
    Benchmark("step_position", "step_position.py", LARGE, (1, 8)),
    Benchmark("encoder_at_once", "encoder.py --compile none --at-once 1,2,4,8", LARGE, (8,)),
    Benchmark("flash_layout", "flash_layout.py", LARGE, (1, 8)),
    Benchmark("reshape_free", "reshape_free.py", ("large-v3", "tiny"), (1, 8)),
    Benchmark("generate", GENERATE, MODELS, (2, 4), GENERATE_SECONDS),
    Benchmark("skinny_linear", "skinny_linear.py", LARGE, (1, 8, 2, 4, 16, 32)),
    Benchmark("project_cross_kv", "project_cross_kv.py", LARGE, (1, 8, 2, 4)),
    Benchmark("encoder_kernels", "encoder_kernels.py", LARGE, (1, 8)),
    Benchmark("embed_tokens", "embed_tokens.py", LARGE, (1, 8, 32)),
)


class Part(NamedTuple):
    """What one process measures."""

    benchmark: Benchmark
    model: str
    batches: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.benchmark.rows}.{self.model}.{'-'.join(map(str, self.batches))}"

    @property
    def seconds(self) -> int:
        """What it is known to take, or 0."""
        return (self.benchmark.seconds or {}).get(self.model, 0) * len(self.batches)

    def command(self, device: str) -> list[str]:
        """The script and its arguments, but for the row file."""
        words = [*shlex.split(self.benchmark.words), "--model", self.model, "--batch", ",".join(map(str, self.batches))]
        return words if device == "cuda" else [*words, "--device", device]


def parts_of(
    device: str, only: Sequence[str] | None, models: Sequence[str] | None, batches: Sequence[int] | None
) -> list[Part]:
    """In the order in which they run; of all benchmarks, models and batches where it says None."""
    found: dict[str, Part] = {}
    for benchmark in RECORDED:
        if device == "cpu":
            benchmark = benchmark._replace(models=("toy",), batches=(1,), seconds=None)
        for model in benchmark.models:
            chosen = tuple(B for B in benchmark.batches if batches is None or B in batches)
            if not chosen or (only and benchmark.rows not in only) or (models and model not in models):
                continue
            each = [(B,) for B in chosen] if benchmark.seconds else [chosen]
            found |= {part.name: part for part in (Part(benchmark, model, some) for some in each)}
    return list(found.values())


def run_script(words: Sequence[str], log: Path) -> None:
    """A script, as the only one of its process, which leads a group of its own."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()
    file = log.open("w", buffering=1)  # for good: what the script fails with is written after it
    for descriptor in (1, 2):
        os.dup2(file.fileno(), descriptor)
    sys.stdout = sys.stderr = file
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


def run_part(part: Part, folder: Path, device: str, seconds: float | None) -> Row:
    """Runs a part, for at most so many seconds if any are named, and says how it ended."""
    rows, log = (folder / f"{part.name}.{suffix}" for suffix in ("jsonl", "log"))
    rows.unlink(missing_ok=True)
    # On a CPU a process that has imported all it needs is copied: to import it takes longer than to run it.
    context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")
    script, *words = part.command(device)
    process = context.Process(target=run_script, args=([str(SCRIPTS / script), *words, "--output", str(rows)], log))
    start = time.monotonic()
    process.start()
    try:
        process.join(seconds)
        is_late = process.is_alive()
    finally:
        end(process)
    how = "out of time" if is_late else "done"
    if process.exitcode and not is_late:
        *_, said = ["", *log.read_text(errors="replace").strip().splitlines()]
        how = f"failed with {process.exitcode}: {said:.100}"
    count = len(rows.read_text().splitlines()) if rows.exists() else 0
    return {"part": part.name, "seconds": round(time.monotonic() - start), "rows": count, "end": how}


def end(process: multiprocessing.Process) -> None:
    """Ends a process, if it still runs, and those that it has started."""
    if process.is_alive():
        process.terminate()
        process.join(10)
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_number)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    process.join()


def record(parts: Sequence[Part], folder: Path, device: str, limit: float | None) -> Iterator[Row]:
    """Runs the parts, and yields how each has ended as it does."""
    deadline = None if limit is None else time.monotonic() + limit
    for part in parts:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= part.seconds:
            took = f", takes {part.seconds}" if part.seconds else ""
            yield {"part": part.name, "seconds": 0, "rows": 0, "end": f"skipped: {max(0, left):.0f} s left{took}"}
        else:
            yield run_part(part, folder, device, left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(benchmark.rows for benchmark in RECORDED))
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--models", help="of those that a benchmark is recorded for, separated by commas")
    parser.add_argument("--batch", type=numbers, help="of the batch sizes that it is recorded for, separated by commas")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="for all; none by default")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default, help="cuda, or cpu: only to see that it runs")
    args = parser.parse_args()
    parts = parts_of(args.device, args.only, args.models and args.models.split(","), args.batch)
    if not parts:
        known = ", ".join(dict.fromkeys(model for benchmark in RECORDED for model in benchmark.models))
        recorded = ", ".join(map(str, sorted({B for benchmark in RECORDED for B in benchmark.batches})))
        parser.error(f"nothing of that is recorded: models are {known}, batch sizes {recorded}, but not all for each benchmark")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"{args.output} is a file, and a folder is wanted")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.device == "cpu":
        importlib.import_module("whisper_triton.benchmarks.generate")
    ends = []
    for row in record(parts, args.output, args.device, args.limit):
        ends.append(row)
        print(f"{row['part']}: {row['end']}; {row['seconds']} s, {row['rows']} rows", file=sys.stderr, flush=True)
    print_table(ends)
    sys.exit(any(str(row["end"]).startswith("failed") for row in ends))


def end_with_all(*_: object) -> None:
    """On SIGTERM, as `timeout` sends it: what has been started ends too."""
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end_with_all)
    main()
