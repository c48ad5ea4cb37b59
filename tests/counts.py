"""What the suite prints at its end: how many bad inputs, and how much of whatever else its tests count, over all processes.

A pytest plugin, which conftest.py registers. A run of the whole suite fails if it tried too few bad inputs.
"""

from __future__ import annotations

from collections import Counter

import pytest

LEAST_BAD_INPUTS = 300  # of a whole run
# What is counted.
REFUSED_BY_REFERENCES = "of the bad inputs, refused by references too"
KERNEL_CALLS = "calls of kernels drawn by hypothesis"
CHANGED_FILES = "changed checkpoint files, each refused in one line or harmless"
SEQUENCES = "sequences of what is done to a model, each undone"
WINDOWS = "windows in a row, each as the first of its kind"
STEPS = "decoding steps of theirs"

COUNTED = "counted"  # a property of a test's report

_counted: Counter[str] = Counter()  # by the test that runs


def count(what: str, number: int = 1) -> None:
    """Adds `number` to what is printed for `what`, if the test that runs passes."""
    _counted[what] += number


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    """Hands on what the test has counted with its report, which xdist takes to the process that prints."""
    if call.when == "call":
        item.user_properties.append((COUNTED, dict(_counted)))
    _counted.clear()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line for bad inputs, tests marked `bad_input` that passed, and one for each thing that was counted."""
    tried = bad_inputs(terminalreporter)
    if tried:
        terminalreporter.write_line(f"bad inputs: {tried} distinct, each refused with a reason or answered as stock does")
    total: Counter[str] = Counter()
    for report in passed(terminalreporter):
        for counted in (value for name, value in report.user_properties if name == COUNTED):
            total.update(counted)
    for what in sorted(total):
        terminalreporter.write_line(f"{what}: {total[what]}")
    if has_too_few(terminalreporter):
        terminalreporter.write_line(f"the whole suite must try {LEAST_BAD_INPUTS} bad inputs at least", red=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run that went well but for its number of bad inputs; workers of xdist know only of their own."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and session.exitstatus == pytest.ExitCode.OK and has_too_few(reporter):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def passed(reporter: pytest.TerminalReporter) -> list[pytest.TestReport]:
    return [report for report in reporter.getreports("passed") if report.when == "call"]


def bad_inputs(reporter: pytest.TerminalReporter) -> int:
    return len({report.nodeid for report in passed(reporter) if "bad_input" in report.keywords})


def has_too_few(reporter: pytest.TerminalReporter) -> bool:
    config, option = reporter.config, reporter.config.option
    is_whole = config.args_source is not config.ArgsSource.ARGS or config.args == config.getini("testpaths")
    less = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "stepwise", "collectonly")
    is_chosen = any(getattr(option, name, None) for name in less)
    return is_whole and not is_chosen and bad_inputs(reporter) < LEAST_BAD_INPUTS
