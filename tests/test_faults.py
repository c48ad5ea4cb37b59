"""What breaks on somebody's machine: memory runs out, Triton builds nothing for the GPU, a folder cannot be written.

Little of it is at hand, so it is pretended where it would come from, with the errors that Triton and torch raise for it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_cases import needs_gluon
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from whisper_models import mel, tiny_whisper

from whisper_triton import accelerate, accelerated, decoder, doctor, encoder, graphs, kernels, model_state, runtime
from whisper_triton.attention import STATE
from whisper_triton.graphs import NotCaptured
from whisper_triton.kernels import _dispatch, _paced

pytest_plugins = ["whisper_fixtures"]
ROOT = Path(__file__).parents[1]
append = sys.modules["whisper_triton.kernels.append_attention"]
cross = sys.modules["whisper_triton.kernels.cross_attention"]
skinny = sys.modules["whisper_triton.kernels.skinny_linear"]
GPU = torch.device("cuda", 0)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 79.19 GiB")


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """The GPUs on which Triton has failed, none so far, outside the interpreter."""
    found: dict[int, str] = {}
    monkeypatch.setattr(_dispatch, "_FAILURES", found)
    monkeypatch.setattr(_dispatch, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return found


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the log says of kernels that do not run."""
    caplog.set_level(logging.WARNING, logger=_dispatch.logger.name)
    return lambda: [record.getMessage() for record in caplog.records if record.name == _dispatch.logger.name]


def raised_in_triton(error: Exception) -> Exception:
    """`error` as it arrives from a launch: raised by code of a module of Triton's."""
    module: dict[str, Any] = {"__name__": "triton.runtime.jit", "error": error}
    try:
        exec("raise error", module)
    except Exception as arrived:
        return arrived
    raise AssertionError


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as arrived:
        return arrived


