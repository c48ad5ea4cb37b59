"""How every benchmark here measures: CUDA graphs over buffers larger than the L2, medians, and one row a measurement.

A decode step reads each layer's weights and caches once, from memory. A loop over one small buffer would measure the L2,
so a measurement captures one call a buffer in a CUDA graph, with enough buffers to pass the L2 several times over.
On a CPU the same calls are timed by the clock, over two buffers: it proves that a benchmark works, and nothing about kernels.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from whisper_triton.kernels._dispatch import HAS_TRITON

Row = dict[str, object]

L2_MULTIPLE = 6  # bytes touched a replay, in units of the L2: at most a sixth of a buffer can survive to the next replay


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
    return time_device(graph.replay, calls, replays)


def time_device(run: Callable[[], object], calls: int = 1, repeats: int = 30) -> tuple[float, float]:
    """As `time_graph`, of whatever `run` launches; where the host is slower than the GPU, of the host."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return median_and_spread([1000 * start.elapsed_time(end) / calls for start, end in events])


def median_and_spread(times: Sequence[float]) -> tuple[float, float]:
    """The median, and half the range of the middle 80 %."""
    ordered, cut = sorted(times), len(times) // 10
    return statistics.median(ordered), (ordered[-1 - cut] - ordered[cut]) / 2


def measure(calls: Sequence[Callable[[], object]], replays: int = 30) -> tuple[float, float]:
    """(median, spread) in microseconds of one of `calls`, captured together in one graph."""
    return time_graph(capture(calls), len(calls), replays)


def time_calls(calls: Sequence[Callable[[], object]], rounds: int = 20, warm_up: int = 3) -> tuple[float, float]:
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
    return median_and_spread(times[warm_up:])


def measure_on_cpu(calls: Sequence[Callable[[], object]]) -> tuple[float, float]:
    """As `time_calls`, in a few rounds: what runs on a CPU only proves that it runs."""
    return time_calls(calls, rounds=3, warm_up=1)


def read_bandwidth() -> float:
    """GB/s of reading a 4 GB tensor once: the ceiling that a share of the bandwidth is stated against."""
    x = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    median, _ = measure([lambda: x.sum()], replays=20)
    return x.nbytes / median / 1e3


class Place(NamedTuple):
    """Where a benchmark runs: device, dtype, and how many GB/s are read there."""

    device: torch.device
    dtype: torch.dtype
    bandwidth: float

    @classmethod
    def on(cls, device: torch.device | str = "cuda", dtype: torch.dtype = torch.float16) -> Place:
        """The place `device`, its bandwidth measured now."""
        device = torch.device(device)
        if device.type == "cuda":
            return cls(device, dtype, read_bandwidth())
        x = torch.ones(1 << 24)
        return cls(device, dtype, x.nbytes / measure_on_cpu([lambda: x.sum()])[0] / 1e3)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def randn(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=self.device) * scale).to(self.dtype)

    def clones(self, tensors: Sequence[torch.Tensor], touched: int | None = None) -> list[list[torch.Tensor]]:
        """As `clones`; two on a CPU."""
        return clones(tensors, touched) if self.is_gpu else [[t.clone() for t in tensors] for _ in range(2)]

    def measure(self, calls: Sequence[Callable[[], object]], replays: int = 30) -> tuple[float, float]:
        """As `measure`; by the clock on a CPU."""
        return measure(calls, replays) if self.is_gpu else measure_on_cpu(calls)

    def time(self, calls: Sequence[Callable[[], object]]) -> tuple[float, float]:
        """As `time_calls`, the host included; on a CPU the first two of `calls` stand for all."""
        return time_calls(calls) if self.is_gpu else measure_on_cpu(calls[:2])

    def compile(self, function: Callable[..., object], **kwargs: object) -> Callable[..., object]:
        """`torch.compile`, whole and for the one shape; on a CPU traced only, which tells a graph break just as well."""
        kwargs = {"dynamic": False, **kwargs} if self.is_gpu else {"dynamic": False, "backend": "eager"}
        return torch.compile(function, fullgraph=True, **kwargs)

    def floor_us(self, nbytes: int) -> float:
        """The least microseconds in which `nbytes` are read."""
        return nbytes / self.bandwidth / 1e3


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """The distance to `exact` (float64), in units of its length."""
    return ((result.double() - exact).norm() / exact.norm()).item()


def check(name: str, out: torch.Tensor, exact: torch.Tensor, stock: torch.Tensor) -> None:
    """Refuses to go on with a wrong result: `out` may be at most twice as far from `exact` (float64) as `stock` is."""
    error, yardstick = relative_error(out, exact), relative_error(stock, exact)
    if not error <= 2 * yardstick:
        raise SystemExit(f"{name} is wrong: relative error {error:.2e}, PyTorch's {yardstick:.2e}")


def clones(tensors: Sequence[torch.Tensor], touched: int | None = None, most_bytes: int = 16 << 30) -> list[list[torch.Tensor]]:
    """Copies of a call's large tensors, as many as rotate past the L2 when a call touches `touched` bytes of them (all).

    Exits if that takes more than `most_bytes`: what would then be measured is the L2.
    """
    size = sum(t.nbytes for t in tensors)
    count = num_buffers(size if touched is None else touched)
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


def print_table(rows: Sequence[Row]) -> None:
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


def output_of(*command: str) -> str:
    """The first line that a command prints, or "unknown"."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:  # there is no such command
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"


@functools.cache
def environment(device: str = "cuda") -> Row:
    """What a row must say about where it comes from; of a device "cpu" its GPU is "none".

    The revision is git's unless the variable WHISPER_TRITON_REVISION names it, as for a copy of a checkout without its git.
    """
    has_gpu = device == "cuda" and torch.cuda.is_available()
    # An installed copy may lie within somebody else's repository.
    is_checkout = (Path(__file__).parents[1] / "setup.py").is_file()
    revision = output_of("git", "describe", "--always", "--dirty") if is_checkout else version("whisper-triton")
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if has_gpu else "none",
        "torch": torch.__version__,
        "triton": version("triton") if HAS_TRITON else "none",
        "transformers": version("transformers"),
        "python": sys.version.split()[0],
        "revision": os.environ.get("WHISPER_TRITON_REVISION") or revision,
        "date": datetime.date.today().isoformat(),
    }


def command_line() -> str:
    """How this script was called, as a shell takes it, without where it writes to."""
    words = iter([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    said = [word for word in words if not (word.startswith("--output") and ("=" in word or next(words, "")))]
    return shlex.join(["python", *said])


def write_rows(path: Path, rows: Sequence[Row], command: str | None = None, device: str = "cuda") -> None:
    """JSON lines, each row with the environment it was measured in and the command that did, by default this script's."""
    where = environment(device) | {"command": command or command_line()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(json.dumps(row | where) + "\n" for row in rows))
    part.replace(path)  # at once: a process that is ended meanwhile leaves the rows before
