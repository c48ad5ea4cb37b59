"""Argument checks shared by the launchers and their references. Each raises `ValueError` with the offending value; none reads
device memory.
"""

from __future__ import annotations

import functools
import math
from numbers import Real
from operator import mul

import torch

from ._dispatch import backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (32, 64, 80, 96, 128)
MAX_QUERIES = 16  # one tensor-core tile of query rows
MAX_STRIDE = 1 << 23  # of slots: offsets within a tile of 256 keys are 32-bit


def check_tensors(**tensors: object) -> None:
    """All tensors whose elements lie in memory by strides: no array, no sparse one."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a tensor, got one in the layout {tensor.layout}")


def check_numbers(**numbers: object) -> None:
    """All finite numbers of the host's: a NaN would come out of a reference and be lost in a kernel's comparisons."""
    for name, number in numbers.items():
        if not (isinstance(number, Real) and -math.inf < number < math.inf):
            raise ValueError(f"{name} must be a finite number, got {number!r:.50}")


def check_flags(**flags: object) -> None:
    """All True or False: another thing's truth is a matter of the path it takes."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name} must be True or False, got {flag!r:.50}")


def check_kinds(kind: type, **values: object) -> None:
    """All of this class."""
    for name, value in values.items():
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r:.50}")


def check_dtype(tensor: torch.Tensor, is_reference: bool = False) -> None:
    """One that the kernels take; the PyTorch references also take float64, which is what the kernels are measured against."""
    allowed = (*DTYPES, torch.float64) if is_reference or backend(tensor.device) == "reference" else DTYPES
    if tensor.dtype not in allowed:
        raise ValueError(f"dtype must be one of {[str(d) for d in allowed]}, got {tensor.dtype}")


def check_mutated(**tensors: torch.Tensor) -> None:
    """What is written to holds each of its elements once, as far as sorted strides tell: each is past all that shorter ones
    reach.
    """
    for name, tensor in tensors.items():
        reached = 0
        for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            if size > 1 and stride <= reached:
                raise ValueError(f"{name} is written to and must not overlap itself, got strides {tensor.stride()}")
            reached += stride * (size - 1)


def check_apart(key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
    """They share no memory; for where an op runs, since `torch.compile` knows no addresses."""
    if share_memory(key_cache, value_cache):
        raise ValueError(
            f"key_cache and value_cache share memory: strides {key_cache.stride()} and {value_cache.stride()},"
            f" {value_cache.data_ptr() - key_cache.data_ptr()} bytes from the one to the other"
        )


def share_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold an element in common; False for those on meta."""
    distance = second.data_ptr() - first.data_ptr()
    if distance < 0:
        return share_memory(second, first)
    shape, strides, itemsize = first.shape, first.stride(), first.element_size()
    if distance >= (1 + sum(map(mul, shape, strides))) * itemsize:  # more than the first one reaches
        return False
    return not first.is_meta and do_meet(distance, tuple(shape), strides, second.stride(), itemsize)


@functools.lru_cache(maxsize=4096)  # a step asks of the same caches for each token
def do_meet(distance: int, shape: tuple[int, ...], low: tuple[int, ...], high: tuple[int, ...], itemsize: int) -> bool:
    """Whether two tensors of one shape, the second `distance` bytes behind the first, share a byte.

    They do if `distance` is a sum of strides, the first tensor's taken 0 to size - 1 times and the second's as often, but
    subtracted. Tried from the longest stride on, each so often that the shorter ones can still make up for what is left.
    """
    times = {1: (1 - itemsize, itemsize - 1)}  # by the stride in bytes: the least and the most
    for size, *strides in zip(shape, low, high, strict=True):
        if size > 1:
            for stride, least, most in zip(strides, (0, 1 - size), (size - 1, 0), strict=True):
                before = times.get(stride * itemsize, (0, 0))
                times[stride * itemsize] = before[0] + least, before[1] + most
    places = sorted(times.items(), reverse=True)

    @functools.cache
    def is_sum(left: int, i: int) -> bool:
        if i == len(places):
            return left == 0
        stride, (least, most) = places[i]
        below, above = (sum(stride * ends[k] for stride, ends in places[i + 1 :]) for k in (0, 1))
        possible = range(max(least, -((above - left) // stride)), min(most, (left - below) // stride) + 1)
        return any(is_sum(left - n * stride, i + 1) for n in possible)

    return is_sum(distance, 0)


def need_gradients(*tensors: torch.Tensor | None) -> bool:
    """Whether what is computed of these now would be part of a graph of autograd's."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def check_gradients(op: str, *tensors: torch.Tensor | None) -> None:
    """None are wanted: of kernels there are none, and a result without them looks like any other."""
    if need_gradients(*tensors):
        raise ValueError(f"{op} has no backward pass: call it under torch.no_grad(), or {op}_reference")


def check_states(*, is_reference: bool = False, **tensors: torch.Tensor) -> None:
    """All tensors 4-d, one dtype and device, dense in the last dimension; the dtype one that the kernels take."""
    check_tensors(**tensors)
    first = next(iter(tensors.values()))
    check_dtype(first, is_reference)
    for name, tensor in tensors.items():
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(tensor.shape)}")
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, expected {first.dtype} on {first.device} like the others"
            )
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be dense in its last dimension, got strides {tensor.stride()}")


