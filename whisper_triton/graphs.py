"""What decoder and encoder share: capturing a CUDA graph that owns all the memory it touches, whatever else in the process
captures and frees graphs, and the hooks that no graph calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from .kernels import backend

Result = TypeVar("Result")
_LOCK = threading.Lock()  # a capture waits for the device, which none that is under way in another thread would survive


class NotCaptured(Exception):
    """The reason why a pass could not be recorded, though it can be launched: too little memory, or kernels do not build."""


def global_hooks() -> tuple[int, ...]:
    """The hooks that somebody has put around every module's forward pass, of which a graph calls none."""
    hooks = torch.nn.modules.module
    return tuple(
        id(hook) for found in (hooks._global_forward_pre_hooks, hooks._global_forward_hooks) for hook in found.values()
    )


def capture(run: Callable[[], Result], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Result, int]:
    """Calls `run` twice: once to compile and plan whatever it calls, and once to record it.

    PyTorch keeps one workspace of cuBLAS a stream, for all graphs captured on it, and frees it with the first of them
    (pytorch issue 193402). So none is kept when recording begins, the graph takes one from its own memory, and none is kept
    when it ends: nobody else then uses or frees it.

    Returns:
        The graph, what `run` returned while it was recorded, and the bytes that the graph keeps.

    Raises:
        NotCaptured: nothing is kept, and the stream is the one that was current before.
    """
    current = torch.cuda.current_stream(device)
    # The stream, because torch leaves the graph's one current where it cannot end a recording.
    with _LOCK, torch.cuda.device(device), torch.cuda.stream(current):
        try:
            return _capture(run, device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        raise NotCaptured("out of memory")


def _capture(run: Callable[[], Result], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Result, int]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            run()
    finally:
        torch.cuda.current_stream().wait_stream(stream)
    if backend(device) == "reference":  # since that run: its kernels could not be built
        raise NotCaptured("its kernels are PyTorch references here")
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    graph = torch.cuda.CUDAGraph()
    try:
        # "thread_local": what other threads do meanwhile, a data loader's pinned memory say, is no concern of this capture.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            before = torch.cuda.memory_reserved()
            result = run()
            nbytes = torch.cuda.memory_reserved() - before
    finally:
        torch._C._cuda_clearCublasWorkspaces()
    return graph, result, nbytes


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error` came of a lack of the GPU's memory: where a recording breaks off, torch raises another over it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "ALLOC_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
