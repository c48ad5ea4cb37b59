"""What decoder and encoder share: capturing a CUDA graph that owns all the memory it touches, whatever else in the process
captures and frees graphs, and the hooks that no graph calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


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
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
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
