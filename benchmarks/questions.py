"""What the files on the open questions share: the command line, the published shapes, and a small mode where there is no GPU.

The small mode (`--device cpu`, taken by itself without a GPU) runs everything on tiny shapes, results checked, to show that it
runs: its times mean nothing, `compiled` only traces, nothing is captured, and a row file is written only where one is named.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from generate import SHAPES
from harness import print_table, write_rows

# `reduce-overhead` compiles or warms up what it sees first, records it when it sees it again, and then replays it.
PASSES = ("first", "second", "third")


class Shape(NamedTuple):
    """Of a decoder's attention: heads, head dim, slots of the self cache, frames of the cross cache, layers."""

    H: int
    D: int
    S: int
    frames: int
    layers: int


def shape_of(name: str, device: str) -> Shape:
    """The published shape of a model; on a CPU a tiny one."""
    if device == "cpu":
        return Shape(H=2, D=32, S=24, frames=40, layers=2)
    d_model, _, layers, heads, _, _ = SHAPES[name]
    return Shape(heads, d_model // heads, 448, 1500, layers)


def dtype_on(device: str) -> torch.dtype:
    return torch.float16 if device == "cuda" else torch.float32


def parser_for(description: str, model: str | None = None, batch: str = "1,8") -> argparse.ArgumentParser:
    """What the files' command lines share; `model` and `batch` are defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if model is not None:
        parser.add_argument("--model", default=model, help=f"of {', '.join(SHAPES)}; several separated by commas")
    parser.add_argument("--batch", default=batch, help="batch sizes, separated by commas")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cuda", "cpu"), help="cpu: tiny shapes, to see that it runs")
    parser.add_argument("--output", type=Path, help="row file to write; by default one in benchmarks/rows/, none on a CPU")
    return parser


def parse_question(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with lists `models` and `batches`. In the small mode one model stands for all."""
    args = parser.parse_args()
    args.batches = [int(B) for B in args.batch.split(",")]
    args.models = args.model.split(",") if hasattr(args, "model") else []
    if args.device == "cpu":
        args.models = args.models and ["tiny shapes"]
        torch.set_num_threads(1)  # a second one brings such shapes nothing, and waits where the cores are busy
    torch.manual_seed(0)
    return args


def report(args: argparse.Namespace, rows: Sequence[dict[str, object]], output: str) -> None:
    """Prints the rows and writes them."""
    print_table(rows)
    if args.output or args.device == "cuda":
        write_rows(args.output or Path(__file__).parent / "rows" / output, rows)


def compiled(function: Callable, device: str, fullgraph: bool = True, **options: object) -> Callable:
    """`function` compiled as stock's `generate` compiles a step (reduce-overhead); on a CPU only traced.

    Forgets what was compiled before: variants share code, and a function is compiled only so many times.
    """
    torch._dynamo.reset()
    options = {"backend": "eager"} if device == "cpu" else options or {"mode": "reduce-overhead"}
    return torch.compile(function, fullgraph=fullgraph, **options)


def keep_still(*tensors: torch.Tensor) -> None:
    """Marks what stays where it is, as stock marks its static caches: a compiled function then does not copy it."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)


def side_by_side(**ways: tuple[float, float]) -> dict[str, object]:
    """The columns that compare two ways, each (median, spread) in microseconds, and the first's time over the second's."""
    (first, a), (second, b) = ways.items()
    return {
        f"{first}_us": a[0],
        f"{first}_spread_us": a[1],
        f"{second}_us": b[0],
        f"{second}_spread_us": b[1],
        f"{first}/{second}": a[0] / b[0],
    }
