"""What PTX computes with the numbers of its registers, an array a register: see ptx.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

DTYPES = {"pred": np.dtype(bool), "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")} | {
    f"{letter}{8 * size}": np.dtype(f"{kind}{size}") for letter, kind in ("bu", "uu", "si") for size in (1, 2, 4, 8)
}


def literal(text: str, dtype: np.dtype) -> np.generic:
    """`text` as an instruction for `dtype` takes it; integers wrap."""
    if dtype.kind == "b":
        return np.bool_(int(text, 0) != 0)
    is_float = text[:2].lower() in ("0f", "0d")
    if dtype.kind == "f" and not is_float:
        raise ValueError(text)
    bits = int(text[2:], 16) if is_float else int(text, 0) & ((1 << 8 * dtype.itemsize) - 1)
    return np.array(bits, f"u{dtype.itemsize}").view(dtype)[()]


def widen(bits: np.ndarray, kind: str) -> np.ndarray:
    """fp32 of f16 or bf16, which come as uint16."""
    return bits.view(np.float16).astype(np.float32) if kind == "f16" else (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray, kind: str) -> np.ndarray:
    """f16 or bf16 of fp32, to nearest even, as uint16."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)


def extract(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe of 32 bits: as many bits from there on, with the last one's sign if `a` is signed; past the end is a's sign."""
    wide = a.astype(np.int64) >> np.minimum(position & 255, 63)
    unused = 64 - np.minimum(length & 255, 63).astype(np.int64)
    signed = np.where(unused == 64, 0, wide << np.minimum(unused, 63) >> np.minimum(unused, 63))
    is_signed = a.dtype.kind == "i"
    return (signed if is_signed else wide & (1 << np.minimum(length & 255, 62).astype(np.int64)) - 1).astype(a.dtype)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of integers towards zero. Threads that do not take part may hold a zero."""
    if a.dtype.kind == "f":
        return np.divide(a, b)
    return ((a - np.fmod(a, b)) // np.where(b == 0, 1, b)).astype(a.dtype)


FUNCTIONS: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mul.lo": np.multiply, "div": divide, "rem": np.fmod,
    "min": np.fmin, "max": np.fmax, "neg": np.negative, "abs": np.absolute,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "shl": np.left_shift, "shr": np.right_shift, "ex2": np.exp2, "rsqrt": lambda x: np.float32(1) / np.sqrt(x),
    "fma": fma, "bfe": extract, "selp": lambda a, b, p: np.where(p, a, b), "mad.lo": lambda a, b, c: a * b + c,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
OPPOSITE = {"neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt"}  # of comparisons that hold for a NaN too
SHUFFLES: dict[str, Callable] = {
    "bfly": lambda lane, b, keep: lane ^ b,
    "idx": lambda lane, b, keep: (lane & keep) | (b & ~keep),
    "up": lambda lane, b, keep: lane - b,
    "down": lambda lane, b, keep: lane + b,
}
