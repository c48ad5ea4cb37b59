"""What the kernels' tests share: shapes, tensors laid out in every way, poison around and inside them, the measure of error.

Every tensor is a view in a larger buffer of canaries: NaNs that all differ. A kernel that reads one returns NaN, and one
that writes outside its place changes the buffer's bits, which `storage` compares whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from whisper_triton.kernels import _dispatch, _paced

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (32, 64, 80, 96, 128)
MAX_TOKENS = 16  # of a call that attends
MARGIN = 4096  # canaries before and after a tensor: more elements than a tile of new tokens has
INT_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
NAN_BITS = {torch.float16: 0x7E00, torch.bfloat16: 0x7FC0, torch.float32: 0x7FC00000, torch.float64: 0x7FF8 << 48}

needs_gluon = pytest.mark.skipif(not _paced.HAS_GLUON, reason="this Triton has no Gluon, as before 3.6")


class Shape(NamedTuple):
    """Sizes of a call: sequences, new tokens, heads, head dim, slots, and slots that hold keys once the new ones are in."""

    B: int
    T: int
    H: int
    D: int
    S: int
    length: int

    def __str__(self) -> str:
        return "-".join(f"{name}{size}" for name, size in zip(self._fields, self, strict=True))

    @property
    def states(self) -> tuple[int, int, int, int]:
        return self.B, self.T, self.H, self.D

    @property
    def cache(self) -> tuple[int, int, int, int]:
        return self.B, self.H, self.S, self.D


# Whisper's heads (tiny 6, base 8, small 12, medium 16, large 20) and lengths around a tile's and a cache's end.
WHISPER_STEPS = (
    Shape(1, 1, 6, 64, 448, 1),
    Shape(3, 1, 8, 64, 448, 2),
    Shape(1, 1, 12, 64, 448, 63),
    Shape(1, 1, 16, 64, 448, 64),
    Shape(1, 1, 20, 64, 448, 65),
    Shape(8, 1, 2, 64, 448, 20),
    Shape(1, 1, 6, 64, 448, 447),
    Shape(1, 1, 8, 64, 448, 448),
)
WHISPER_PROMPTS = (
    Shape(1, 2, 6, 64, 448, 2),
    Shape(3, 4, 2, 64, 448, 64),
    Shape(1, 5, 8, 64, 448, 65),
    Shape(8, 3, 2, 64, 448, 3),
    Shape(1, 16, 2, 64, 448, 448),
)
OTHER_HEAD_DIMS = tuple(Shape(2, T, 2, D, 100, 70) for D in HEAD_DIMS if D != 64 for T in (1, 7))
CALLS = WHISPER_STEPS + WHISPER_PROMPTS + OTHER_HEAD_DIMS
# The cross cache: 1500 frames and no mask.
CROSS_CALLS = (Shape(1, 1, 3, 64, 1500, 1500), Shape(1, 3, 2, 64, 1500, 1500))
LARGE_CALLS = (
    Shape(1, 1, 20, 64, 448, 448),
    Shape(8, 1, 20, 64, 448, 447),
    Shape(64, 1, 20, 64, 448, 200),
    Shape(8, 1, 20, 128, 448, 300),
    Shape(1, 16, 20, 64, 448, 448),
    Shape(8, 4, 20, 64, 448, 65),
    Shape(8, 16, 20, 80, 448, 448),
)
LARGE_CROSS_CALLS = tuple(Shape(B, T, 20, 64, 1500, 1500) for B in (1, 3, 8, 32, 64) for T in (1, 4))


def gpu_marks(dtype: torch.dtype, T: int) -> list[pytest.MarkDecorator]:
    """bfloat16 with more than one token needs a GPU: `tl.dot` of two bfloat16 tiles is wrong in Triton's interpreter."""
    return [pytest.mark.gpu] if dtype == torch.bfloat16 and T > 1 else []


def in_every_dtype(*shapes: Shape) -> list:
    """Parameters (shape, dtype)."""
    return [
        pytest.param(shape, dtype, id=f"{shape}-{dtype_name(dtype)}", marks=gpu_marks(dtype, shape.T))
        for shape in shapes
        for dtype in DTYPES
    ]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- tensors


