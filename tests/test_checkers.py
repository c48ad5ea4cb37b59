"""The scripts that are run by hand, on a GPU or over somebody else's tests: what they make of the answers that they get."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import run_foreign_suite
import run_sanitizers
import torch
from transformers import WhisperForConditionalGeneration
from whisper_models import tiny_whisper

from whisper_triton import is_accelerated, restore

SCRIPTS = Path(__file__).parent

# What the checkers print, in short: the tool's name is their second argument.
FINE = """
echo "launched: _bias_gelu_kernel _anothers_kernel"
echo "3 passed, 40 deselected in 1.23s"
case $2 in
  racecheck) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)";;
  *) echo "========= ERROR SUMMARY: 0 errors";;
esac
"""
ELSEWHERE = """
echo "3 passed in 1.23s"
echo "========= Uninitialized __global__ memory read of size 4 bytes"
echo "=========     at void at::native::vectorized_elementwise_kernel<4, float>(float *)+0x120"
echo "========= ERROR SUMMARY: 1 error"
exit 99
"""
BROKEN = """
echo "========= Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception."
echo "========= ERROR SUMMARY: 1 error"
exit 1
"""
KERNELS = f"1 of {len(run_sanitizers.KERNELS)} kernels"
NO_KERNELS = f"0 of {len(run_sanitizers.KERNELS)} kernels"
WITHOUT = ", 1 of 1 files without a summary"
OURS = ELSEWHERE.replace("void at::native::vectorized_elementwise_kernel<4, float>(float *)", "_decode_attention_kernel")


class TestSanitizers:
    @pytest.fixture
    def run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        """Runs the script with a compute-sanitizer that is a shell script; returns its exit status and the lines it prints."""

        def run(script: str | None, *arguments: str) -> tuple[int, list[str]]:
            if script is not None:
                (tmp_path / "compute-sanitizer").write_text(f"#!/bin/sh\n{script}")
                (tmp_path / "compute-sanitizer").chmod(0o755)
            monkeypatch.setattr(
                run_sanitizers, "find_sanitizer", lambda: run_sanitizers.shutil.which("compute-sanitizer", path=tmp_path)
            )
            files = arguments[arguments.index("--tests") + 1 :] if "--tests" in arguments else ["test_one.py"]
            rest = arguments[: arguments.index("--tests")] if "--tests" in arguments else arguments
            monkeypatch.setattr(sys, "argv", ["run_sanitizers.py", *rest, "--tests", *files])
            status, printed = run_sanitizers.main(), capsys.readouterr()
            self.complaints = printed.err
            return status, [line.rpartition(",")[0] for line in printed.out.splitlines()]

        return run

    def test_a_line_for_each_checker(self, run) -> None:
        assert run(FINE) == (
            0,
            [f"{tool:<10} 3 tests, {KERNELS}, 0 failed, 0 skipped, 0 errors" for tool in run_sanitizers.TOOLS],
        )

    @pytest.mark.parametrize(
        ("script", "line", "why"),
        [
            (ELSEWHERE, f"3 tests, {NO_KERNELS}, 0 failed, 0 skipped, 0 errors (1 in other kernels)", None),
            (OURS, f"3 tests, {NO_KERNELS}, 0 failed, 0 skipped, 1 errors", "0 failed, 1 errors, exit status 99"),
            (
                FINE.replace("3 passed", "1 failed, 2 passed"),
                f"3 tests, {KERNELS}, 1 failed, 0 skipped, 0 errors",
                "1 failed, 0 errors, exit status 0",
            ),
            (
                FINE.replace("3 passed", "2 passed, 1 error"),
                f"3 tests, {KERNELS}, 1 failed, 0 skipped, 0 errors",
                "1 failed, 0 errors, exit status 0",
            ),
            (FINE.replace("3 passed, 40", "43"), f"0 tests, {KERNELS}, 0 failed, 0 skipped, 0 errors", "no test ran"),
            (FINE.replace("3 passed", "3 passed, 2 skipped"), f"3 tests, {KERNELS}, 0 failed, 2 skipped, 0 errors", None),
            (FINE + "exit 7", f"3 tests, {KERNELS}, 0 failed, 0 skipped, 0 errors", "0 failed, 0 errors, exit status 7"),
            (
                "echo Device not supported; exit 1",
                f"0 tests, {NO_KERNELS}, 0 failed, 0 skipped, 0 errors{WITHOUT}",
                "no summary",
            ),
            ("exec sleep 60", f"0 tests, {NO_KERNELS}, 0 failed, 0 skipped, 0 errors{WITHOUT}", "stopped after 1 s"),
            (BROKEN, f"0 tests, {NO_KERNELS}, 0 failed, 0 skipped, 0 errors{WITHOUT}", "the checker broke down"),
        ],
    )
    def test_what_counts_as_clean(self, script: str, line: str, why: str | None, run) -> None:
        assert run(script, "initcheck", "--limit", "1") == (int(why is not None), [f"initcheck  {line}"])
        said = self.complaints.splitlines()[:1]
        assert said == ([] if why is None else [f"initcheck, test_one.py: {why}"])

    def test_a_file_that_ends_early_takes_no_other_with_it(self, run, tmp_path: Path) -> None:
        script = 'case "$*" in *test_bad*) exit 1;; esac' + FINE
        arguments = ("racecheck", "--jobs", "2", "--logs", str(tmp_path / "logs"))
        line = f"racecheck  6 tests, {KERNELS}, 0 failed, 0 skipped, 0 errors, 1 of 3 files without a summary"
        assert run(script, *arguments, "--tests", "test_good.py", "test_bad.py", "test_fine.py") == (1, [line])
        logs = {path.name for path in (tmp_path / "logs").iterdir()}
        assert logs == {f"racecheck-test_{name}.py.log" for name in ("good", "bad", "fine")}

    def test_what_is_stopped_leaves_its_output_and_no_process(self, run, tmp_path: Path) -> None:
        script = f"echo begun; (sleep 3; touch {tmp_path / 'late'}) & wait"
        assert run(script, "initcheck", "--limit", "1", "--logs", str(tmp_path / "logs"))[0] == 1
        assert (tmp_path / "logs" / "initcheck-test_one.py.log").read_text() == "begun\n"
        time.sleep(3)
        assert not (tmp_path / "late").exists()

    def test_hazards_and_errors_of_the_other_two_are_ours(self, run) -> None:
        found = ELSEWHERE.replace("ERROR SUMMARY: 1 error", "RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)")
        assert run(found, "racecheck") == (1, [f"racecheck  3 tests, {NO_KERNELS}, 0 failed, 0 skipped, 2 errors"])
        assert run(ELSEWHERE, "memcheck") == (1, [f"memcheck   3 tests, {NO_KERNELS}, 0 failed, 0 skipped, 1 errors"])

    def test_of_all_tests_every_kernel_must_be_launched(self, run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(run_sanitizers, "TESTS", ["test_one.py"])
        monkeypatch.setattr(run_sanitizers, "KERNELS", ["_bias_gelu_kernel", "_other_kernel"])
        line = "memcheck   3 tests, 1 of 2 kernels (without _other_kernel), 0 failed, 0 skipped, 0 errors"
        assert run(FINE, "memcheck") == (1, [line])
        monkeypatch.setattr(run_sanitizers, "KERNELS", ["_bias_gelu_kernel"])
        assert run(FINE, "memcheck") == (0, ["memcheck   3 tests, 1 of 1 kernels, 0 failed, 0 skipped, 0 errors"])

    def test_without_compute_sanitizer_it_fails(self, run) -> None:
        assert run(None) == (1, [])

    def test_every_kernel_is_checked_by_name(self) -> None:
        assert len(run_sanitizers.KERNELS) >= len(run_sanitizers.TESTS)
        assert all(Path(file).is_file() for file in run_sanitizers.TESTS)
        command = run_sanitizers.command("compute-sanitizer", "racecheck", ["tests/test_bias_gelu.py"])
        assert command.count("--kernel-name") == len(run_sanitizers.KERNELS)
        assert "kns=_bias_gelu_kernel" in command

    def test_without_a_gpu_no_test_runs(self, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
        """In the interpreter every checker would find everything in order."""
        monkeypatch.setenv(run_sanitizers.SELECT, "1")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(pytest.exit.Exception, match="no GPU to check kernels on"):
            run_sanitizers.pytest_collection_modifyitems(request.config, [])

    @pytest.mark.parametrize(("tool", "kept"), [("memcheck", (2,)), ("racecheck", (1, 2, 3))])
    def test_of_each_test_few_cases_are_kept(self, tool: str, kept: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(run_sanitizers.SELECT, tool)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        ids = [
            "a.py::test_x[1]",
            "a.py::test_x[2]",
            "a.py::test_x[3]",
            "a.py::test_y",
            "b.py::test_x[1]",
            "b.py::test_a_graph[1]",
            "b.py::test_large_models",
        ]
        items = [SimpleNamespace(nodeid=one, path=Path(one.partition("::")[0])) for one in ids]
        deselected: list[str] = []
        hook = SimpleNamespace(pytest_deselected=lambda items: deselected.extend(item.nodeid for item in items))
        run_sanitizers.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
        left_out = {f"a.py::test_x[{i}]" for i in (1, 2, 3) if i not in kept} | {"b.py::test_a_graph[1]"}
        left_out |= {"b.py::test_large_models"} if tool == "racecheck" else set()
        assert [item.nodeid for item in items] == [one for one in ids if one not in left_out]
        assert set(deselected) == left_out

    def test_what_is_launched_is_noted_and_racecheck_kept_from_much_shared_memory(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compiler = pytest.importorskip("triton.compiler")
        loaded: list[str] = []
        monkeypatch.setattr(compiler.CompiledKernel, "_init_handles", lambda kernel: loaded.append(kernel.metadata.name))
        for name in ("_launched", "_too_large"):
            monkeypatch.setattr(run_sanitizers, name, set())
        monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
        monkeypatch.setenv(run_sanitizers.SELECT, "racecheck")
        run_sanitizers.pytest_configure(None)
        first_launch = compiler.CompiledKernel._init_handles
        first_launch(SimpleNamespace(metadata=SimpleNamespace(name="_small_kernel", shared=48 << 10)))
        with pytest.raises(pytest.skip.Exception, match="_large_kernel has 65536 bytes"):
            first_launch(SimpleNamespace(metadata=SimpleNamespace(name="_large_kernel", shared=64 << 10)))
        assert run_sanitizers._launched == {"_small_kernel"} == set(loaded)
        assert run_sanitizers._too_large == {"_large_kernel"}
        monkeypatch.setenv(run_sanitizers.SELECT, "memcheck")
        first_launch(SimpleNamespace(metadata=SimpleNamespace(name="_large_kernel", shared=64 << 10)))
        assert run_sanitizers._launched == {"_small_kernel", "_large_kernel"} == set(loaded)

    def test_racecheck_says_which_kernels_are_too_large(self, run) -> None:
        found = FINE.replace(
            'echo "3 passed,', 'echo "too large: _bias_gelu_kernel _anothers_kernel"\necho "3 passed, 2 skipped,'
        )
        why = " (shared memory of _bias_gelu_kernel)"
        assert run(found, "racecheck") == (0, [f"racecheck  3 tests, {KERNELS}, 0 failed, 2 skipped{why}, 0 errors"])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_racecheck_sees_no_half_precision_products(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nor does the GPU: a tensor that says it lies on one stands for its."""

        class OnGpu(torch.Tensor):
            moved: ClassVar[list[torch.Tensor]] = []
            is_cuda = True

            def cpu(self) -> torch.Tensor:
                OnGpu.moved.append(self)
                return self.as_subclass(torch.Tensor)

        linear = torch.nn.functional.linear
        monkeypatch.setattr(torch.nn.functional, "linear", linear)
        tensors = [torch.randn(shape).to(dtype) for shape in ((2, 8), (3, 8), (3,))]
        run_sanitizers.multiply_halves_on_the_cpu()
        for count in (2, 3):  # without a bias too
            OnGpu.moved.clear()
            out = torch.nn.functional.linear(*(tensor.as_subclass(OnGpu) for tensor in tensors[:count]))
            assert torch.equal(out.as_subclass(torch.Tensor), linear(*tensors[:count]))
            assert len(OnGpu.moved) == (count if dtype == torch.float16 else 0)
        assert torch.equal(torch.nn.functional.linear(*tensors), linear(*tensors))
        assert len(OnGpu.moved) == (3 if dtype == torch.float16 else 0)


