"""The memory that PTX reads and writes, with checked addresses, and what is on its way there: see ptx.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from ptx_numbers import DTYPES

SHARED_GAP = 1024  # bytes between variables in shared memory, which nobody may touch
RANK_SHIFT = 24  # of an address of another program's shared memory: 1 + its rank in the cluster stands above it
OFFSET = (1 << RANK_SHIFT) - 1

Piece = tuple[np.ndarray, np.ndarray, np.ndarray]  # threads, bytes of memory, where in these each thread's lie


class Fault(Exception):
    """What no GPU would do, or not in the same way each time. (No RuntimeError: that may pass for one of Triton's.)"""


class Buffers:
    """The storages of some tensors, at their own addresses."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        self.starts = np.array(sorted(storages), np.int64)
        self.ends = self.starts + [storages[start].nbytes() for start in self.starts.tolist()]
        self.data = [torch.empty(0, dtype=torch.uint8).set_(storages[start]).numpy() for start in self.starts.tolist()]
        if (self.starts % 16).any():
            raise Fault(f"storages begin at {self.starts}, not all at multiples of 16")

    def locate(self, address: np.ndarray, at: np.ndarray, sizes: np.ndarray | int, alignment: int) -> Iterator[Piece]:
        """Where the bytes that the threads `at` want lie, by storage."""
        owner = np.searchsorted(self.starts, address, side="right") - 1
        outside = (owner < 0) | (address + sizes > self.ends[owner])
        check(outside, at, address, "lies in no tensor")
        check(address % alignment != 0, at, address, f"is no multiple of {alignment}")
        for i in set(owner.tolist()):
            mine = owner == i
            yield at[mine], self.data[i], address[mine] - self.starts[i]


class Shared:
    """Shared memory of a cluster's programs, and what lies where in each of them."""

    def __init__(self, variables: dict[str, int], program: np.ndarray) -> None:
        self.program = program  # (threads,): its rank in the cluster
        self.symbols, self.ends, size = {}, {}, 0
        for name, nbytes in variables.items():
            self.symbols[name], self.ends[name] = size, size + nbytes
            size += -(-(nbytes + SHARED_GAP) // 128) * 128
        self.size, self.programs = size, int(program.max()) + 1
        self.data = np.empty(self.programs * size, np.uint8)

    def locate(
        self, address: np.ndarray, at: np.ndarray, sizes: np.ndarray | int, alignment: int, in_cluster: bool = False
    ) -> Iterator[Piece]:
        rank, offset = (address >> RANK_SHIFT) - 1, address & OFFSET
        own = self.program[at]
        rank = np.where(rank < 0, own, rank)
        outside = np.ones(len(at), bool)
        for name, start in self.symbols.items():
            outside &= (offset < start) | (offset + sizes > self.ends[name])
        check(outside | (rank >= self.programs), at, address, "lies outside shared memory")
        check(address % alignment != 0, at, address, f"is no multiple of {alignment}")
        check((rank != own) & (not in_cluster), at, address, "is another program's")
        yield at, self.data, rank * self.size + offset

    def program_of(self, places: np.ndarray) -> np.ndarray:
        """Whose memory those are, as `locate` returns them."""
        return places // self.size


class Parameters:
    """The arguments of a launch."""

    SIZES = 8  # bytes from one to the next

    def __init__(self, names: dict[str, str]) -> None:
        self.kinds = [*names.values()]
        self.symbols = {name: self.SIZES * i for i, name in enumerate(names)}
        self.data = np.zeros(self.SIZES * len(names), np.uint8)

    def fill(self, arguments: list[object]) -> None:
        for i, (kind, argument) in enumerate(zip(self.kinds, arguments, strict=True)):
            dtype = DTYPES[kind]
            number = argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
            if dtype.kind != "f":  # of any sign
                number, dtype = int(number) & ((1 << 8 * dtype.itemsize) - 1), np.dtype(f"u{dtype.itemsize}")
            self.data[self.SIZES * i :][: dtype.itemsize] = np.array([number], dtype).view(np.uint8)

    def locate(self, address: np.ndarray, at: np.ndarray, sizes: np.ndarray | int, alignment: int) -> Iterator[Piece]:
        check((address < 0) | (address + sizes > len(self.data)), at, address, "is no parameter")
        yield at, self.data, address


def check(is_bad: np.ndarray, at: np.ndarray, address: np.ndarray, what: str) -> None:
    if is_bad.any():
        first = int(np.argmax(is_bad))
        raise Fault(f"thread {at[first]} and {int(is_bad.sum()) - 1} others: address {address[first]:#x} {what}")


def check_agree(places: np.ndarray, values: np.ndarray, at: np.ndarray) -> None:
    """Of threads that store to one place at once any may be the last: they must store the same bits."""
    bits = values.view(f"u{values.itemsize}")
    order = np.argsort(places, kind="stable")
    differ = (np.diff(places[order]) == 0) & (np.diff(bits[order]) != 0)
    if differ.any():
        first = int(np.argmax(differ))
        pair = order[first : first + 2]
        raise Fault(f"threads {at[pair]} and {int(differ.sum()) - 1} other pairs: {values[pair]} to one place at once")


def typed(data: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)


class Barrier:
    """An mbarrier object: who has yet to arrive, how many bytes are expected, and what is on its way to be counted off."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals, self.expected, self.nbytes = arrivals, 0, 0
        self.sent: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # memory, index, values

    def is_complete(self) -> bool:
        """Whether its first phase is; what was sent is there then, and not before."""
        if self.nbytes > self.expected:
            raise Fault(f"{self.nbytes} bytes come to a barrier that expects {self.expected}")
        if self.arrivals or self.nbytes < self.expected:
            return False
        for memory, index, values in self.sent:
            memory[index] = values
        self.sent.clear()
        return True


class Cluster:
    """What a cluster's programs know of each other, from one barrier of all to the next, and their mbarrier objects."""

    def __init__(self) -> None:
        self.has_arrived = self.has_met = False
        self.sent: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # memory, index, values: to other programs
        self.released: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # the same, of before they arrived at a barrier
        self.barriers: dict[int, Barrier] = {}  # by where they lie

    def barrier(self, place: int) -> Barrier:
        if place not in self.barriers:
            raise Fault(f"there is no barrier at {place:#x}")
        return self.barriers[place]

    def send(self, memory: np.ndarray, index: np.ndarray, values: np.ndarray) -> None:
        self.check_met(len(index) > 0)
        self.sent.append((memory, index, values))

    def check_met(self, is_sent: bool) -> None:
        if is_sent and not self.has_met:
            raise Fault("is sent to a program that may not have begun")

    def release(self) -> None:
        self.released += self.sent
        self.sent.clear()

    def deliver(self) -> None:
        for memory, index, values in self.released:
            memory[index] = values
        self.released.clear()

    def end(self, name: str) -> None:
        is_unread = any(len(index) for _, index, _ in self.sent + self.released)
        if self.has_arrived or is_unread or any(barrier.sent for barrier in self.barriers.values()):
            raise Fault(f"{name}: a program ends before all have met once more, or without what it was sent")


class Copy(NamedTuple):
    """A copy to shared memory that is on its way: what some threads asked for, of one storage."""

    at: np.ndarray  # (n,): the threads
    group: np.ndarray  # (n,): how many groups each had committed before
    places: np.ndarray  # (n,): in shared memory
    data: np.ndarray
    sources: np.ndarray  # (n,): in data
    sizes: np.ndarray  # (n,): bytes that are read, of nbytes; zeros follow
    nbytes: int

    def select(self, chosen: np.ndarray) -> Copy:
        arrays = (self.group[chosen], self.places[chosen], self.data, self.sources[chosen], self.sizes[chosen])
        return Copy(self.at[chosen], *arrays, self.nbytes)
