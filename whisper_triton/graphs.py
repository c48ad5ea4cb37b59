"""What decoder and encoder share: capturing a CUDA graph that owns all the memory it touches, whatever else in the process
captures and frees graphs, and what of a module no graph does.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import nn

from .kernels import backend

Key = TypeVar("Key")
Result = TypeVar("Result")
# Held while a graph is recorded, which another thread's waiting for the device would end: who must wait for it takes this.
CAPTURES = threading.RLock()


class NotCaptured(Exception):
    """The reason why a pass could not be recorded, though it can be launched: too little memory, or kernels do not build."""


def global_hooks() -> tuple[int, ...]:
    """The hooks that somebody has put around every module's forward pass, of which a graph calls none."""
    hooks = torch.nn.modules.module
    return tuple(
        id(hook) for found in (hooks._global_forward_pre_hooks, hooks._global_forward_hooks) for hook in found.values()
    )


def is_recorder(hook: object) -> bool:
    """Whether a forward hook is one that transformers leaves on every layer after a call with output_attentions.

    They do nothing unless asked to.
    """
    return getattr(hook, "__name__", "") == "output_capturing_hook"


def modules_of(*roots: nn.Module | None) -> list[nn.Module]:
    """The modules below and with `roots`, in no order of note: a fraction of what `Module.modules` costs the host."""
    modules = [root for root in roots if root is not None]
    for module in modules:  # which grows meanwhile
        children = module._modules
        if children:
            for child in children.values():
                if child is not None:
                    modules.append(child)
    return modules


def why_not_known(module: nn.Module, known: Collection[type[nn.Module]], is_wrapped: bool = False) -> str | None:
    """Why a pass of `module`, those below it aside, may be more than the kernels of its class, or None.

    Args:
        known: classes whose forward passes do the same each time.
        is_wrapped: what is around the pass is run all the same, hooks and a forward pass on the instance.
    """
    kind = type(module)
    if kind not in known:
        return f"a module is {kind.__name__}"
    if module.training:
        return f"{kind.__name__} is in training mode"
    if is_wrapped:
        return None
    if "forward" in module.__dict__:
        return f"{kind.__name__} has a forward pass of its own"
    if module._forward_pre_hooks or not all(map(is_recorder, module._forward_hooks.values())):
        return f"{kind.__name__} has a forward hook"
    return None


def add_fingerprint(modules: Iterable[nn.Module], found: list[object], wrapped: nn.Module | None = None) -> None:
    """Adds what `why_not_known` asks of, and where the modules' own weights lie: a graph is captured for just these.

    Args:
        wrapped: of this one what is around the pass is run all the same.
    """
    for module in modules:  # hundreds a call, with the GPU idle: written for speed
        attributes = module.__dict__
        found += (type(module), attributes["training"], "forward" in attributes)
        if (attributes["_forward_pre_hooks"] or attributes["_forward_hooks"]) and module is not wrapped:
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                found += (id(hook) for hook in hooks.values() if not is_recorder(hook))
        parameters = attributes["_parameters"]
        if parameters:
            for parameter in parameters.values():
                if parameter is not None:
                    found += (id(parameter), parameter.data_ptr(), parameter.dtype)


def places_of(parameters: Iterable[nn.Parameter]) -> list[int]:
    return [parameter.data_ptr() for parameter in parameters]


def capture(run: Callable[[], Result], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Result, int]:
    """Calls `run` twice: once to compile and plan whatever it calls, and once to record it.

    PyTorch keeps one workspace of cuBLAS a stream, for all graphs captured on it, and frees it with the first of them
    (pytorch issue 193402). So none is kept when recording begins, the graph takes one from its own memory, and none is kept
    when it ends: nobody else then uses or frees it.

    PyTorch gives up the workspaces of all streams or none: so they all go, as they do when `torch.compile` captures graphs. A
    graph of the user's own keeps its workspace where that lies in the graph's own memory. It does not lie there if the graph
    was captured on the stream of its warm-up, or after another on the same stream: others may then be given that memory from
    here on. Such a graph is safe with `torch._C._cuda_clearCublasWorkspaces()` before and after its capture.

    Returns:
        The graph, what `run` returned while it was recorded, and the bytes that the graph keeps.

    Raises:
        NotCaptured: nothing is kept, and the stream is the one that was current before.
    """
    current, handled = torch.cuda.current_stream(device), sys.exc_info()[1]
    # The stream, because torch leaves the graph's one current where it cannot end a recording.
    with CAPTURES, torch.cuda.device(device), torch.cuda.stream(current):
        try:
            return _capture(run, device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error, handled):
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


class Sized(Protocol):
    """What is kept from call to call."""

    @property
    def nbytes(self) -> int:
        """Bytes of the GPU's memory."""


def make_room(
    kept: Mapping[Key, Sized], needed: int, most: int, give_up: Callable[[Key], object], in_use: Key | None = None
) -> None:
    """Has what was used least recently given up until all that is kept, with `needed` bytes more, takes `most` at most.

    What is larger than that by itself is kept alone: a newcomer of `needed` bytes, or what is `in_use`.

    Args:
        kept: the least recently used first. give_up: removes one from it.
    """
    for key in list(kept):
        if sum(one.nbytes for one in kept.values()) + needed <= most:
            return
        if key != in_use:
            give_up(key)


def is_out_of_memory(error: BaseException | None, handled: BaseException | None = None) -> bool:
    """Whether `error` came of a lack of the GPU's memory: where a recording breaks off, torch raises another over it.

    `handled`: the error that the caller was at already, which is none of this one's reasons.
    """
    while error is not None and error is not handled:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "ALLOC_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