SUITE = """
import subprocess
import sys
import unittest

import pytest

def test_passes():
    pass

def test_fails():
    assert 1 == 2

def test_sees_the_package():
    assert "whisper_triton" not in sys.modules

@pytest.mark.skipif("whisper_triton" in sys.modules, reason="there")
def test_is_skipped():
    pass

@pytest.fixture
def broken():
    assert "whisper_triton" not in sys.modules

def test_breaks_before_it_begins(broken):
    pass

def test_fails_for_another_reason():
    assert "whisper_triton" in sys.modules
    assert 1 == 2

class TestParts(unittest.TestCase):
    def test_of_a_test(self):
        for part in range(3):
            with self.subTest(part=part):
                self.assertTrue(part == 0 or part == 1 and "whisper_triton" not in sys.modules)

@pytest.fixture
def broken_afterwards():
    yield
    assert 1 == 2

def test_breaks_twice(broken_afterwards):
    assert "whisper_triton" not in sys.modules

def test_starts_another_pytest(tmp_path):
    test = tmp_path / "test_inner.py"
    test.write_text("import sys\\ndef test_inner():\\n    assert 'whisper_triton' not in sys.modules")
    subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(test)], check=True)

def test_makes_a_model():
    from transformers import WhisperConfig, WhisperForConditionalGeneration
    WhisperForConditionalGeneration(WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1, decoder_attention_heads=1,
    ))
"""


