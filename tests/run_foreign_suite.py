"""Runs a test suite of Whisper's that was written elsewhere, plain and with every model accelerated, and lists what differs.

    cd transformers && python .../tests/run_foreign_suite.py tests/models/whisper -k "generate and not integration"

What follows the path is for pytest. Each WhisperForConditionalGeneration is accelerated when it is made, which also covers
`from_pretrained`; other models stay as they are. A test's parts, its subtests, set-up and tear-down, are told apart. What fails
in both runs for different reasons is listed, and does not count: a reason may hold random numbers. Exits with 0 if every test
came out the same, with 1 if not, and with 2 if pytest ran no tests or did not come to its end.
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
QUOTES = "\"'"
MADE_ONE = "made an accelerated model"  # a property of tests

_session: tuple[pytest.Config, Path] | None = None  # whose outcomes are kept, and where
_has_made_one = False  # since a test began

Part = tuple[str, str]  # a test, or a file that could not be collected, and which part of it: "" for the test itself


class Run(NamedTuple):
    """What became of one run of pytest."""

    outcomes: dict[Part, tuple[str, str]]  # what became of it, and why
    files: set[str]  # that could not be collected
    tests: set[str]  # of the outcomes, those files too
    accelerating: set[str]  # tests that made an accelerated model
    last: str  # the test that was begun last
    status: int | None  # pytest's exit status; None: it did not come to its end

    def of(self, part: Part) -> tuple[str, str]:
        """Parts are only kept where something became of them."""
        return self.outcomes.get(part, ("passed" if part[0] in self.tests else "not run", ""))


def pytest_configure(config: pytest.Config) -> None:
    """Has models accelerated, in each of pytest-xdist's processes, and finds out where to write to."""
    global _session
    outcomes = os.environ.pop(OUTCOMES, None)  # a pytest that a test starts has outcomes of its own
    if outcomes and not hasattr(config, "workerinput"):
        _session = config, Path(outcomes)
    if os.environ.get(ACCELERATE):
        accelerate_every_model()


def pytest_runtest_logstart(nodeid: str) -> None:
    """Notes what is begun."""
    _write("begun", nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test makes is told from what an import has made."""
    global _has_made_one
    _has_made_one = False


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> None:
    """Notes for the report that is about to be made whether the test has made an accelerated model."""
    if _has_made_one and (MADE_ONE, True) not in item.user_properties:
        item.user_properties.append((MADE_ONE, True))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keeps what became of a test's set-up, call and tear-down, in the process that collects them."""
    outcome = report.outcome
    if hasattr(report, "wasxfail"):
        outcome = "xpassed" if report.passed else "xfailed"
    subtest = getattr(report, "context", None)  # pytest 9 and pytest-subtests have its message and arguments there
    if subtest is not None:
        if outcome != "passed":
            # Text, with quotes that pytest-xdist adds to.
            arguments = (f"{name}={str(value).strip(QUOTES)}" for name, value in subtest.kwargs.items())
            _write("outcome", report.nodeid, " ".join([subtest.msg or "subtest", *arguments]), outcome, _reason(report))
    elif report.when == "call":
        _write("outcome", report.nodeid, "", outcome, _reason(report))
    elif outcome != "passed":
        outcome = "error" if report.failed else outcome
        _write("outcome", report.nodeid, report.when, outcome, _reason(report))
    if (MADE_ONE, True) in map(tuple, report.user_properties):
        _write("accelerating", report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Keeps what could not be collected."""
    if report.failed:
        _write("file", report.nodeid)
        _write("outcome", report.nodeid, "collection", "error", _reason(report))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Notes that the run came to its end."""
    if _session is not None and session.config is _session[0]:  # and not one that a test has run in this process
        _write("ended", int(exitstatus))


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    lines = str(report.longrepr or "").splitlines() if report.failed else []
    said = [line for line in lines if line.startswith("E ")] or lines[-1:]
    return said[0].removeprefix("E").strip() if said else ""


def _write(*entry: object) -> None:
    if _session is not None:
        with _session[1].open("a") as file:
            file.write(json.dumps(entry) + "\n")


def accelerate_every_model() -> None:
    """From here on each WhisperForConditionalGeneration is accelerated at the end of its `__init__`."""
    from transformers import WhisperForConditionalGeneration

    import whisper_triton

    stock = WhisperForConditionalGeneration.__init__

    @functools.wraps(stock)
    def init(self: WhisperForConditionalGeneration, *args: Any, **kwargs: Any) -> None:
        global _has_made_one
        stock(self, *args, **kwargs)
        whisper_triton.accelerate(self)
        _has_made_one = True

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
    outcomes: dict[Part, tuple[str, str]] = {}
    files: set[str] = set()
    accelerating: set[str] = set()
    last, status = "", None
    for kind, subject, *rest in map(json.loads, lines):
        if kind == "begun":
            last = subject
        elif kind == "file":
            files.add(subject)
        elif kind == "accelerating":
            accelerating.add(subject)
        elif kind == "ended":
            status = subject
        else:
            part, outcome, reason = rest
            outcomes[subject, part] = outcome, reason
    return Run(outcomes, files, {test for test, _ in outcomes}, accelerating, last, status)


def compare(plain: Run, ours: Run) -> tuple[list[str], list[str]]:
    """A line for each part of a test that came out otherwise, and one for each that failed for different reasons."""
    lines, notes = [], []
    for test, part in sorted(plain.outcomes.keys() | ours.outcomes.keys()):
        (before, reason), (after, why) = (run.of((test, part)) for run in (plain, ours))
        name = f"{test} ({part})" if part else test
        if before != after:
            lines.append(f"{name}: {before}, accelerated {after}" + (f": {why}" if why else ""))
        elif reason != why:
            notes.append(f"{name}: {before} in both runs: {reason}, accelerated: {why}")
    return lines, notes


def main() -> int:
    """Runs the suite twice; see the module's docstring."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    plain = run(sys.argv[1:], is_accelerated=False)
    if plain.status is not None and not plain.outcomes:
        print("pytest ran no tests", file=sys.stderr)
        return 2
    ours = run(sys.argv[1:], is_accelerated=True)
    lines, notes = compare(plain, ours)
    files = plain.files | ours.files
    counts = [f"{len((plain.tests | ours.tests) - files)} tests", f"{len(ours.accelerating)} of them made an accelerated model"]
    counts += [f"{len(files)} files could not be collected"] if files else []
    print("\n".join([*notes, *lines, f"{', '.join(counts)}; differences: {len(lines)}"]))
    broken = [(name, one.last) for name, one in (("plain", plain), ("accelerated", ours)) if one.status not in (0, 1)]
    for name, last in broken:
        print(f"the {name} run did not come to its end; begun last was {last or 'no test'}", file=sys.stderr)
    return 2 if broken else 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
