"""Where an op runs, and how it is registered: shared by every kernel file.

An op runs as a Triton kernel on a GPU, as the same kernel in Triton's interpreter on CPU tensors when `TRITON_INTERPRET=1`
was set before Triton was imported, and as its PyTorch reference everywhere else: also on a GPU for which Triton turns out
to build no kernels, or finds no folder to keep them in. Ops are registered with `torch.library.Library.define/impl`: 1.2 us a
call on the host, where `custom_op` costs 9-13 us and `triton_op` 11-15 us.
"""

from __future__ import annotations

import functools
import logging
import textwrap
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from subprocess import CalledProcessError
from typing import Literal

import torch

try:
    import triton
    import triton.language as tl
    from triton import knobs
    from triton.errors import TritonError
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton has no wheels outside Linux: the references still serve
    HAS_TRITON = False
    INTERPRET = False
else:
    HAS_TRITON = True
    # Triton decides at each `@triton.jit`, that is when our kernel files are imported, so once is enough here too.
    INTERPRET = bool(knobs.runtime.interpret)

if not HAS_TRITON:

    class _Missing:
        """Stands in for `triton` and `tl` so that kernel files can be imported; a kernel is never launched then."""

        @staticmethod
        def constexpr(value: object) -> object:
            return value

        @staticmethod
        def jit(function: Callable | None = None, **options: object) -> Callable:
            return function or (lambda function: function)

        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

        @staticmethod
        def next_power_of_2(n: int) -> int:
            return 1 << (n - 1).bit_length()

    class TritonError(Exception):
        """Never raised."""

    triton = tl = _Missing()
    gdc_launch_dependents = gdc_wait = None

__all__ = [
    "HAS_TRITON",
    "INTERPRET",
    "backend",
    "capability",
    "failed_gpus",
    "fall_back",
    "gdc_launch_dependents",
    "gdc_wait",
    "has_pdl",
    "is_tritons",
    "launched_on",
    "multiprocessors",
    "pdl_handover",
    "pdl_options",
    "register",
    "register_options",
    "tl",
    "triton",
    "why_reference",
]

LIBRARY = torch.library.Library("whisper_triton", "FRAGMENT")

Backend = Literal["triton", "interpreter", "reference"]


def backend(device: torch.device | str) -> Backend:
    """How an op on tensors of `device` runs: "triton", "interpreter" (`TRITON_INTERPRET=1`) or "reference" (PyTorch)."""
    kind = torch.device(device).type
    if not HAS_TRITON or kind not in ("cuda", "cpu"):
        return "reference"
    if INTERPRET:
        return "interpreter"
    if kind == "cpu" or (_FAILURES and _index(torch.device(device)) in _FAILURES):
        return "reference"
    return "triton"


logger = logging.getLogger(__name__)
_FAILURES: dict[int, str] = {}  # why ops run as references, by GPU


def why_reference(device: torch.device) -> str | None:
    """Why ops on `device`, a GPU, run as their references though Triton is there; None if they do not."""
    return _FAILURES.get(_index(device)) if device.type == "cuda" else None


def failed_gpus() -> tuple[int, ...]:
    """The GPUs of which `why_reference` knows."""
    return tuple(_FAILURES)


def fall_back(op: str, device: torch.device, error: Exception) -> None:
    """From here on ops on `device` run as their references, and the log says so, if `error` came of a kernel's launch because
    Triton cannot build, keep or load kernels there. That kernel was not launched then.

    Raises:
        Exception: `error`, where it is anything else, such as a lack of memory, a fault of the GPU's or a mistake of ours; and
            inside a graph's capture, which references would break.
    """
    if INTERPRET or not is_tritons(error) or torch.cuda.is_current_stream_capturing():
        raise error
    index = _index(device)
    if index in _FAILURES:  # another thread's launch failed too
        return
    reason = f"{op}: {type(error).__name__}: {textwrap.shorten(str(error), 300)}"
    if isinstance(error, OSError):
        reason += " (set TRITON_CACHE_DIR to a folder that can be written)"
    _FAILURES[index] = reason
    logger.warning("Triton's kernels do not run on cuda:%d, slow PyTorch references do: %s", index, reason)


