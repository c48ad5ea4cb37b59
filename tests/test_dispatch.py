"""Where an op runs: the choice between kernel, interpreter and reference, dependent launch, and how an op is registered."""

import ctypes
import inspect
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attention_cases import dtype_name

from whisper_triton import kernels
from whisper_triton.kernels import _dispatch, _paced

ROOT = Path(__file__).parents[1]
HOPPER = torch.device("cuda", 0)


def pretend(monkeypatch: pytest.MonkeyPatch, *, triton: bool = True, interpret: bool = False) -> None:
    """Let the dispatch find Triton or not, and its interpreter on or off."""
    monkeypatch.setattr(_dispatch, "HAS_TRITON", triton)
    monkeypatch.setattr(_dispatch, "INTERPRET", interpret)


@pytest.mark.parametrize(
    ("device", "triton", "interpret", "expected"),
    [
        ("cuda", True, False, "triton"),
        ("cuda:1", True, False, "triton"),
        ("cuda", True, True, "interpreter"),
        ("cuda", False, False, "reference"),
        ("cpu", True, False, "reference"),
        ("cpu", True, True, "interpreter"),
        ("cpu", False, False, "reference"),
        ("mps", True, True, "reference"),
        ("xpu", True, False, "reference"),
        ("meta", True, True, "reference"),
    ],
)
def test_the_backend_follows_from_device_triton_and_interpreter(
    monkeypatch: pytest.MonkeyPatch, device: str, triton: bool, interpret: bool, expected: str
) -> None:
    pretend(monkeypatch, triton=triton, interpret=interpret)
    assert kernels.backend(device) == expected
    assert kernels.backend(torch.device(device)) == expected


def test_the_suite_itself_runs_kernels(device: torch.device) -> None:
    # A suite that fell back to the references would compare each of them to itself.
    assert kernels.backend(device) in ("interpreter", "triton")


@pytest.mark.parametrize(("variable", "expected"), [("1", "interpreter"), ("0", "reference")])
def test_the_interpreter_is_on_where_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch, variable: str, expected: str
) -> None:
    """Of the module run anew; `test_cli.py` sees the same of the command, in processes of its own."""
    monkeypatch.setenv("TRITON_INTERPRET", variable)
    module = runpy.run_path(str(ROOT / "kernels" / "_dispatch.py"))
    assert module["backend"]("cpu") == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=dtype_name)
