"""Runs NVIDIA's compute-sanitizer over the kernel tests, on a GPU, and prints a line for each of its checkers.

    python tests/run_sanitizers.py                # memcheck, racecheck and initcheck
    python tests/run_sanitizers.py racecheck --tests tests/test_select_token.py

Each test file has a process of its own, so that one that ends early, as after a fault, takes no other with it. A checker
makes kernels tens of times slower, so of each test function one case is run, for racecheck three. PyTorch's allocator is off:
within its pools a kernel may read and write what is not its own, and nobody can tell. Graphs cannot be captured then, so
tests of them are left out, and those of large tensors but for memcheck. racecheck itself breaks down at kernels with much
shared memory: a test that launches one is skipped, and counted. Each line says how many kernels of ours were launched, which
were not, and which had too much for racecheck.

Exits with 0 if every checker ran, all tests passed, every kernel was launched and nothing was found in one.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck")
KERNELS = sorted(
    name for file in (ROOT / "kernels").glob("*.py") for name in re.findall(r"^def (_\w+_kernel)\(", file.read_text(), re.M)
)
TESTS = [
    str(file) for kernel in sorted((ROOT / "kernels").glob("[!_]*.py")) for file in [ROOT / "tests" / f"test_{kernel.name}"]
]
SELECT = "WHISPER_TRITON_ONE_CASE"  # an environment variable: this file is then pytest's plugin, in the sanitizer's process
LEFT_OUT = re.compile("graph|captur|compile|opcheck|profile|streams", re.IGNORECASE)
# What large sizes add is addresses, memcheck's concern. The other two shadow memory, of which little is left then.
# Hundreds of steps over a whole vocabulary take racecheck five minutes, and show no more than one of them and many small ones.
LARGE = re.compile("large|RealShapes|whispers_shapes|two_to_the_31|many_steps", re.IGNORECASE)
# Bytes of shared memory a program from which racecheck 2025.3 ends with "failed to handle a hardware exception": every kernel
# that it did so at has more than CUDA gives without being asked, those below passed.
RACECHECK_SHARED = 48 << 10
_launched: set[str] = set()  # kernels of ours, in the sanitizer's process
_too_large: set[str] = set()  # those of them at which racecheck would have broken down


def pytest_configure(config: pytest.Config) -> None:
    """Notes which kernels are launched, and keeps from racecheck those that it breaks down at."""
    if SELECT not in os.environ:
        return
    from triton.compiler import CompiledKernel

    load = CompiledKernel._init_handles

    def noted(kernel: CompiledKernel) -> None:
        if os.environ[SELECT] == "racecheck" and kernel.metadata.shared > RACECHECK_SHARED:
            _too_large.add(kernel.metadata.name)
            pytest.skip(
                f"{kernel.metadata.name} has {kernel.metadata.shared} bytes of shared memory: racecheck would break down"
            )
        load(kernel)
        _launched.add(kernel.metadata.name)

    CompiledKernel._init_handles = noted
    if os.environ[SELECT] == "racecheck":
        multiply_halves_on_the_cpu()


def multiply_halves_on_the_cpu() -> None:
    """Replaces `torch.nn.functional.linear`, by which the tests make their yardsticks, for half-precision tensors on a GPU.

    cuBLAS computes these by kernels with much shared memory, at which racecheck breaks down, though it is asked about ours
    alone; and a yardstick need only be PyTorch's, wherever it is computed.
    """
    import torch

    linear = torch.nn.functional.linear

    def on_the_cpu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
            return linear(x, weight, bias)
        return linear(x.cpu(), weight.cpu(), None if bias is None else bias.cpu()).to(x.device)

    torch.nn.functional.linear = on_the_cpu


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if SELECT in os.environ:
        terminalreporter.write_line(f"launched: {' '.join(sorted(_launched))}")
        terminalreporter.write_line(f"too large: {' '.join(sorted(_too_large))}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the middle case of each test function, for racecheck also the first and the last."""
    if SELECT not in os.environ:
        return
    import torch

    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.exit("there is no GPU to check kernels on", returncode=3)
    cases: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        is_property = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)  # many cases in one
        is_left_out = LEFT_OUT.search(item.nodeid) or (os.environ[SELECT] != "memcheck" and LARGE.search(item.nodeid))
        if not is_left_out and not is_property:
            cases.setdefault((item.path, item.nodeid.partition("[")[0]), []).append(item)
    kept = []
    for function in cases.values():
        last = len(function) - 1
        ends = (0, last) if os.environ[SELECT] == "racecheck" else ()
        kept += [function[i] for i in sorted({*ends, len(function) // 2})]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


class Result(NamedTuple):
    """What a checker came to."""

    tests: int
    failed: int
    skipped: int
    errors: int | None  # in kernels of ours; None: the checker did not get to its summary
    elsewhere: int  # in kernels of PyTorch's and its libraries'
    launched: frozenset[str]  # kernels of ours
    too_large: frozenset[str]  # kernels of ours whose shared memory racecheck cannot take


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer, or None."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ] + ["/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{home}/{folder}" for home in homes for folder in ("bin", "compute-sanitizer"))]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def command(sanitizer: str, tool: str, tests: list[str]) -> list[str]:
    """The command line that runs `tests` under a checker."""
    # Of what other kernels write, initcheck must know.
    only_ours = [] if tool == "initcheck" else [part for name in KERNELS for part in ("--kernel-name", f"kns={name}")]
    more = ["--report-api-errors", "no"] if tool == "memcheck" else []  # PyTorch asks for what may not be there
    run = ["-m", "pytest", "-q", "-p", "run_sanitizers", "-p", "no:cacheprovider", "--timeout", "0", "--durations", "5", *tests]
    options = ["--target-processes", "application-only", "--print-limit", "10000", "--error-exitcode", "99"]
    return [sanitizer, "--tool", tool, *options, *more, *only_ours, sys.executable, *run]


def read(tool: str, output: str) -> Result:
    """What the output of a checker and of pytest under it says."""
    ended = re.search(r"^.*\b(?:passed|failed|errors?)\b.* in [\d.]+s\b.*$", output, re.M)
    counts = Counter(
        {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", ended[0] if ended else "")}
    )
    failed = counts["failed"] + counts["error"]
    summary = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    lines = [re.search(rf"^{what}: (.*)$", output, re.M) for what in ("launched", "too large")]
    kernels = [frozenset(KERNELS).intersection(line[1].split() if line else ()) for line in lines]
    if summary is None:
        return Result(counts["passed"] + failed, failed, counts["skipped"], None, 0, *kernels)
    found = int(summary[1] or summary[2])
    # Every report of initcheck says where, "at <kernel>+0x...". The other two are asked about ours alone.
    places = re.findall(r"^=+ +at (\S+)", output, re.M)
    elsewhere = min(found, sum(not place.startswith(tuple(KERNELS)) for place in places)) if tool == "initcheck" else 0
    return Result(counts["passed"] + failed, failed, counts["skipped"], found - elsewhere, elsewhere, *kernels)


class Run(NamedTuple):
    """One checker over one test file."""

    file: str
    result: Result
    why: str | None  # it is not clean, if it is not
    output: str


def run(sanitizer: str, tool: str, file: str, limit: float, folder: Path) -> Run:
    """Runs `tool` over the tests of `file`, for at most `limit` seconds; `folder` gets its output as it comes."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": paths, SELECT: tool}
    name = re.sub(r"[^\w.-]+", "-", Path(file).name)  # of a node id too
    log = folder / f"{tool}-{name}.log"
    with log.open("w") as target:
        # In a session of its own, so that what it has started ends with it.
        process = subprocess.Popen(
            command(sanitizer, tool, [file]),
            cwd=ROOT,
            env=environment,
            stdout=target,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
    output = log.read_text(errors="replace")
    result = read(tool, output)
    if "Internal Sanitizer Error" in output:  # its summary counts this as found
        why, result = "the checker broke down", result._replace(errors=None)
    elif status is None:
        why = f"stopped after {limit:.0f} s"
    elif result.errors is None:
        why = "no summary"
    elif result.tests == 0:
        why = "no test ran"
    # The sanitizer exits with 99 for what it found in other kernels too.
    elif result.failed or result.errors or status not in (0, 99 if result.elsewhere else 0):
        why = f"{result.failed} failed, {result.errors} errors, exit status {status}"
    else:
        why = None
    return Run(file, result, why, output)


def main() -> int:
    """Runs the checkers; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(TOOLS)}; all by default")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or node ids for pytest")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one checker and file")
    parser.add_argument("--jobs", type=int, default=1, help="files at a time")
    parser.add_argument("--logs", type=Path, help="a folder for the whole output of each, as it comes")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if unknown := set(args.tools) - set(TOOLS):
        parser.error(f"no such checker: {', '.join(sorted(unknown))}")
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("compute-sanitizer is not installed: it comes with the CUDA toolkit", file=sys.stderr)
        return 1
    is_clean = True
    for tool in args.tools or TOOLS:
        start = time.monotonic()
        with ThreadPoolExecutor(args.jobs) as pool, tempfile.TemporaryDirectory() as temporary:
            folder = args.logs or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            runs = list(pool.map(partial(run, sanitizer, tool, limit=args.limit, folder=folder), args.tests))
        names = ("tests", "failed", "skipped", "elsewhere")
        tests, failed, skipped, elsewhere = (sum(getattr(one.result, name) for one in runs) for name in names)
        errors = sum(one.result.errors or 0 for one in runs)
        others = f" ({elsewhere} in other kernels)" if elsewhere else ""
        not_ended = sum(one.result.errors is None for one in runs)
        late = f", {not_ended} of {len(runs)} files without a summary" if not_ended else ""
        seconds = time.monotonic() - start
        missing = sorted(frozenset(KERNELS).difference(*(one.result.launched for one in runs)))
        is_clean &= args.tests != TESTS or not missing
        kernels = f"{len(KERNELS) - len(missing)} of {len(KERNELS)} kernels"
        without = f" (without {', '.join(missing)})" if missing and args.tests == TESTS else ""
        too_large = sorted(frozenset().union(*(one.result.too_large for one in runs)))
        why_skipped = f" (shared memory of {', '.join(too_large)})" if too_large else ""
        print(
            f"{tool:<10} {tests} tests, {kernels}{without}, {failed} failed, {skipped} skipped{why_skipped},"
            f" {errors} errors{others}{late}, {seconds:.0f} s",
            flush=True,
        )
        for one in runs:
            if one.why is not None:
                is_clean = False
                print(f"{tool}, {one.file}: {one.why}", *one.output.splitlines()[-60:], sep="\n", file=sys.stderr)
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
