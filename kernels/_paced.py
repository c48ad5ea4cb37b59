"""Paced asynchronous copies (Gluon): what the kernels share that use them on Hopper, and when they are used.

`_paced_linear.py` and `_paced_rows.py` compute what `skinny_linear` does, `_paced_attention.py` and `_paced_stream.py` what
`decode_attention`, `_paced_append.py` what `append_attention` (`_paced_splits.py`: how programs share a head); their launchers
choose them where they are faster. What differs is how weights, keys and values come. There a program asks for all of them at
once, into registers, before it waits for the kernel before it: registers bound how many programs wait beside those that work,
and what the working ones ask for afterwards stands in line behind megabytes that nobody needs yet. Here they go to shared
memory, otherwise unused, and a program asks for its next piece only when an earlier one has come (`PACE` pieces on their way).
So later kernels begin early without being in the way. Where there are more pieces than find room at once, an LM head's or those
of many heads, a program goes on from one to the next, so that no wave of programs waits for the end of another.
benchmarks/NOTES.md has the attempts.

Gluon is Triton's lower level: layouts and shared memory by name. It has no interpreter, so these run on GPUs only.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import torch

from ._dispatch import capability, is_tritons, triton

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
    from triton.experimental.gluon.language.nvidia.ampere.async_copy import commit_group, wait_group

    async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # named so before Triton 3.8
    constexpr_function = gluon.constexpr_function
    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # named so before Triton 3.7
except ImportError:
    HAS_GLUON = False
    gl = gluon = triton  # stands in for annotations and decorators: nothing here is launched then
    async_load = barrier = commit_group = mma_v2 = wait_group = None
    constexpr_function = triton.jit
else:
    HAS_GLUON = True

# Widths of a decoder from which these kernels are faster, in whole steps on one H100 80GB HBM3, 2026-11-25 and 2026-11-29
# (benchmarks/NOTES.md, the decoder step, 18, 22, 23, 25 and 27). Narrower ones have not been measured. Batch 1: large-v3 0.79
# ms instead of 0.94, medium, of 1024 columns, 0.54 instead of 0.58. Batch 2: large-v3 1.06 instead of 1.32, medium 0.742 with
# its attention alone and 0.775 with its linear layers too, instead of 0.764. Batch 8: medium 1.01 instead of 1.14.
MIN_WIDTH = 1024
MIN_WIDTH_OF_FEW = 1280  # linear layers of two to four rows

PACED_HEAD_DIMS = (32, 64, 128)  # powers of two, so that a warp copies whole rows of keys 16 bytes a lane
ROWS = 8  # keys of a piece for each warp, where a program has a place for each of its pieces

HOPPER = (9, 0)  # the compute capability that these kernels were measured on, and are for
# Bytes of shared memory that a program can have: CUDA C++ Programming Guide, compute capability 9.0.
SHARED_MEMORY = 227 << 10

# CUfunction_attribute
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
PREFERRED_SHARED_MEMORY_CARVEOUT = 9  # in percent

logger = logging.getLogger(__name__)
_set: set[tuple[int, int]] = set()  # handles of kernels, and what attributes of theirs have been set
_given_up: dict[int, str] = {}  # why, by GPU, once they have


def has_paced_copies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether these kernels are for `device`: compute capability 9.0, where they were measured, and 2-byte elements."""
    return HAS_GLUON and dtype.itemsize == 2 and capability(device) == HOPPER and device.index not in _given_up


def why_given_up(device: torch.device) -> str | None:
    """With which error these kernels did not build on `device`, or None."""
    return _given_up.get(torch.cuda.current_device() if device.index is None else device.index)


def are_aligned(key_cache: torch.Tensor, value_cache: torch.Tensor) -> bool:
    """Whether all rows of the caches can be copied 16 bytes at a time."""
    # Bytes of where they begin, elements of how they go on: Triton knows of either whether it is a multiple of 16.
    return all(n % 16 == 0 for cache in (key_cache, value_cache) for n in (cache.data_ptr(), *cache.stride()[:3]))


class NotGranted(RuntimeError):
    """The driver refuses a kernel what it needs."""


