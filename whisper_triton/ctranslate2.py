"""Reads `model.bin`, the weight file of a CTranslate2 directory (the format of faster-whisper), without CTranslate2.

The file, little-endian throughout; a string is a uint16 length, then that many bytes of which the last is NUL:

    uint32 version (6) | string spec ("WhisperSpec") | uint32 revision (3)
    uint32 count | per tensor: string name, uint8 rank, uint32 dims[rank], uint8 type, uint32 bytes, the data
    uint32 count | per alias:  string alias, string name

An int8 tensor holds `round(weight * scale)` with one scale a row of the first dim, an int16 tensor with one scale in
all; the scales are the tensor `<name>_scale`. Nothing in the file is trusted: every length is checked against its
size before it is used, and whatever is not understood is refused. What is read never takes much more memory than the
file is large, aliases included.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple

import torch

BINARY_VERSION = 6
SPEC = "WhisperSpec"
SPEC_REVISION = 3
# By type id.
DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16, torch.bfloat16)
MAX_RANK = 3  # a convolution's weight
MAX_COUNT = 1 << 16  # of tensors or aliases; the largest Whisper has some 1,300
SCALE = "_scale"


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or understood. Its message is one line and names the file or model."""


class _Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of the data, in bytes from the start of the file

    @property
    def nbytes(self) -> int:
        return _product(self.shape) * self.dtype.itemsize


class ModelFile:
    """The tensors of one `model.bin`, read from the disk when asked for.

    Raises:
        CheckpointError: the file is missing, truncated, corrupt, or of a version, model or tensor type not known here.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            reason = getattr(error, "strerror", None) or "the file is empty"
            raise CheckpointError(f"{path}: {reason}") from error
        self._offset = 0
        self._entries: dict[str, _Entry] = {}
        self._read_header()
        self._read_entries()
        self._read_aliases()
        if self._offset != len(self._data):
            raise self._error(f"{len(self._data) - self._offset} bytes follow the last entry")

    def __str__(self) -> str:
        return str(self._path)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> set[str]:
        """The names of all tensors, aliases included, scales of quantized tensors left out."""
        return {name for name in self._entries if not (name.endswith(SCALE) and name[: -len(SCALE)] in self._entries)}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`; `()` for a scalar."""
        return self._entry(name).shape

    def same(self, name: str, other: str) -> bool:
        """Whether two names stand for the same bytes of the file."""
        return self._entry(name) == self._entry(other)

    def scalar(self, name: str) -> int | float | None:
        """The value of scalar `name`, None if the file has none."""
        if name not in self._entries:
            return None
        if self.shape(name) != ():
            raise self._error(f"{name} should be a scalar, its shape is {list(self.shape(name))}")
        return self._raw(name).item()

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Tensor `name` as floating point `dtype`, quantized weights multiplied out. A copy: the caller's to keep."""
        raw = self._raw(name)
        if raw.dtype.is_floating_point:
            return raw.to(dtype)
        if name + SCALE not in self._entries:
            raise self._error(f"{name} is {_name(raw.dtype)} but the file holds no {name}{SCALE}")
        scale = self._raw(name + SCALE).float()
        if scale.shape not in ((), raw.shape[:1]):
            raise self._error(f"{name} {list(raw.shape)} has scales of shape {list(scale.shape)}")
        if not (torch.isfinite(scale) & (scale != 0)).all():
            raise self._error(f"{name}{SCALE} holds a scale that is zero or not finite")
        return (raw.float() / scale.view(-1, *[1] * (raw.ndim - 1))).to(dtype)

    def _raw(self, name: str) -> torch.Tensor:
        dtype, shape, offset = entry = self._entry(name)
        size = entry.nbytes
        # A copy, because the file aligns nothing.
        return torch.frombuffer(bytearray(memoryview(self._data)[offset : offset + size]), dtype=dtype).view(shape)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise self._error(f"no tensor {name}")
        return self._entries[name]

    def _read_header(self) -> None:
        version = self._int("I", "version")
        if version != BINARY_VERSION:
            raise self._error(f"file version {version} is not known, only CTranslate2's {BINARY_VERSION} is")
        spec = self._string("model kind")
        if spec != SPEC:
            raise self._error(f"holds a {spec!r}, not a Whisper model")
        revision = self._int("I", "revision")
        if revision != SPEC_REVISION:
            raise self._error(f"revision {revision} of {SPEC} is not known, only {SPEC_REVISION} is")

    def _read_entries(self) -> None:
        for index in range(self._count("number of tensors")):
            name = self._string(f"name of tensor {index}")
            rank = self._int("B", f"rank of {name}")
            if rank > MAX_RANK:
                raise self._error(f"{name} has {rank} dims, at most {MAX_RANK} are known")
            shape = tuple(self._int("I", f"shape of {name}") for _ in range(rank))
            type_id = self._int("B", f"type of {name}")
            if type_id >= len(DTYPES):
                raise self._error(f"{name} has tensor type {type_id}, which is not known")
            dtype = DTYPES[type_id]
            size = self._int("I", f"size of {name}")
            if size == 0 or size != _product(shape) * dtype.itemsize:
                raise self._error(f"{name} of shape {list(shape)} in {_name(dtype)} cannot have {size} bytes")
            self._add(name, _Entry(dtype, shape, self._take(size, f"data of {name}")))

    def _read_aliases(self) -> None:
        aliased = 0
        for index in range(self._count("number of aliases")):
            alias = self._string(f"alias {index}")
            name = self._string(f"target of alias {alias}")
            self._add(alias, self._entry(name))
            # Each is read as a tensor of its own: a small file must not stand for a model of any size.
            aliased += self._entry(name).nbytes
            if aliased > len(self._data):
                raise self._error(f"aliases up to {alias} stand for more bytes than the file has")
            # The format names only the weight, its scales go with it.
            if name + SCALE in self._entries:
                self._add(alias + SCALE, self._entry(name + SCALE))

    def _add(self, name: str, entry: _Entry) -> None:
        if name in self._entries:
            raise self._error(f"{name} appears twice")
        self._entries[name] = entry

    def _take(self, size: int, what: str) -> int:
        """Moves past `size` bytes and returns the offset of the first."""
        start = self._offset
        if size > len(self._data) - start:
            raise self._error(f"truncated: {what} needs {size} bytes at {start}, the file has {len(self._data)}")
        self._offset += size
        return start

    def _count(self, what: str) -> int:
        count = self._int("I", what)
        if count > MAX_COUNT:
            raise self._error(f"{what} is {count}, at most {MAX_COUNT} can be right")
        return count

    def _int(self, code: str, what: str) -> int:
        code = "<" + code
        return struct.unpack_from(code, self._data, self._take(struct.calcsize(code), what))[0]

    def _string(self, what: str) -> str:
        size = self._int("H", what)
        start = self._take(size, what)
        text = self._data[start : start + size].decode("ascii", errors="replace")
        # Printable, because the names end up in one-line messages.
        if not text.endswith("\0") or not text[:-1].isascii() or not text[:-1].isprintable():
            raise self._error(f"corrupt: {what} at {start} is no text")
        return text[:-1]

    def _error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self}: {message}")


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