# What of the errors that CUDA gives Triton means that a kernel does not go with the GPU or its driver; the others are faults.
_UNLOADABLE = ("kernel image", "PTX", "device function", "not supported")


def is_tritons(error: Exception) -> bool:
    """Whether `error` says that Triton cannot build, keep or load a kernel."""
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        return False
    text = str(error)
    if "Triton Error" in text and not any(part in text for part in _UNLOADABLE):
        return False
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    is_raised_within = any(name.partition(".")[0] == "triton" for name in modules)
    return isinstance(error, (TritonError, OSError, CalledProcessError, RuntimeError)) and is_raised_within


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


_CAPABILITIES: dict[int, tuple[int, int]] = {}


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of `device`; (0, 0) for what is not NVIDIA's, and in the interpreter."""
    if device.type != "cuda" or INTERPRET or torch.version.hip is not None:
        return (0, 0)
    index = _index(device)
    if index not in _CAPABILITIES:
        _CAPABILITIES[index] = torch.cuda.get_device_capability(index)
    return _CAPABILITIES[index]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many `device`, a GPU, has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def has_pdl(device: torch.device) -> bool:
    """Whether programmatic dependent launch exists on `device`: NVIDIA, compute capability 9.0 and later."""
    return capability(device) >= (9, 0)


def pdl_options(device: torch.device) -> dict[str, bool]:
    """Launch arguments that turn programmatic dependent launch on where it exists.

    Every kernel of ours then lets the next one start at once and itself waits, before it writes to memory, until the one before
    it has finished, which itself has waited, and all their writes are visible. What it reads before that, to begin early, its
    launcher's docstring names: weights, and with `read_ahead` caches. Between whatever writes these and the call there must be
    a kernel launched without dependent launch, as all of PyTorch's are, or the beginning of a graph's replay.
    """
    return {"USE_PDL": True, "launch_pdl": True} if has_pdl(device) else {"USE_PDL": False}


def register_options(device: torch.device) -> dict[str, int]:
    """Launch arguments that let a program have all the registers it asks for.

    Left to itself, NVIDIA's assembler may aim at more programs at a time and spill a few bytes. On compute capability 9.0,
    where tiles were measured, none does, and it is left to itself.
    """
    return {} if capability(device) in ((0, 0), (9, 0)) else {"maxnreg": 255}


def launched_on(device: torch.device) -> AbstractContextManager[object]:
    """Within it Triton, which launches on the current GPU, does so on `device`."""
    is_other = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if is_other else _NOTHING


_NOTHING = nullcontext()


def register(schema: str, *, kernel: Callable, reference: Callable, fake: Callable) -> Callable:
    """Registers the op `whisper_triton::<schema>` and returns its overload.

    `kernel` launches Triton, `reference` is PyTorch; both take the op's arguments and the choice is made a call, by the
    device of the first tensor. Where Triton fails the reference runs after the kernel, which may then have written no more
    than the reference writes too. `fake` computes only shapes, for `torch.compile`.
    """
    name = schema.partition("(")[0]

    def run(first: torch.Tensor, *args: object) -> torch.Tensor | None:
        if backend(first.device) == "reference":
            return reference(first, *args)
        try:
            with launched_on(first.device):
                return kernel(first, *args)
        except Exception as error:
            fall_back(name, first.device, error)
        return reference(first, *args)

    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"whisper_triton::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.whisper_triton, name).default


@triton.jit
def pdl_handover(USE_PDL: tl.constexpr):
    """First statement of a kernel: lets the next kernel launch, then waits for the previous one's writes."""
    if USE_PDL:
        gdc_launch_dependents()
        gdc_wait()
