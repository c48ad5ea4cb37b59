"""How every benchmark here measures: CUDA graphs over buffers larger than the L2, medians, and one row a measurement.

A decode step reads each layer's weights and caches once, from memory. A loop over one small buffer would measure the L2,
so a measurement captures one call a buffer in a CUDA graph, with enough buffers to pass the L2 several times over.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

L2_MULTIPLE = 6  # bytes touched a replay, in units of the L2: at most a sixth of a buffer can survive to the next replay
ROUNDS = 20 if torch.cuda.is_available() else 2  # of what the host launches; without a GPU only to see that it runs


def num_buffers(bytes_a_call: int) -> int:
    """How many copies of a call's buffers a graph rotates through so that what is touched passes the L2; at least 2."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-L2_MULTIPLE * l2 // bytes_a_call))


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls, after a warm-up that compiles whatever they compile."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def time_graph(graph: torch.cuda.CUDAGraph, calls: int, replays: int = 30) -> tuple[float, float]:
    """Microseconds a call: (median, spread), the spread being half the range of the middle 80 % of the replays."""
    for _ in range(3):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(1000 * start.elapsed_time(end) / calls for start, end in events)
    cut = replays // 10
    return statistics.median(times), (times[-1 - cut] - times[cut]) / 2


def measure(calls: Sequence[Callable[[], object]], replays: int = 30) -> tuple[float, float]:
    """(median, spread) in microseconds of one of `calls`, captured together in one graph."""
    return time_graph(capture(calls), len(calls), replays)


def time_calls(calls: Sequence[Callable[[], object]], rounds: int = ROUNDS, warm_up: int = 3) -> tuple[float, float]:
    """(median, spread) in microseconds of one of `calls`, each launched by the host, which waits for the device once a round.

    The wall clock, host included; on a CPU too. `warm_up` rounds go ahead: `reduce-overhead` compiles, warms up and records.
    """
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for _ in range(warm_up + rounds):
        synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        synchronize()
        times.append(1e6 * (time.perf_counter() - start) / len(calls))
    times = sorted(times[warm_up:])
    cut = rounds // 10
    return statistics.median(times), (times[-1 - cut] - times[cut]) / 2


def read_bandwidth() -> float:
    """GB/s of reading a 4 GB tensor once: the ceiling that a share of the bandwidth is stated against."""
    x = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    median, _ = measure([lambda: x.sum()], replays=20)
    return x.nbytes / median / 1e3


def check(name: str, out: torch.Tensor, exact: torch.Tensor, stock: torch.Tensor) -> None:
    """Refuses to go on with a wrong result: `out` may be at most twice as far from `exact` (float64) as `stock` is."""

    def error(result: torch.Tensor) -> float:
        return ((result.double() - exact).norm() / exact.norm()).item()

    if not error(out) <= 2 * error(stock):
        raise SystemExit(f"{name} is wrong: relative error {error(out):.2e}, PyTorch's {error(stock):.2e}")


def clones(tensors: Sequence[torch.Tensor], touched: int | None = None, most_bytes: int = 16 << 30) -> list[list[torch.Tensor]]:
    """Copies of a call's large tensors, as many as rotate past the L2 when a call touches `touched` bytes of them (all).

    Two on a CPU, where nothing is measured. Exits if it takes more than `most_bytes`: what would then be measured is the L2.
    """
    size = sum(t.nbytes for t in tensors)
    count = num_buffers(size if touched is None else touched) if tensors[0].is_cuda else 2
    if count * size > most_bytes:
        raise SystemExit(f"{count} buffers of {size} bytes would be needed to pass the L2")
    return [[t.clone() for t in tensors] for _ in range(count)]


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line's arguments; exits where there is no GPU to measure."""
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is nothing to measure without a GPU, and torch finds none")
    return args


def parse_args(description: str, output: str) -> argparse.Namespace:
    """The arguments that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "rows" / output, help="row file to write")
    return parse(parser)


def print_table(rows: Sequence[dict[str, object]]) -> None:
    """Aligned columns, one line a row, numbers with three significant places at least."""

    def text(value: object) -> str:
        if value is None:
            return "-"
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([text(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def environment() -> dict[str, object]:
    """What a row must say about where it comes from."""
    import transformers
    import triton

    def output_of(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
        except OSError:  # there is no such command
            return "unknown"
        return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "revision": output_of("git", "describe", "--always", "--dirty"),
        "date": datetime.date.today().isoformat(),
    }


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """JSON lines, each row with the environment it was measured in."""
    where = environment()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row | where) + "\n" for row in rows))