def run_suite(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / "run_foreign_suite.py", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


class TestForeignSuite:
    def test_it_lists_what_came_out_otherwise(self, tmp_path: Path) -> None:
        (tmp_path / "test_foreign.py").write_text(SUITE)
        (tmp_path / "test_not_there.py").write_text("import nowhere")
        (tmp_path / "test_there_once.py").write_text("import sys; assert 'whisper_triton' not in sys.modules")
        done = run_suite(tmp_path, ".", "-k", "test_")
        assert done.returncode == 1, done.stderr
        note, *lines, last = done.stdout.splitlines()
        assert note.startswith("test_foreign.py::test_fails_for_another_reason: failed in both runs: AssertionError")
        assert note.endswith(", accelerated: assert 1 == 2")
        expected = {
            "foreign.py::TestParts::test_of_a_test (subtest part=1)": "passed, accelerated failed: AssertionError",
            "foreign.py::test_breaks_before_it_begins (setup)": "passed, accelerated error: Assert",
            "foreign.py::test_breaks_twice": "passed, accelerated failed: Assert",
            "foreign.py::test_is_skipped (setup)": "passed, accelerated skipped",
            "foreign.py::test_sees_the_package": "passed, accelerated failed: Assert",
            "foreign.py::test_starts_another_pytest": "passed, accelerated failed: subprocess.CalledProcessError",
            "there_once.py (collection)": "not run, accelerated error: Assert",
        }
        assert len(lines) == len(expected), lines
        for line, (test, outcome) in zip(lines, expected.items(), strict=True):
            assert line.startswith(f"test_{test}: {outcome}"), line
        assert last == "10 tests, 1 of them made an accelerated model, 2 files could not be collected; differences: 7"

    def test_in_several_processes(self, tmp_path: Path) -> None:
        (tmp_path / "test_foreign.py").write_text(SUITE)
        done = run_suite(tmp_path, "test_foreign.py", "-k", "test_of_a_test or test_passes", "-n", "1")
        assert done.returncode == 1, done.stderr
        line, last = done.stdout.splitlines()
        assert line.startswith("test_foreign.py::TestParts::test_of_a_test (subtest part=1): passed, accelerated failed")
        assert last == "2 tests, 0 of them made an accelerated model; differences: 1"

    def test_without_a_path_or_tests_it_says_so(self, tmp_path: Path) -> None:
        for arguments in ((), (str(tmp_path / "nowhere"),)):
            assert run_suite(tmp_path, *arguments).returncode == 2

    def test_a_run_that_crashes_is_told_with_what_it_left(self, tmp_path: Path) -> None:
        tests = "def test_crash(): 'whisper_triton' in sys.modules and os._exit(3)\ndef test_that_follows(): pass\n"
        (tmp_path / "test_foreign.py").write_text(f"import os, sys\n{tests}")
        done = run_suite(tmp_path, "test_foreign.py")
        assert done.returncode == 2
        assert "the accelerated run did not come to its end; begun last was test_foreign.py::test_crash" in done.stderr
        assert done.stdout.splitlines() == [
            "test_foreign.py::test_crash: passed, accelerated not run",
            "test_foreign.py::test_that_follows: passed, accelerated not run",
            "2 tests, 0 of them made an accelerated model; differences: 2",
        ]

    def test_every_model_is_accelerated_when_it_is_made(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        tiny_whisper().save_pretrained(tmp_path)
        monkeypatch.setattr(WhisperForConditionalGeneration, "__init__", WhisperForConditionalGeneration.__init__)
        run_foreign_suite.accelerate_every_model()
        loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path)
        assert is_accelerated(loaded)
        assert is_accelerated(tiny_whisper())
        assert not is_accelerated(restore(loaded))
