"""Runs on the CPU the PTX that Triton makes of a kernel, so that kernels in Gluon, which has no interpreter, can be checked.

    with emulate():
        skinny_linear._launch(...)  # on CPU tensors: compiled for sm_90 as on an H100, and its PTX executed

All threads of a program (or of a cluster of programs) go in lockstep, an array of numpy a register. Branches keep a place a
thread, and those at the lowest place go first. The programs of a grid run one after the other, in order.

What a GPU may do at any time is done as late as it may, so that what is read too early shows: asynchronous copies when they
are waited for, stores to another program of a cluster when the cluster meets (`early=True`: at once, which shows places that
are refilled before they are read). Registers and shared memory that nobody wrote hold 0xFF, which is NaN. Accesses outside the
arguments' storages and what is declared of shared memory, misaligned ones, barriers that a part of a program reaches and
shuffles with threads that are not there raise `Fault`; opcodes that no kernel of ours has `NotImplementedError`, before
anything runs.

Not seen: other races between threads and between programs, what programmatic dependent launch overlaps, the order of memory.
`.ftz` is ignored, approximate functions are numpy's, tensor cores add up in fp64 and round once, `fma` rounds to fp64, then to
fp32.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

from ptx_machine import WARP, Machine
from ptx_text import parse
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from whisper_triton.kernels import _attend, _cluster, _dispatch, _paced, _paced_rows, _paced_stream


class Launcher:
    """What Triton calls to launch a kernel: it runs the kernel's PTX."""

    def __init__(self, src: object, metadata: object, change: Callable[[str], str], early: bool) -> None:
        name = src.name[:150]  # as Triton's compiler names the files that it keeps
        files = get_cache_manager(metadata.hash).get_group(f"{name}.json")
        self.kernel = parse(change(Path(files[f"{name}.ptx"]).read_text()))
        self.is_constant = [kind == "constexpr" for kind in src.signature.values()]
        self.scratch = metadata.global_scratch_size + metadata.profile_scratch_size
        self.machine = Machine(self.kernel, metadata.num_warps, metadata.num_ctas, metadata.shared, early)

    def __call__(self, x: int, y: int, z: int, stream: int, function: object, *others: object) -> None:
        # Before the kernel's arguments: what is known of it, of the launch, and two hooks.
        arguments = others[4:]
        values = [value for value, constant in zip(arguments, self.is_constant, strict=True) if not constant]
        if self.scratch:
            raise NotImplementedError("scratch memory")
        scratch = [0] * 2  # two pointers that Triton adds, global and the profiler's
        self.machine.run((x, y, z), values + scratch)


class Emulator:
    """A driver of Triton's for a GPU of compute capability 9.0 that is this module."""

    numbers = itertools.count(1000)

    def __init__(self, change: Callable[[str], str], early: bool) -> None:
        self.utils = self
        self.device = next(self.numbers)  # a kernel keeps its launcher by device
        self.launcher_cls = functools.partial(Launcher, change=change, early=early)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, WARP)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _paced.SHARED_MEMORY}

    def load_binary(self, *arguments: object) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024


@contextmanager
def emulate(change: Callable[[str], str] = str, early: bool = False) -> Iterator[None]:
    """Kernels launched inside run here, on CPU tensors, as on an H100; what goes wrong is raised and nothing falls back.

    change: what is made of a kernel's PTX first, to see that a mistake is noticed. early: copies are made when they are asked
    for, not when they are waited for.

    Raises:
        RuntimeError: Triton compiles nothing, because it was imported with `TRITON_INTERPRET=1`.
    """
    if _dispatch.INTERPRET:
        raise RuntimeError("nothing is compiled where TRITON_INTERPRET=1 is set")
    with ExitStack() as stack:
        for module in (_dispatch, _attend, _paced):
            stack.enter_context(mock.patch.object(module, "capability", return_value=(9, 0)))
        for module in (_paced_rows, _paced_stream):
            stack.enter_context(mock.patch.object(module, "multiprocessors", return_value=3))
        stack.enter_context(mock.patch.object(_paced, "set_attribute", return_value=0))
        stack.enter_context(mock.patch.object(_cluster, "set_attribute", return_value=0))
        stack.enter_context(mock.patch.object(_paced, "is_tritons", return_value=False))
        stack.enter_context(mock.patch.object(driver, "_active", Emulator(change, early)))
        yield