def give_up(error: Exception, device: torch.device) -> None:
    """From here on the plain kernels serve on `device`, a tensor's, if `error` came of a launch because Triton cannot build
    these, Gluon being young, or because the driver does not grant what they need.

    Raises:
        Exception: `error`, where it is anything else, and inside a graph's capture.
    """
    if not (isinstance(error, NotGranted) or is_tritons(error)) or torch.cuda.is_current_stream_capturing():
        raise error
    if device.index not in _given_up:
        _given_up[device.index] = f"{type(error).__name__}: {error}"
        logger.warning("paced kernels do not run here, the plain ones serve: %s", _given_up[device.index][:300])


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def set_attribute(kernel: triton.compiler.CompiledKernel, attribute: int, number: int) -> int:
    """CUDA Driver API, cuFuncSetAttribute: of `kernel`, which is loaded, until the driver has taken it; its answer."""
    if (kernel.function, attribute) in _set:
        return 0
    answer = _driver().cuFuncSetAttribute(ctypes.c_void_p(kernel.function), attribute, number)
    if answer == 0:
        _set.add((kernel.function, attribute))
    return answer


def prefer_shared_memory(kernel: triton.compiler.CompiledKernel) -> None:
    """Asks the driver to set aside as much shared memory as there is on the multiprocessors that `kernel` runs on.

    How much that is the driver chooses kernel by kernel, and a multiprocessor must be idle to change it: kernels that want
    different shares cannot overlap there. So all links of a chain should want the same. Of one row's links it took 2 % off a
    step of large-v3, of several rows' nothing (benchmarks/NOTES.md, the decoder step, 18, 22 and 26). A hint: if the driver
    refuses it the kernel is as right as before.
    """
    set_attribute(kernel, PREFERRED_SHARED_MEMORY_CARVEOUT, 100)


@gluon.jit
def launch_dependents():
    gl.inline_asm_elementwise("griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_for_previous():
    gl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def attend_piece(q, k, v, is_key, m, l, acc):
    """Softmax states in base 2, one for each of the (warps, rows), that have seen a key more, where it is one.

    q (1, 1, D) times the scale; k, v and the accumulators (warps, rows, D), v 0 where there is no key; maxima and sums (warps,
    rows). All fp32.
    """
    score = gl.where(is_key, gl.sum(q * k, axis=2), float("-inf"))
    m_new = gl.maximum(m, score)
    safe_m = gl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen no key
    alpha = gl.exp2(m - safe_m)
    p = gl.exp2(score - safe_m)
    return m_new, l * alpha + p, acc * alpha[:, :, None] + p[:, :, None] * v


@gluon.jit
def join_softmax(m_i, l_i, o_i, HAS_ENDED: gl.constexpr):
    """What softmax states come to, maxima and sums (n,) and accumulators (n, D) in base 2: (D,)."""
    top = gl.max(m_i, axis=0)
    if HAS_ENDED:  # then there may be no keys
        top = gl.where(top == float("-inf"), 0.0, top)
    weight = gl.exp2(m_i - top)
    # Rounded products, as in `_paced_append.py`: lanes that hold the same sum would else differ in its last bit.
    total, o = gl.sum(gl.fma(l_i, weight, 0.0), axis=0), gl.sum(gl.fma(o_i, weight[:, None], 0.0), axis=0)
    if HAS_ENDED:
        total = gl.where(total > 0.0, total, 1.0)
    return o / total


__all__ = [
    "HAS_GLUON",
    "HOPPER",
    "MAX_DYNAMIC_SHARED_SIZE_BYTES",
    "MIN_WIDTH",
    "MIN_WIDTH_OF_FEW",
    "PACED_HEAD_DIMS",
    "ROWS",
    "SHARED_MEMORY",
    "NotGranted",
    "are_aligned",
    "async_load",
    "attend_piece",
    "barrier",
    "commit_group",
    "constexpr_function",
    "give_up",
    "gl",
    "gluon",
    "has_paced_copies",
    "join_softmax",
    "launch_dependents",
    "mma_v2",
    "prefer_shared_memory",
    "set_attribute",
    "wait_for_previous",
    "wait_group",
    "why_given_up",
]
