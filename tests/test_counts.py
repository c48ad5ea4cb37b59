"""What the suite says of itself: its counts, from every process, and that a run of all of it tried enough bad inputs."""

from __future__ import annotations

from pathlib import Path

import counts
import pytest

pytest_plugins = ["pytester"]

SUITE = """
import pytest
from counts import count

@pytest.mark.bad_input
@pytest.mark.parametrize("i", range(3))
def test_refusal(i):
    count("steps", i)

@pytest.mark.bad_input
@pytest.mark.skip
def test_skipped():
    pass

def test_good():
    count("steps", 10)
    count("windows")

@pytest.mark.xfail
def test_fails():
    count("steps", 1000)
    assert False
"""
INI = f"[pytest]\nmarkers = bad_input\ntestpaths = tests\npythonpath = {Path(__file__).parent}\n"


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini(INI)
    pytester.makeconftest('pytest_plugins = ["counts"]')
    (pytester.mkdir("tests") / "test_suite.py").write_text(SUITE)
    return pytester


@pytest.mark.parametrize("processes", ["0", "2"])
@pytest.mark.parametrize(("least", "status"), [(3, 0), (4, 1)])
def test_a_whole_run_with_too_few_bad_inputs_fails(
    suite: pytest.Pytester, processes: str, least: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "LEAST_BAD_INPUTS", least)
    run = suite.runpytest_inprocess("-n", processes)
    run.stdout.fnmatch_lines(["bad inputs: 3 distinct, *", "steps: 13", "windows: 1"])
    (run.stdout.fnmatch_lines if status else run.stdout.no_fnmatch_line)(
        ["the whole suite must try 4 bad inputs at least"] if status else "the whole suite *"
    )
    assert run.ret == status


@pytest.mark.parametrize(
    "arguments",
    [["-k", "refusal"], ["-m", "bad_input"], ["tests/test_suite.py"], ["--deselect", "tests/test_suite.py::test_refusal[0]"]],
)
def test_of_a_part_no_number_is_asked(suite: pytest.Pytester, arguments: list[str]) -> None:
    run = suite.runpytest_inprocess(*arguments)
    run.stdout.no_fnmatch_line("the whole suite *")
    assert run.ret == 0


def test_of_the_folder_by_its_name_it_is(suite: pytest.Pytester) -> None:
    assert suite.runpytest_inprocess("tests").ret == 1
