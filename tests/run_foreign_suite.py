"""Runs a test suite of Whisper's that was written elsewhere, plain and with every model accelerated, and lists what differs.

    cd transformers && python .../tests/run_foreign_suite.py tests/models/whisper -k "generate and not integration"

What follows the path is for pytest. Each WhisperForConditionalGeneration is accelerated when it is made, which also covers
`from_pretrained`; other models stay as they are. Tests that fail in both runs for different reasons are listed, and do not
count: a reason may hold random numbers. Exits with 0 if every test came out the same, with 1 if not, and with 2 if pytest ran
no tests or did not come to its end.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HERE = Path(__file__).parent
# Environment variables: this file is then pytest's plugin.
OUTCOMES = "WHISPER_TRITON_OUTCOMES"  # the file to write, line by line: a run may crash
ACCELERATE = "WHISPER_TRITON_ACCELERATE"  # set: accelerate every model
# From the best to the worst; a test that runs parts of itself as subtests has a report for each under its own name.
RANKS = {name: rank for rank, name in enumerate(("passed", "skipped", "xfailed", "rerun", "xpassed", "failed", "error"))}
HAS_OURS = "an accelerated model"  # a property of tests that make one
ENDED = "ended"

_file: Path | None = None
_made: list[object] = []  # None for each model that has been accelerated since a test was reported


class Run(NamedTuple):
    """What became of one run of pytest."""

    outcomes: dict[str, tuple[str, str]]  # by test, or file that could not be collected: what became of it, and why
    accelerating: set[str]  # tests that made an accelerated model
    last: str  # the test that was begun last
    status: int | None  # pytest's exit status; None: it did not come to its end


def pytest_configure(config: pytest.Config) -> None:
    """Has models accelerated, in each of pytest-xdist's processes, and finds out where to write to."""
    global _file
    outcomes = os.environ.pop(OUTCOMES, None)  # a pytest that a test starts has outcomes of its own
    if outcomes and not hasattr(config, "workerinput"):
        _file = Path(outcomes)
    if os.environ.get(ACCELERATE):
        accelerate_every_model()


def pytest_runtest_logstart(nodeid: str) -> None:
    """Notes what is begun."""
    _write("begun", nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> None:
    """Notes for the report that is about to be made whether the test has made an accelerated model."""
    if _made:
        _made.clear()
        item.user_properties.append((HAS_OURS, True))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keeps what became of a test's set-up, call and tear-down, in the process that collects them."""
    outcome = "error" if report.failed and report.when != "call" else report.outcome
    if hasattr(report, "wasxfail"):
        outcome = "xpassed" if report.passed else "xfailed"
    if report.when == "call" or outcome != "passed":
        _write("outcome", report.nodeid, outcome, _reason(report))
    if (HAS_OURS, True) in map(tuple, report.user_properties):
        _write("accelerating", report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Keeps what could not be collected."""
    if report.failed:
        _write("outcome", report.nodeid, "error", _reason(report))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Notes that the run came to its end."""
    _write(ENDED, int(exitstatus))


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    lines = str(report.longrepr or "").splitlines() if report.failed else []
    said = [line for line in lines if line.startswith("E ")] or lines[-1:]
    return said[0].removeprefix("E").strip() if said else ""


def _write(*entry: object) -> None:
    if _file is not None:
        with _file.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def accelerate_every_model() -> None:
    """From here on each WhisperForConditionalGeneration is accelerated at the end of its `__init__`."""
    from transformers import WhisperForConditionalGeneration

    import whisper_triton

    stock = WhisperForConditionalGeneration.__init__

    @functools.wraps(stock)
    def init(self: WhisperForConditionalGeneration, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        whisper_triton.accelerate(self)
        _made.append(None)

    WhisperForConditionalGeneration.__init__ = init


def run(arguments: list[str], is_accelerated: bool) -> Run:
    """One run of pytest, whose output goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.jsonl"
        outcomes.touch()
        # Last: the suite's tests are imported by the names that they have where they come from.
        paths = [os.environ.get("PYTHONPATH", ""), str(HERE.parent), str(HERE)]
        # By the environment, for a pytest that a test starts too.
        plugins = [os.environ.get("PYTEST_PLUGINS", ""), "run_foreign_suite"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTEST_PLUGINS": ",".join(filter(None, plugins)),
            OUTCOMES: str(outcomes),
        }
        environment.pop(ACCELERATE, None)
        if is_accelerated:
            environment[ACCELERATE] = "1"
        options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command = [sys.executable, "-m", "pytest", *options, *arguments]
        subprocess.run(command, env=environment, stdout=sys.stderr.fileno())
        return read(outcomes.read_text().splitlines())


def read(lines: list[str]) -> Run:
    """What a run has written."""
    outcomes: dict[str, tuple[str, str]] = {}
    accelerating: set[str] = set()
    last, status = "", None
    for kind, subject, *rest in map(json.loads, lines):
        if kind == "begun":
            last = subject
        elif kind == "accelerating":
            accelerating.add(subject)
        elif kind == ENDED:
            status = subject
        elif RANKS[rest[0]] >= RANKS[outcomes.get(subject, ("passed", ""))[0]]:
            outcomes[subject] = tuple(rest)
    return Run(outcomes, accelerating, last, status)


def compare(plain: Run, ours: Run) -> tuple[list[str], list[str]]:
    """A line for each test that came out otherwise, and one for each that failed in both runs for different reasons."""
    lines, notes, none = [], [], ("not run", "")
    for test in sorted(plain.outcomes.keys() | ours.outcomes.keys()):
        (before, reason), (after, why) = plain.outcomes.get(test, none), ours.outcomes.get(test, none)
        if before != after:
            lines.append(f"{test}: {before}, accelerated {after}" + (f": {why}" if why else ""))
        elif reason != why:
            notes.append(f"{test}: {before} in both runs: {reason}, accelerated: {why}")
    return lines, notes


def main() -> int:
    """Runs the suite twice; see the module's docstring."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    plain = run(sys.argv[1:], is_accelerated=False)
    ours = run(sys.argv[1:], is_accelerated=True) if plain.outcomes else plain
    if not ours.outcomes:
        print("pytest ran no tests", file=sys.stderr)
        return 2
    lines, notes = compare(plain, ours)
    tests = plain.outcomes.keys() | ours.outcomes.keys()
    counts = f"{len(tests)} tests, {len(ours.accelerating)} of them with an accelerated model"
    print("\n".join([*notes, *lines, f"{counts}, {len(lines)} came out differently"]))
    broken = [(name, run.last) for name, run in (("plain", plain), ("accelerated", ours)) if run.status not in (0, 1)]
    for name, last in broken:
        print(f"the {name} run did not come to its end; begun last was {last}", file=sys.stderr)
    return 2 if broken else 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