def test_without_a_gpu_every_op_runs_its_reference(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    pretend(monkeypatch)
    query, key, value = torch.randn(3, 2, 3, 4, 64, dtype=dtype)
    caches = torch.randn(3, 2, 2, 4, 16, 64, dtype=dtype)
    caches[1:] = caches[0]
    position = torch.tensor([2, 9])
    kernels.update_kv_cache(key, value, *caches[0], position)
    kernels.update_kv_cache_reference(key, value, *caches[1], position)
    assert torch.equal(caches[0], caches[1])
    attended = kernels.decode_attention(query, *caches[0], position, scale=0.2)
    assert torch.equal(attended, kernels.decode_attention_reference(query, *caches[0], position, scale=0.2))
    appended = kernels.append_attention(query, key, value, *caches[2], position, scale=0.2)
    expected = kernels.append_attention_reference(query, key, value, *caches[1], position, scale=0.2)
    assert torch.equal(appended, expected)
    assert torch.equal(caches[2], caches[1])


# --- programmatic dependent launch


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """GPUs by index, as their compute capabilities; the test fills the list in. None was seen before."""
    gpus: list[tuple[int, int]] = []
    pretend(monkeypatch)
    monkeypatch.setattr(_dispatch, "_CAPABILITIES", {})
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: len(gpus) - 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
    return gpus


@pytest.mark.parametrize(
    ("version", "expected"),
    [((7, 5), False), ((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), True)],
)
def test_dependent_launch_is_used_from_compute_capability_9_on(
    capability: list[tuple[int, int]], version: tuple[int, int], expected: bool
) -> None:
    capability.append(version)
    assert _dispatch.has_pdl(HOPPER) is expected
    assert _dispatch.pdl_options(HOPPER) == ({"USE_PDL": True, "launch_pdl": True} if expected else {"USE_PDL": False})


def test_each_gpu_is_asked_once_and_answers_for_itself(
    capability: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    capability += [(8, 0), (9, 0)]
    first, second, current = (torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda"))
    assert [_dispatch.has_pdl(device) for device in (first, second, current)] == [False, True, True]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: pytest.fail("asked again"))
    assert [_dispatch.has_pdl(device) for device in (first, second, current)] == [False, True, True]


@pytest.mark.parametrize("why", ["on a CPU", "on an AMD GPU", "in the interpreter"])
def test_dependent_launch_is_not_used(capability: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    capability.append((9, 0))
    if why == "on an AMD GPU":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    if why == "in the interpreter":
        monkeypatch.setattr(_dispatch, "INTERPRET", True)
    assert not _dispatch.has_pdl(torch.device("cpu") if why == "on a CPU" else HOPPER)


# --- registration


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ops registered in a test are gone after it."""
    with torch.library._scoped_library("whisper_triton", "FRAGMENT") as scoped:
        monkeypatch.setattr(_dispatch, "LIBRARY", scoped)
        yield


@pytest.mark.usefixtures("library")
def test_a_registered_op_chooses_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    op = _dispatch.register(
        "choose(Tensor x, int n) -> Tensor",
        kernel=lambda x, n: x + n,
        reference=lambda x, n: x - n,
        fake=lambda x, n: x.new_empty(x.shape),
    )
    assert op is torch.ops.whisper_triton.choose.default
    x = torch.tensor([10])
    for interpret, expected in ((True, 13), (False, 7), (True, 13)):
        pretend(monkeypatch, interpret=interpret)
        assert op(x, 3).item() == expected
    assert op(x.to("meta"), 3).shape == x.shape


@pytest.mark.usefixtures("library")
def test_a_registered_op_compiles_by_its_fake_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    op = _dispatch.register(
        "rows(Tensor x) -> Tensor",
        kernel=lambda x: pytest.fail("no kernel runs on a CPU"),
        reference=lambda x: x.sum(-1),
        fake=lambda x: x.new_empty(x.shape[:-1]),
    )
    compiled = torch.compile(lambda x: op(x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(3, 4)), torch.full((3,), 5.0))


@pytest.mark.parametrize("name", ["update_kv_cache", "decode_attention", "append_attention"])
def test_a_reference_has_the_signature_of_its_kernel(name: str) -> None:
    assert inspect.signature(getattr(kernels, name)) == inspect.signature(getattr(kernels, f"{name}_reference"))


@pytest.mark.parametrize("name", ["update_kv_cache", "decode_attention", "append_attention"])
def test_the_schema_names_what_is_mutated(name: str) -> None:
    schema = getattr(torch.ops.whisper_triton, name).default._schema
    mutated = {argument.name for argument in schema.arguments if argument.is_write}
    assert (
        mutated
        == {
            "update_kv_cache": {"key_cache", "value_cache"},
            "decode_attention": set(),
            "append_attention": {"key_cache", "value_cache", "out"},
        }[name]
    )
    # An op that mutates a cache returns nothing, so that `torch.compile` can functionalise it.
    assert bool(mutated) is (not schema.returns)


def test_a_kernels_attribute_is_set_until_the_driver_has_taken_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answers = [], [1, 0, 0]

    def ask(function: ctypes.c_void_p, attribute: int, number: int) -> int:
        asked.append((function.value, attribute, number))
        return answers.pop(0)

    monkeypatch.setattr(_paced, "_driver", lambda: SimpleNamespace(cuFuncSetAttribute=ask))
    monkeypatch.setattr(_paced, "_set", set())
    one, other = SimpleNamespace(function=1 << 40), SimpleNamespace(function=7)
    for kernel in (one, one, one, other, other):
        _paced.prefer_shared_memory(kernel)
    share = _paced.PREFERRED_SHARED_MEMORY_CARVEOUT, 100
    assert asked == [(1 << 40, *share), (1 << 40, *share), (7, *share)]