class TestTritonFails:
    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (RuntimeError("0 active drivers ([]). There should only be one."), "0 active drivers"),
            (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), "C compiler"),
            (RuntimeError("PassManager::run failed"), "PassManager"),
            (RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device"), "kernel image"),
            (_dispatch.TritonError("out of resource: shared memory, Required: 300000"), "shared memory"),
            (subprocess.CalledProcessError(1, ["gcc", "main.c"]), "gcc"),
            (PermissionError(13, "Permission denied", "/root/.triton"), "TRITON_CACHE_DIR"),
            (OSError(28, "No space left on device"), "TRITON_CACHE_DIR"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
    )
    def test_references_run_and_the_log_says_so_once(
        self, error: Exception, expected: str, failures: dict[int, str], warnings: Callable[[], list[str]]
    ) -> None:
        for op in ("decode_attention", "bias_gelu"):
            _dispatch.fall_back(op, GPU, raised_in_triton(error))
        (said,) = warnings()
        assert said.startswith("Triton's kernels do not run on cuda:0, slow PyTorch references do: decode_attention: ")
        assert expected in said
        assert _dispatch.why_reference(GPU) in said
        assert kernels.backend("cuda:0") == "reference"
        assert kernels.backend("cuda:1") == "triton"
        assert _dispatch.why_reference(torch.device("cpu")) is None

    @pytest.mark.parametrize(
        "error",
        [
            raised_in_triton(OUT_OF_MEMORY),
            raised_in_triton(RuntimeError("Triton Error [CUDA]: out of memory")),
            raised_in_triton(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")),
            raised_in_triton(torch.AcceleratorError("CUDA error: device-side assert triggered")),
            raised_in_triton(TypeError("dynamic_func() missing 1 required positional argument: 'x_ptr'")),
            raised(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")),
            raised(PermissionError(13, "Permission denied", "/root/.triton")),
            raised(ValueError("head dim must be one of ...")),
        ],
        ids=lambda error: str(error)[:40],
    )
    def test_any_other_error_is_raised(
        self, error: Exception, failures: dict[int, str], warnings: Callable[[], list[str]]
    ) -> None:
        with pytest.raises(type(error)) as found:
            _dispatch.fall_back("bias_gelu", GPU, error)
        assert found.value is error
        assert not failures
        assert not warnings()

    @pytest.mark.parametrize("where", ["in the interpreter", "in a capture"])
    def test_so_it_is_where_no_reference_may_run(
        self, where: str, failures: dict[int, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if where == "in the interpreter":
            monkeypatch.setattr(_dispatch, "INTERPRET", True)
        else:
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(_dispatch.TritonError):
            _dispatch.fall_back("bias_gelu", GPU, raised_in_triton(_dispatch.TritonError("no")))
        assert not failures

    @pytest.fixture
    def on_gpu(self, failures: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Tensors on the CPU are taken for ones on a GPU."""
        monkeypatch.setattr(_dispatch, "_index", lambda device: 0)
        monkeypatch.setattr(_dispatch, "backend", lambda device: "reference" if failures else "triton")

    @pytest.mark.usefixtures("on_gpu")
    def test_an_op_gives_its_references_result_and_does_not_try_again(self, failures: dict[int, str]) -> None:
        tried: list[str] = []

        def kernel(x: torch.Tensor) -> torch.Tensor:
            tried.append("kernel")
            raise raised_in_triton(RuntimeError("PassManager::run failed"))

        with torch.library._scoped_library("whisper_triton", "FRAGMENT") as library, pytest.MonkeyPatch.context() as patch:
            patch.setattr(_dispatch, "LIBRARY", library)
            op = _dispatch.register(
                "fails(Tensor x) -> Tensor", kernel=kernel, reference=lambda x: x + 1, fake=torch.empty_like
            )
            for _ in range(3):
                assert op(torch.tensor([1.0])).item() == 2.0
        assert tried == ["kernel"]
        assert list(failures) == [0]

    def test_tritons_own_errors(self, tmp_path: Path) -> None:
        """Of a GPU too old for its assembler, and of a folder that cannot be made; the kernels build and run nowhere else."""
        pytest.importorskip("triton")
        (tmp_path / "file").touch()
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "TRITON_INTERPRET": "0"}
        done = subprocess.run([sys.executable, "-c", TRITONS_ERRORS, tmp_path], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        fine, too_old, no_folder = json.loads(done.stdout.splitlines()[-1])  # Triton writes there too
        assert fine == [None, False]  # launched, which this driver does not do
        assert "sm_30" in too_old[0]
        assert "Not a directory" in no_folder[0]
        assert "TRITON_CACHE_DIR" in no_folder[0]
        assert too_old[1] is no_folder[1] is True

    @pytest.mark.skipif(sys.platform != "linux", reason="limits of a process")
    def test_a_folder_that_takes_no_kernel(self, tmp_path: Path) -> None:
        """The system refuses what Triton writes there, as on a full disk; with room again kernels are built."""
        pytest.importorskip("triton")
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))), "TRITON_INTERPRET": "0"}
        done = subprocess.run([sys.executable, "-c", NO_ROOM, tmp_path], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (said,), results, again = json.loads(done.stdout.splitlines()[-1])
        assert said.startswith("Triton's kernels do not run on cuda:0, slow PyTorch references do: update_kv_cache: OSError")
        assert "TRITON_CACHE_DIR" in said
        assert results == [True, True]
        assert again == [[], False]

    def test_no_graph_is_captured_of_references(self, failures: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
        model = accelerate(tiny_whisper())
        before = decoder.fingerprint(model), encoder.fingerprint(model.model.encoder)
        on_gpu = SimpleNamespace(device=GPU, model=model.model, proj_out=model.proj_out, config=model.config)
        monkeypatch.setattr(WhisperEncoder, "device", GPU)
        assert "lies on" in decoder.why_not_captured(on_gpu)  # all that stands against it
        failures[0] = "PassManager::run failed"
        assert decoder.why_not_captured(on_gpu) == "kernels are PyTorch references here"
        assert encoder.why_not_captured(model.model.encoder) == "kernels are PyTorch references here"
        assert decoder.fingerprint(model) != before[0]
        assert encoder.fingerprint(model.model.encoder) != before[1]

    def test_doctor_tries_a_kernel_and_explains(self, failures: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*tensors: torch.Tensor) -> None:
            _dispatch.fall_back("bias_gelu", GPU, raised_in_triton(PermissionError(13, "Permission denied", "/.triton")))

        for owner, name, stub in (
            (doctor, "choose_device", lambda name: GPU),
            (doctor, "_gpu", lambda device: "an old GPU"),
            (runtime, "device_name", lambda device: "an old GPU"),
            (doctor.kernels, "bias_gelu", fail),
            (torch, "zeros", lambda *size, **kwargs: None),
            (torch.cuda, "synchronize", lambda device: None),
        ):
            monkeypatch.setattr(owner, name, stub)
        lines = doctor.report().splitlines()
        (why,) = [line for line in lines if line.startswith("Triton fails")]
        assert "Permission denied" in why
        assert "TRITON_CACHE_DIR" in why
        for kernel in doctor.KERNELS:
            (line,) = [line for line in lines if line.startswith(f"{kernel} ")]
            assert "PyTorch reference on an old GPU" in line
            assert line.endswith("Triton fails on this GPU, as said above")
        assert sum("module by module" in line for line in lines) == 3
        assert "replayed" not in "".join(lines)


# Tensors on the CPU are taken for ones on a GPU, on which kernels are built and a launch does nothing: what is written, a
# reference has written.
PRETENDED = """
import json, logging, sys
import torch
import cross_compile
from cross_compile import CompileOnly, GPUTarget, driver, knobs
from whisper_triton import kernels
from whisper_triton.kernels import _dispatch, _paced

torch.cuda.is_current_stream_capturing = lambda: False
_dispatch._index = lambda device: 0
_dispatch.backend = lambda device: "reference" if _dispatch._FAILURES else "triton"

def is_written():
    states, caches = torch.ones(1, 1, 1, 32), torch.zeros(2, 1, 1, 4, 32)
    kernels.update_kv_cache(states, states, *caches, torch.tensor(2))
    return caches.sum((0, 1, 2, 4)).tolist() == [0, 0, 64, 0]
"""
NO_ROOM = f"""{PRETENDED}
import resource

said = []
handler = logging.Handler()
handler.emit = lambda record: said.append(record.getMessage())
_dispatch.logger.addHandler(handler)
knobs.cache.dir = sys.argv[1]
driver.set_active(CompileOnly("sm_90"))
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, hard))  # less than any kernel's code
found = [is_written(), is_written()]
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
warned = said.copy()
said.clear()
_dispatch._FAILURES.clear()
again = is_written()
print(json.dumps([warned, found, [said, again]]))
"""
TRITONS_ERRORS = f"""{PRETENDED}
cross_compile.TARGETS["sm_30"] = GPUTarget("cuda", 30, 32)
cross_compile.TARGETS["again"] = cross_compile.TARGETS["sm_90"]
found = []
for target, folder in (("sm_90", "cache"), ("sm_30", "cache"), ("again", "file/cache")):
    driver.set_active(CompileOnly(target))
    knobs.cache.dir = sys.argv[1] + "/" + folder
    written = is_written()
    found.append((_dispatch._FAILURES.get(0), written))
    _dispatch._FAILURES.clear()
print(json.dumps(found))
"""


class TestOutOfMemory:
    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (OUT_OF_MEMORY, True),
            (RuntimeError("Triton Error [CUDA]: out of memory"), True),
            (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
            (RuntimeError("CUDA error: operation not permitted when stream is capturing"), False),
            (ValueError("the cache has 64 slots"), False),
        ],
        ids=str,
    )
    def test_it_is_known_by_what_came_first(self, error: Exception, expected: bool) -> None:
        assert graphs.is_out_of_memory(error) is expected
        broken_off = RuntimeError("CUDA error: operation failed due to a previous error during capture")
        broken_off.__context__ = error  # as torch ends a recording
        assert graphs.is_out_of_memory(broken_off) is expected

    @pytest.fixture(autouse=True)
    def _references(self, reference_kernels: None) -> None:
        pass

    @pytest.fixture
    def no_graphs(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
        """No memory for a graph, found out when it is recorded. Holds the attempts; empty it to count anew."""
        attempts: list[int] = []

        def capture(run: Callable[[], Any], device: torch.device) -> None:
            run()
            attempts.append(1)
            raise NotCaptured("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(model_state, "why_not_captured", lambda model: None)
            patch.setattr(decoder, "capture", capture)
            if device.type == "cpu":  # the chain of references is slow
                patch.setattr(decoder, "is_fusable", lambda model, batch_size: False)
            yield attempts

    @pytest.mark.parametrize("kwargs", [{}, {"return_timestamps": True}, {"num_beams": 2}], ids=str)
    def test_without_memory_for_graphs_tokens_are_stocks(
        self, kwargs: dict[str, Any], no_graphs: list[int], fallbacks: Callable[[], list[str]], device: torch.device
    ) -> None:
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        stock = model.generate(features, max_new_tokens=12, **kwargs)
        with accelerated(model):
            for _ in range(2):
                no_graphs.clear()
                assert torch.equal(model.generate(features, max_new_tokens=12, **kwargs), stock)
                assert 1 <= len(no_graphs) <= 4  # once a window, not a token
        assert fallbacks() == ["steps are launched one kernel at a time: out of memory"]

    def test_to_the_last_slot_and_not_beyond(self, no_graphs: list[int], device: torch.device) -> None:
        model = tiny_whisper(device, seed=3)
        features, slots = mel(1, device), model.config.max_target_positions
        kwargs = {"min_new_tokens": slots - 2, "max_new_tokens": slots - 2}  # after a prompt of two
        stock = model.generate(features, **kwargs)
        with accelerated(model):
            assert torch.equal(model.generate(features, **kwargs), stock)
            step = getattr(model, STATE).steps[1]
            step(model, stock[:, -1:])  # the last token of all, which generate does not decode
            assert int(step.cache.get_seq_length()) == slots
            with pytest.raises(ValueError, match="slots"):
                step(model, stock[:, -1:])

    @pytest.mark.usefixtures("eager_steps")
    def test_without_memory_for_caches_that_are_kept_tokens_are_stocks(
        self, monkeypatch: pytest.MonkeyPatch, fallbacks: Callable[[], list[str]], device: torch.device
    ) -> None:
        model, features = tiny_whisper(device, seed=3), mel(3, device)
        stock = [model.generate(features[:B], max_new_tokens=12) for B in (1, 2, 3)]

        def fail(*args: Any) -> None:
            raise OUT_OF_MEMORY

        with accelerated(model):
            steps = getattr(model, STATE).steps
            for B in (1, 2):
                model.generate(features[:B], max_new_tokens=12)
            assert list(steps) == [1, 2]
            with monkeypatch.context() as patch:
                patch.setattr(model_state, "DecoderStep", fail)
                assert torch.equal(model.generate(features, max_new_tokens=12), stock[2])
            assert not steps  # their memory was given up
            assert [line for line in fallbacks() if "memory" in line] == [
                "steps are launched one kernel at a time: out of memory for caches that could be kept"
            ]
            for B in (3, 1):
                assert torch.equal(model.generate(features[:B], max_new_tokens=12), stock[B - 1])
            assert list(steps) == [3, 1]

    @pytest.mark.usefixtures("eager_steps")
    def test_without_memory_for_any_cache_it_is_raised_and_the_next_call_is_right(
        self, monkeypatch: pytest.MonkeyPatch, device: torch.device
    ) -> None:
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        stock = model.generate(features, max_new_tokens=12)

        def fail(*args: Any, **kwargs: Any) -> None:
            raise OUT_OF_MEMORY

        with accelerated(model):
            with monkeypatch.context() as patch:
                patch.setattr(model_state, "build_static_cache", fail)
                patch.setattr(decoder, "build_static_cache", fail)
                with pytest.raises(torch.OutOfMemoryError):
                    model.generate(features, max_new_tokens=12)
            assert not getattr(model, STATE).steps
            assert torch.equal(model.generate(features, max_new_tokens=12), stock)

    @pytest.mark.parametrize("error", [NotCaptured("out of memory"), OUT_OF_MEMORY], ids=["graph", "weights"])
    def test_an_encoder_that_cannot_be_captured_is_launched(
        self, error: Exception, monkeypatch: pytest.MonkeyPatch, fallbacks: Callable[[], list[str]]
    ) -> None:
        model = accelerate(tiny_whisper())

        def fail(*args: Any) -> None:
            raise error

        monkeypatch.setattr(encoder, "why_not_captured", lambda encoder: None)
        monkeypatch.setattr(encoder, "CapturedEncoder", fail)
        for _ in range(2):
            assert encoder._captured(model.model.encoder, mel(1)) is None
        assert not getattr(model.model.encoder, STATE).graphs
        assert [line.lower() for line in fallbacks()] in (
            ["the encoder is launched one kernel at a time: out of memory"],
            ["the encoder is launched one kernel at a time: cuda out of memory"],
        )


@pytest.mark.gpu
class TestOutOfMemoryOnAGpu:
    def test_a_recording_that_breaks_off_leaves_the_stream_and_the_next_one_alone(self, device: torch.device) -> None:
        x, current = torch.zeros(8, device=device), torch.cuda.current_stream()

        def grow(elements: int) -> torch.Tensor:
            x.add_(1)
            return torch.empty(elements if torch.cuda.is_current_stream_capturing() else 1, device=device)

        with pytest.raises(NotCaptured, match="out of memory"):
            graphs.capture(lambda: grow(1 << 42), device)
        assert torch.cuda.current_stream() == current
        assert not torch.cuda.is_current_stream_capturing()
        graph, _, _ = graphs.capture(lambda: grow(1), device)
        x.zero_()
        graph.replay()
        assert x.tolist() == [1.0] * 8

    def test_generate_goes_on_and_captures_when_there_is_memory_again(
        self, device: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        stock = model.generate(features, max_new_tokens=20)
        run = decoder.DecoderStep._run

        def out_of_memory(self: decoder.DecoderStep, *args: Any) -> torch.Tensor:
            if torch.cuda.is_current_stream_capturing():
                torch.empty(1 << 42, device=device)
            return run(self, *args)

        with accelerated(model):
            with monkeypatch.context() as patch:
                patch.setattr(decoder.DecoderStep, "_run", out_of_memory)
                for _ in range(2):
                    assert torch.equal(model.generate(features, max_new_tokens=20), stock)
            assert torch.equal(model.generate(features, max_new_tokens=20), stock)
            step = getattr(model, STATE).steps[2]
            assert [kept.graph is not None for kept in step._selecting.values()] == [True]


class TestPacedKernels:
    """Those of kernels/_paced.py, which are Gluon's: where they do not build, the plain ones serve; the log says so once."""

    @pytest.fixture
    def arguments(self, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
        monkeypatch.setattr(_paced, "_given_up", {})
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        x, weight, bias = torch.randn(1, 64), torch.randn(16, 64), torch.randn(16)
        return x, [weight], [bias], None, None, 0.0, 1.0, False, None

    def fails(self, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        def paced(*args: Any) -> None:
            raise error

        for module, name in (
            (skinny, "paced_linear"), (skinny, "paced_rows"), (append, "paced_append"), (cross, "clustered_cross"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, paced)

    def test_the_plain_ones_serve(
        self, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        if not _dispatch.INTERPRET:
            pytest.skip("the plain kernel runs in the interpreter")
        self.fails(raised_in_triton(RuntimeError("PassManager::run failed")), monkeypatch)
        plain = skinny._launch(*arguments, [4, 1, 4, 0, 0, 0])
        for _ in range(2):
            assert torch.equal(skinny._launch(*arguments, [4, 1, 4, 0, 2, 0]), plain)
        assert [record.message for record in caplog.records if "paced" in record.message] == [
            "paced kernels do not run here, the plain ones serve: RuntimeError: PassManager::run failed"
        ]
        x, weights, biases, *around = arguments
        rows, weights, biases = x.half().repeat(3, 1), [w.half() for w in weights], [b.half() for b in biases]
        plain = skinny._launch(rows, weights, biases, *around, [32, 1, 8, 1, 0, 0])
        assert torch.equal(skinny._launch(rows, weights, biases, *around, [16, 4, 4, 1, 2, 0]), plain)

    @pytest.mark.usefixtures("arguments")
    def test_what_the_driver_does_not_grant_gives_them_up_too(self, caplog: pytest.LogCaptureFixture) -> None:
        _paced.give_up(_paced.NotGranted("a kernel cannot have its memory"), torch.device("cuda", 0))
        assert _paced.why_given_up(torch.device("cuda", 0)) == "NotGranted: a kernel cannot have its memory"
        assert "the plain ones serve" in caplog.text
        with pytest.raises(RuntimeError, match="a mistake"):
            _paced.give_up(RuntimeError("a mistake"), torch.device("cuda", 0))

    @pytest.mark.usefixtures("arguments")
    def test_the_plain_attention_serves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if not _dispatch.INTERPRET:
            pytest.skip("the plain kernel runs in the interpreter")
        self.fails(raised_in_triton(RuntimeError("PassManager::run failed")), monkeypatch)
        *call, plain, out = (
            *torch.randn(3, 1, 1, 2, 64),
            *torch.randn(2, 1, 2, 9, 64),
            torch.tensor(5),
            *torch.empty(2, 1, 1, 2, 64),
        )
        append._launch(*call, plain, 1.0, False)
        append._launch(*call, out, 1.0, False, tiles=append.PacedTiles(64, 4, 2))
        assert torch.equal(out, plain)

    @pytest.mark.usefixtures("arguments")
    def test_cross_attention_in_two_launches_serves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if not _dispatch.INTERPRET:
            pytest.skip("the plain kernels run in the interpreter")
        x, weight, vector = torch.randn(1, 64), torch.randn(64, 64), torch.randn(64)
        call = x, weight, vector, *torch.randn(2, 1, 1, 9, 64), vector, vector, 1e-5, 1.0, None, None
        plain = cross._launch(*call)
        monkeypatch.setattr(cross, "covers_cross", lambda *arguments: True)
        self.fails(raised_in_triton(RuntimeError("PassManager::run failed")), monkeypatch)
        assert torch.equal(cross._launch(*call), plain)

    @needs_gluon
    def test_what_one_gpu_cannot_another_may(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_paced, "_given_up", {})
        monkeypatch.setattr(_paced, "capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        first, second = torch.device("cuda", 0), torch.device("cuda", 1)
        assert _paced.has_paced_copies(first, torch.float16)
        _paced.give_up(raised_in_triton(RuntimeError("PassManager::run failed")), first)
        assert not _paced.has_paced_copies(first, torch.float16)
        assert _paced.has_paced_copies(second, torch.float16)

    def test_so_it_is_not_in_a_capture(self, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails(raised_in_triton(RuntimeError("PassManager::run failed")), monkeypatch)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="PassManager"):
            skinny._launch(*arguments, [4, 1, 4, 0, 2, 0])
        assert not _paced._given_up

    def test_any_other_error_is_raised(self, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        self.fails(ValueError("ours"), monkeypatch)
        with pytest.raises(ValueError, match="ours"):
            skinny._launch(*arguments, [4, 1, 4, 0, 2, 0])
        assert not _paced._given_up
