"""Runs a test suite of Whisper's that was written elsewhere, plain and with every model accelerated, and lists what differs.

    cd transformers && python .../tests/run_foreign_suite.py tests/models/whisper -k "generate and not integration"

What follows the path is for pytest. Each WhisperForConditionalGeneration is accelerated when it is made, which also covers
`from_pretrained`. Exits with 0 if every test came out the same, with 1 if not, and with 2 if pytest ran no tests.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# Environment variables: this file is then pytest's plugin.
OUTCOMES = "WHISPER_TRITON_OUTCOMES"  # the file to write
ACCELERATE = "WHISPER_TRITON_ACCELERATE"  # set: accelerate every model

_outcomes: dict[str, list[str]] = {}  # by test: what became of it, and the last line of an error


def pytest_configure(config: pytest.Config) -> None:
    """Has models accelerated, in each of pytest-xdist's processes."""
    if os.environ.get(ACCELERATE):
        accelerate_every_model()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keeps the worst of a test's set-up, call and tear-down, in the process that collects them."""
    outcome = "error" if report.failed and report.when != "call" else report.outcome
    if hasattr(report, "wasxfail"):
        outcome = "xpassed" if report.passed else "xfailed"
    if report.when == "call" or outcome != "passed":
        lines = str(report.longrepr or "").splitlines() if report.failed else []
        said = [line for line in lines if line.startswith("E ")] or lines[-1:]
        _outcomes[report.nodeid] = [outcome, said[0].removeprefix("E").strip() if said else ""]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes what was kept."""
    if os.environ.get(OUTCOMES) and not hasattr(session.config, "workerinput"):
        Path(os.environ[OUTCOMES]).write_text(json.dumps(_outcomes))


def accelerate_every_model() -> None:
    """From here on each WhisperForConditionalGeneration is accelerated at the end of its `__init__`."""
    from transformers import WhisperForConditionalGeneration

    import whisper_triton

    stock = WhisperForConditionalGeneration.__init__

    @functools.wraps(stock)
    def init(self: WhisperForConditionalGeneration, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        whisper_triton.accelerate(self)

    WhisperForConditionalGeneration.__init__ = init


def run(arguments: list[str], is_accelerated: bool) -> dict[str, list[str]]:
    """The outcomes of one run of pytest, whose output goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.json"
        # Last: its tests are imported by the names that they have where they come from.
        paths = [os.environ.get("PYTHONPATH", ""), str(HERE.parent)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), OUTCOMES: str(outcomes)}
        environment.pop(ACCELERATE, None)
        if is_accelerated:
            environment[ACCELERATE] = "1"
        start = f"import sys; sys.path.append({str(HERE)!r}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
        command = [sys.executable, "-c", start, "-q", "-p", "run_foreign_suite", "-p", "no:cacheprovider", *arguments]
        subprocess.run(command, env=environment, stdout=sys.stderr.fileno())
        return json.loads(outcomes.read_text()) if outcomes.exists() else {}


def compare(plain: dict[str, list[str]], ours: dict[str, list[str]]) -> list[str]:
    """A line for each test that came out otherwise."""
    lines = []
    for test in sorted(plain.keys() | ours.keys()):
        (before, _), (after, why) = plain.get(test, ["not run", ""]), ours.get(test, ["not run", ""])
        if before != after:
            lines.append(f"{test}: {before}, accelerated {after}" + (f": {why}" if why else ""))
    return lines


def main() -> int:
    """Runs the suite twice; see the module's docstring."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    plain = run(sys.argv[1:], is_accelerated=False)
    ours = run(sys.argv[1:], is_accelerated=True) if plain else {}
    if not ours:
        print("pytest ran no tests", file=sys.stderr)
        return 2
    lines = compare(plain, ours)
    print("\n".join([*lines, f"{len(plain | ours)} tests, {len(lines)} of them came out differently"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