def check_caches(states: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, *, mutated: bool = False) -> None:
    """`states` (B, T, H, D) fits the caches (B, H, S, D), which are two places in memory where they are written to."""
    B, T, H, D = states.shape
    if key_cache.shape != value_cache.shape:
        raise ValueError(f"key_cache {tuple(key_cache.shape)} and value_cache {tuple(value_cache.shape)} differ in shape")
    if (key_cache.shape[0], key_cache.shape[1], key_cache.shape[3]) != (B, H, D):
        raise ValueError(f"caches {tuple(key_cache.shape)} (B, H, S, D) do not fit states {(B, T, H, D)} (B, T, H, D)")
    if min(B, T, H, D, key_cache.shape[2]) == 0:
        raise ValueError(f"empty tensors: states {(B, T, H, D)}, caches {tuple(key_cache.shape)}")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.shape[2] > 1 and cache.stride(2) >= MAX_STRIDE:
            raise ValueError(f"{name} must have slots less than {MAX_STRIDE} elements apart, got strides {cache.stride()}")
    if mutated:
        if key_cache is value_cache:
            raise ValueError("key_cache and value_cache are one tensor")
        check_mutated(key_cache=key_cache, value_cache=value_cache)


def check_attention(query: torch.Tensor) -> None:
    """T and D of `query` (B, T, H, D) are sizes that the attention kernels cover."""
    _, T, _, D = query.shape
    if T > MAX_QUERIES:
        raise ValueError(f"at most {MAX_QUERIES} query tokens, got {T}: use PyTorch's SDPA for prompts")
    if D not in HEAD_DIMS:
        raise ValueError(f"head dim must be one of {HEAD_DIMS}, got {D}")


def check_positions(name: str, positions: torch.Tensor, batch_size: int, device: torch.device) -> None:
    """An integer tensor, 0-dim or (B,), on the states' device: its value stays there, so that a step can be captured."""
    if not isinstance(positions, torch.Tensor):
        raise ValueError(f"{name} must be a tensor on the device, got {type(positions).__name__} {positions!r:.50}")
    check_tensors(**{name: positions})
    if positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64 or int32, got {positions.dtype}")
    if positions.dim() > 1 or (positions.dim() == 1 and positions.shape[0] != batch_size):
        raise ValueError(f"{name} must be 0-dim or ({batch_size},), got shape {tuple(positions.shape)}")
    if positions.device != device:
        raise ValueError(f"{name} must be on {device}, got {positions.device}")


def check_ended(ended: torch.Tensor | None, batch_size: int, device: torch.device) -> None:
    """None, or a dense (B,) integer tensor on the states' device."""
    if ended is None:
        return
    check_positions("ended", ended, batch_size, device)
    if ended.shape != (batch_size,) or not ended.is_contiguous():
        raise ValueError(f"ended must be ({batch_size},) and dense, got {tuple(ended.shape)} with strides {ended.stride()}")


def check_counters(counters: torch.Tensor, count: int, device: torch.device) -> None:
    """Dense int32 on `device`, at least `count` of them."""
    check_tensors(counters=counters)
    if counters.dtype != torch.int32 or counters.device != device or not counters.is_contiguous() or counters.numel() < count:
        raise ValueError(
            f"counters must be at least {count} contiguous int32 on {device}, got {counters.dtype} "
            f"{tuple(counters.shape)} on {counters.device}"
        )
