"""Set-up of the whole suite: where the kernels run, seeds, the `gpu` marker, and what is counted."""

import functools
import importlib.util
import inspect
import os
import random
import sys
import types
from collections.abc import Iterator
from importlib import metadata

import counts
import hypothesis
import numpy as np
import pytest
import torch
from packaging.version import Version

HAS_GPU = torch.cuda.is_available()
# Triton reads this when a kernel is defined, so it must be set before any test module imports one (torch does not).
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# No test may depend on a model hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The tensors are small: a second thread brings nothing, and where the cores are busy it costs seventyfold.
torch.set_num_threads(1)
# The yardstick is stock in fp32: cuDNN's convolutions, the encoder's first layers, would round to tf32.
torch.backends.cudnn.allow_tf32 = False
# The interpreter takes seconds for some examples; and the same examples each time, so that a run can be repeated.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)
hypothesis.settings.register_profile("fresh", deadline=None, derandomize=False, database=None)
hypothesis.settings.load_profile("suite")


def _speed_up_interpreter() -> None:
    """At each call of a jitted function Triton's interpreter searches all of `triton.language` for what it replaces, which is
    a third of its time. The names are the same each time: here it searches once.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    @functools.cache
    def builtins_of(owner: object) -> list[str]:
        return [name for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member)]

    for owner in (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base):  # before anything is replaced in them
        builtins_of(owner)
    interpreter.inspect = types.ModuleType("inspect")
    vars(interpreter.inspect).update(vars(inspect))
    interpreter.inspect.getmembers = lambda owner: [(name, getattr(owner, name)) for name in builtins_of(owner)]


if INTERPRET and importlib.util.find_spec("triton") is not None:
    _speed_up_interpreter()


def why_not_interpreted(triton: str, numpy: str) -> str | None:
    """Why Triton's interpreter runs no kernel of ours with these versions, or None."""
    if Version(triton) < Version("3.7") and Version(numpy) >= Version("2.4"):
        return f"the interpreter of triton {triton} breaks with numpy {numpy}: pip install 'numpy<2.4'"
    return None


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--hypothesis-seed") is not None:  # which hypothesis else ignores
        hypothesis.settings.load_profile("fresh")
    if INTERPRET and importlib.util.find_spec("triton") is not None:
        import triton

        reason = why_not_interpreted(triton.__version__, np.__version__)
        if reason is not None:
            raise pytest.UsageError(reason)  # hundreds of tests would fail, none of which says so
    config.pluginmanager.register(counts)


def pytest_report_header() -> str:
    installed = {distribution.name for distribution in metadata.distributions()}
    packages = [
        f"{name} {metadata.version(name)}" for name in ("torch", "triton", "transformers", "kernels") if name in installed
    ]
    return f"{', '.join(packages)}; kernels run {'in the interpreter' if INTERPRET else 'on the GPU'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU and not INTERPRET:
        return
    reason = "TRITON_INTERPRET=1 is set" if HAS_GPU else "no NVIDIA GPU"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _kernels_have_run() -> Iterator[None]:
    """A kernel that does not build is replaced by its reference, and a test of it would compare that with itself."""
    yield
    dispatch = sys.modules.get("whisper_triton.kernels._dispatch")
    assert dispatch is None or not dispatch._FAILURES


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU through Triton's interpreter."""
    return torch.device("cpu" if INTERPRET else "cuda")