def canaries(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A buffer of NaNs with different bits: where one lies shows, and so does a NaN that was copied from elsewhere."""
    bits = torch.arange(math.prod(shape), device=device) % 61 + NAN_BITS[dtype]
    return bits.to(INT_OF_SIZE[dtype.itemsize]).view(dtype).view(shape)


def _contiguous(a: int, b: int, c: int, d: int, **options) -> torch.Tensor:
    return canaries(a * b * c * d + 2 * MARGIN, **options)[MARGIN:-MARGIN].view(a, b, c, d)


def _swapped(a: int, b: int, c: int, d: int, **options) -> torch.Tensor:
    return canaries(a, c, b, d, **options).transpose(1, 2)


def _fused(a: int, b: int, c: int, d: int, **options) -> torch.Tensor:
    return canaries(a, b, 3, c, d, **options)[:, :, 1]


def _sliced(a: int, b: int, c: int, d: int, **options) -> torch.Tensor:
    return canaries(a + 1, b + 2, c + 3, d + 5, **options)[1:, 1:-1, 2:-1, 3:-2]


# Views of (B, T, H, D) states or (B, H, S, D) caches whose surroundings are canaries.
LAYOUTS: dict[str, Callable[..., torch.Tensor]] = {
    "contiguous": _contiguous,
    "swapped": _swapped,  # states stored (B, H, T, D), caches (B, S, H, D)
    "fused": _fused,  # the second of three tensors that one projection computed
    "sliced": _sliced,  # odd strides, and a first element at no multiple of 16 bytes
}


def lay_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """A copy of the 4-d `values` in that layout."""
    return LAYOUTS[layout](*values.shape, dtype=values.dtype, device=values.device).copy_(values)


def random_states(shape: Shape, dtype: torch.dtype, device: torch.device, count: int) -> list[torch.Tensor]:
    """`count` tensors (B, T, H, D), each one of three that a fused projection computed."""
    return [lay_out(torch.randn(shape.states, dtype=dtype, device=device), "fused") for _ in range(count)]


def random_caches(shape: Shape, dtype: torch.dtype, device: torch.device, lengths: list[int]) -> list[torch.Tensor]:
    """A key and a value cache (B, H, S, D) whose slots from lengths[b] on hold canaries."""
    caches = [LAYOUTS["contiguous"](*shape.cache, dtype=dtype, device=device) for _ in range(2)]
    for cache in caches:
        for row, length in zip(cache, lengths, strict=True):
            row[:, :length] = torch.randn(shape.H, length, shape.D, dtype=dtype, device=device)
    return caches


def storage(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the bits of the whole buffer that `tensor` is a view of."""
    bits = torch.empty(0, dtype=INT_OF_SIZE[tensor.dtype.itemsize], device=tensor.device)
    return bits.set_(tensor.untyped_storage()).clone()


def twin(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole buffer that `tensor` is a view of, seen through the same view."""
    copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return copy.set_(tensor.untyped_storage().clone(), tensor.storage_offset(), tensor.shape, tensor.stride())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements as integers: what `torch.equal` compares bit for bit, NaN too."""
    return tensor.contiguous().view(INT_OF_SIZE[tensor.dtype.itemsize])


def needles(slots: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(slots, head_dim) keys of +-1, no two alike: a query of 64 times one of them attends to it alone.

    Any other key scores at least 128 less, and exp(-128) is 0 in fp32: the result is the one value, bit for bit.
    """
    binary = torch.arange(slots)[:, None] >> torch.arange(head_dim) % 16 & 1
    return (2 * binary - 1).to(device, dtype)


# --- where kernels write


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Every tensor allocated inside starts as NaN, so that an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which is when `fill_uninitialized_memory` applies
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


ALLOCATIONS = (torch.ops.aten.new_empty.default, torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default)


class GuardedAllocations(TorchDispatchMode):
    """Every tensor allocated inside is the contiguous middle of a buffer of canaries, which must be whole at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensor = func(*args, **kwargs or {})
        if func not in ALLOCATIONS or not tensor.numel():
            return tensor
        buffer = canaries(tensor.numel() + 2 * MARGIN, dtype=tensor.dtype, device=tensor.device)
        self.buffers.append((buffer, storage(buffer)))
        return buffer[MARGIN:-MARGIN].view(tensor.shape)

    def check(self) -> None:
        """All elements between the margins were written, and the margins were not."""
        assert self.buffers
        for buffer, before in self.buffers:
            margins = torch.ones_like(before, dtype=torch.bool)
            margins[MARGIN:-MARGIN] = False
            assert torch.equal(storage(buffer)[margins], before[margins])
            assert not (storage(buffer) == before)[~margins].any()


# --- the measure of error


def sdpa(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    lengths: list[int],
    *,
    scale: float,
    is_causal: bool = True,
) -> torch.Tensor:
    """PyTorch's SDPA of each sequence over its own valid keys: the yardstick, in the dtype that it is given."""
    T = query.shape[1]
    rows = []
    for b, length in enumerate(lengths):
        # Copies: some of PyTorch's kernels fault on a first element that does not lie at a multiple of 16 bytes.
        q, k, v = (
            tensor.clone(memory_format=torch.contiguous_format)
            for tensor in (
                query[b : b + 1].transpose(1, 2),
                key_cache[b : b + 1, :, :length],
                value_cache[b : b + 1, :, :length],
            )
        )
        mask = torch.ones(T, length, dtype=torch.bool, device=query.device).tril(length - T) if is_causal and T > 1 else None
        rows.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2))
    return torch.cat(rows)


def relative_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """In the Frobenius norm, of zeros the error itself; NaN if the result holds one."""
    norm = exact.norm()
    return ((result.double() - exact).norm() / norm.where(norm > 0, 1.0)).item()


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The best a kernel can return in `dtype`."""
    if _dispatch.INTERPRET and dtype == torch.bfloat16:  # the interpreter drops the low bits, where a GPU rounds to nearest
        return (exact.float().view(torch.int32) & -(1 << 16)).view(torch.float32)
    return exact.to(dtype)


def assert_close_as_pytorch(result: torch.Tensor, exact: torch.Tensor, pytorch: torch.Tensor, factor: float = 2) -> None:
    """The result's error against the float64 `exact` is at most `factor` times that of PyTorch in the same dtype."""
    assert result.dtype == pytorch.dtype
    assert result.shape == pytorch.shape
    yardstick = max(relative_error(pytorch, exact), relative_error(rounded(exact, result.dtype), exact))
    error = relative_error(result, exact)
    assert error <= factor * yardstick, f"error {error:.3g}, PyTorch's {yardstick:.3g}"


def gpu_factor(dtype: torch.dtype) -> float:
    """The bound on a GPU: what is rounded to 16 bits is at most what flash attention rounds; in fp32 only sums differ."""
    return 2 if dtype == torch.float32 else 1.25


# --- arguments that must be refused

Changes = dict[str, Callable[[torch.Tensor], object]]
EVERY_TENSOR = ("query", "key", "value", "key_cache", "value_cache")


class BadInput(NamedTuple):
    """Changes of good arguments, and what the error must say of the offending value."""

    name: str
    changes: Changes
    message: str


def _undense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_zeros(*tensor.shape, 2)[..., 0]


# Of calls with B=2, T=2, H=3, D=32 and S=8 in fp32.
BAD_CACHES = (
    BadInput("integers", dict.fromkeys(EVERY_TENSOR, torch.Tensor.int), r"dtype must be one of .*, got torch\.int32"),
    BadInput("float64", dict.fromkeys(EVERY_TENSOR, torch.Tensor.double), r"dtype must be one of .*, got torch\.float64"),
    BadInput("one in fp16", {"value_cache": torch.Tensor.half}, r"value_cache is torch\.float16 .* expected torch\.float32"),
    BadInput("another device", {"key_cache": lambda t: t.to("meta")}, r"key_cache is .* on meta"),
    BadInput("three dimensions", {"key_cache": lambda t: t[0]}, r"key_cache must have 4 dimensions, got shape \(3, 8, 32\)"),
    BadInput("cache not dense", {"value_cache": _undense}, r"value_cache must be dense .* got strides \(1536, 512, 64, 2\)"),
    BadInput("unequal caches", {"value_cache": lambda t: t[:, :, 1:]}, r"\(2, 3, 8, 32\) and .* \(2, 3, 7, 32\) differ"),
    *(
        BadInput(f"another {what}", {"key_cache": change, "value_cache": change}, rf"caches \({sizes}\) .* \(2, 2, 3, 32\)")
        for what, change, sizes in (
            ("batch", lambda t: t[:1], "1, 3, 8, 32"),
            ("head count", lambda t: t[:, :2], "2, 2, 8, 32"),
            ("head dim", lambda t: t[..., :16], "2, 3, 8, 16"),
        )
    ),
    BadInput("no slots", dict.fromkeys(("key_cache", "value_cache"), lambda t: t[:, :, :0]), r"empty .*\(2, 3, 0, 32\)"),
    BadInput("no tokens", dict.fromkeys(("query", "key", "value"), lambda t: t[:, :0]), r"empty .*\(2, 0, 3, 32\)"),
)
BAD_ATTENTION = (
    BadInput("query not dense", {"query": _undense}, r"query must be dense .* got strides \(384, 192, 64, 2\)"),
    BadInput(
        "too many tokens",
        dict.fromkeys(("query", "key", "value"), lambda t: t.repeat(1, 9, 1, 1)),
        rf"at most {MAX_TOKENS} query tokens, got 18",
    ),
    BadInput("an odd head dim", dict.fromkeys(EVERY_TENSOR, lambda t: t[..., :24]), r"head dim must be one of .*, got 24"),
)


def bad_positions(name: str) -> tuple[BadInput, ...]:
    """For the argument `name`, which tells a slot per sequence."""
    return (
        BadInput("a Python int", {name: lambda t: 3}, rf"{name} must be a tensor on the device, got int 3"),
        BadInput("a float position", {name: torch.Tensor.float}, rf"{name} must be int64 or int32, got torch\.float32"),
        BadInput("three positions", {name: lambda t: t.new_zeros(3)}, rf"{name} must be .* \(2,\), got shape \(3,\)"),
        BadInput("a matrix", {name: lambda t: t.new_zeros(2, 1)}, rf"{name} must be .* \(2,\), got shape \(2, 1\)"),
        BadInput("a position elsewhere", {name: lambda t: t.to("meta")}, rf"{name} must be on .*, got meta"),
    )


def assert_refused(op: Callable[..., object], arguments: dict[str, torch.Tensor], bad: BadInput, **options: float) -> None:
    """The op raises and says why, and every tensor it was given is as before."""
    before = {name: storage(tensor) for name, tensor in arguments.items()}
    changed = {name: bad.changes[name](tensor) if name in bad.changes else tensor for name, tensor in arguments.items()}
    with pytest.raises(ValueError, match=bad.message):
        op(**changed, **options)
    for name, tensor in arguments.items():
        assert torch.equal(storage(tensor), before[name]), name


# --- hypothesis

layouts = st.sampled_from(sorted(LAYOUTS))


@st.composite
def small_shapes(draw: st.DrawFn, max_tokens: int = MAX_TOKENS) -> Shape:
    """Few slots and heads: an example takes the interpreter a fraction of a second."""
    T = draw(st.integers(1, max_tokens))
    S = draw(st.integers(T, 48))
    return Shape(draw(st.integers(1, 3)), T, draw(st.integers(1, 3)), draw(st.sampled_from(HEAD_DIMS)), S, S)


def small_dtypes(T: int) -> st.SearchStrategy[torch.dtype]:
    """The dtypes that T tokens can have where the suite runs."""
    return st.sampled_from([dtype for dtype in DTYPES if not (_dispatch.INTERPRET and gpu_marks(dtype, T))])


# --- a GPU's own ways


def captured(step: Callable[[], torch.Tensor | None]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor | None]:
    """A CUDA graph of `step` and what it returns; the step runs once before, which compiles its kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


def assert_chain_waits(
    x: torch.Tensor, chain: Callable[[Callable[[], None]], tuple[torch.Tensor, ...]], times: int = 300
) -> None:
    """Replays of a captured `chain` give, bit for bit, what its launches do one at a time, whatever is in `x`, which it reads.

    Args:
        chain: launches kernels that each read what those before wrote, calls what it is given after each, and returns results.
    """
    graph, results = captured(lambda: chain(lambda: None))
    for values in torch.randn(times, *x.shape, device=x.device).to(x.dtype):
        x.copy_(values)
        graph.replay()
        replayed = [result.clone() for result in results]
        for ours, alone in zip(replayed, chain(torch.cuda.synchronize), strict=True):
            assert torch.equal(bits(ours), bits(alone))


def on_two_streams(launches: tuple[Callable[[], None], Callable[[], None]], times: int) -> None:
    """Both `launches`, over and over, each on a stream of its own."""
    streams = [torch.cuda.Stream() for _ in launches]
    torch.cuda.synchronize()
    for _ in range(times):
        for stream, launch in zip(streams, launches, strict=True):
            with torch.cuda.stream(stream):
                launch()
    torch.cuda.synchronize()
