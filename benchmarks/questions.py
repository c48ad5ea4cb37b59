"""What the files on the open questions share: the command line, what is compiled as stock compiles it, and columns.

Without a GPU, or with `--device cpu`, they run on a tiny shape, results checked, to show that they run: times mean nothing
then, `compiled` only traces, nothing is captured, and a row file is written only where one is named.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from whisper_triton.benchmarks.harness import Place, Row
from whisper_triton.benchmarks.models import SHAPES
from whisper_triton.benchmarks.tasks import Bench, run, sweep

# `reduce-overhead` compiles or warms up what it sees first, records it when it sees it again, and then replays it.
PASSES = ("first", "second", "third")


def parser_for(description: str, model: str, batch: str = "1,8") -> argparse.ArgumentParser:
    """What the files' command lines share; `model` and `batch` are defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = f"of {', '.join(SHAPES)}, or a checkpoint; several separated by commas (on a CPU: toy)"
    parser.add_argument("--model", help=f"{named}; {model} unless given")
    parser.add_argument("--batch", default=batch, help="batch sizes, separated by commas")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cuda", "cpu"), help="cpu: only to see that it runs")
    parser.add_argument("--output", type=Path, help="row file to write; by default one in benchmarks/rows/, none on a CPU")
    parser.set_defaults(default_model=model)
    return parser


@torch.no_grad()
def answer(args: argparse.Namespace, name: str, bench: Bench, loader: Callable[[Place], Callable[[str], object]]) -> list[Row]:
    """Runs `bench` for each model and batch that `parser_for`'s arguments name, and returns the rows.

    `loader(place)(model)` is what `bench` gets. The rows go to benchmarks/rows/NAME.jsonl unless `args` say otherwise.
    """
    is_cpu = args.device == "cpu"
    if is_cpu:
        torch.set_num_threads(1)  # a second one brings such shapes nothing, and waits where the cores are busy
    torch.manual_seed(0)
    place = Place.on(args.device, torch.float32 if is_cpu else torch.float16)
    models = (args.model or ("toy" if is_cpu else args.default_model)).split(",")
    output = args.output or (None if is_cpu else Path(__file__).parent / "rows" / f"{name}.jsonl")
    batches = [int(B) for B in args.batch.split(",")]
    return run(sweep({name: bench}, place, loader(place), models, batches), output, device=args.device)


def compiled(function: Callable, place: Place, fullgraph: bool = True, **options: object) -> Callable:
    """`function` compiled as stock's `generate` compiles a step: reduce-overhead, and for any size once a second one is seen.

    On a CPU only traced. Forgets what was compiled before: variants share code, and a function is compiled only so many times.
    """
    torch._dynamo.reset()
    options = (options or {"mode": "reduce-overhead"}) if place.is_gpu else {"backend": "eager"}
    return torch.compile(function, fullgraph=fullgraph, **options)


def keep_still(*tensors: torch.Tensor) -> None:
    """Marks what stays where it is, as stock marks its static caches: a compiled function then does not copy it."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)


def side_by_side(**ways: tuple[float, float]) -> Row:
    """The columns that compare two ways, each (median, spread) in microseconds, and the first's time over the second's."""
    (first, a), (second, b) = ways.items()
    return {
        f"{first}_us": a[0],
        f"{first}_spread_us": a[1],
        f"{second}_us": b[0],
        f"{second}_spread_us": b[1],
        f"{first}/{second}": a[0] / b[0],
    }
