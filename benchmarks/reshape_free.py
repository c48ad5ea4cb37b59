"""What eager attention gains in Whisper's decoder where heads stay a dimension of their own, over folding them into the batch.

    python benchmarks/reshape_free.py --model large-v3,tiny --batch 1,8

`reshaping`, the older form: query, keys and values as (B*H, tokens, D), two `bmm`, the weights viewed as (B, H, T, S) for the
mask and back, the result viewed, transposed and copied. `reshape_free`, the newer: two `matmul` on (B, H, tokens, D). Equal for
both: projections (B, T, H, D) and static caches (B, H, S, D) come in, the query already scaled, the same additive mask over all
slots of the self cache, none over the cross cache; (B, T, H*D) as `out_proj` reads it goes out; no cache is written.

Parts: one call over the self cache (448 slots) or the cross cache (1500 frames), buffers rotated past the L2, for one token and
for a prompt of 4; and `stack`, both of them for each layer of the model, one call's result the next one's query, each layer
with its own caches (a small model's stay in the L2). How: `eager`, launched by the host, by the wall clock; `graph`, the same
launches in a CUDA graph, that is the GPU's share alone; `compiled`, by torch.compile: of one call the compiled kernels in a
CUDA graph, of a stack `reduce-overhead`, host included, for one token only (stock compiles no prompt). Microseconds a call, or
a whole stack. Each result is checked first: at most twice as far from float64 as that of stock's own eager attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace

import torch
from transformers.models.whisper.modeling_whisper import eager_attention_forward
from whisper_triton.benchmarks.harness import Place, Row, check
from whisper_triton.benchmarks.models import Shape, shapes_on
from whisper_triton.benchmarks.questions import compiled, keep_still, side_by_side
from whisper_triton.benchmarks.tasks import measure_named, parser_for

PROMPT = 4
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


def reshaping(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """query (B, T, H, D), caches (B, H, S, D), mask (1, 1, T, S) to (B, T, H*D). Copies query and result where T > 1."""
    B, T, H, D = query.shape
    S = keys.shape[2]
    folded = query.transpose(1, 2).contiguous().view(B * H, T, D)
    weights = torch.bmm(folded, keys.reshape(B * H, S, D).transpose(1, 2))
    if mask is not None:
        weights = (weights.view(B, H, T, S) + mask).view(B * H, T, S)
    out = torch.bmm(weights.softmax(dim=-1), values.reshape(B * H, S, D))
    return out.view(B, H, T, D).transpose(1, 2).reshape(B, T, H * D)


def reshape_free(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The same function of the same arguments."""
    weights = torch.matmul(query.transpose(1, 2), keys.transpose(2, 3))
    if mask is not None:
        weights = weights + mask
    return torch.matmul(weights.softmax(dim=-1), values).transpose(1, 2).flatten(2)


def stock(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """transformers' eager attention: the yardstick of rounding."""
    module = SimpleNamespace(training=False)
    return eager_attention_forward(module, query.transpose(1, 2), keys, values, mask, scaling=1.0)[0].flatten(2)


def exact(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """In float64, by another road: one einsum each."""
    query, keys, values = query.double(), keys.double(), values.double()
    weights = torch.einsum("bthd,bhsd->bhts", query, keys) + (0 if mask is None else mask.double())
    return torch.einsum("bhts,bhsd->bthd", weights.softmax(dim=-1), values).flatten(2)


def stack(
    attention: Attention, query: torch.Tensor, layers: Iterable[Sequence[torch.Tensor]], mask: torch.Tensor
) -> torch.Tensor:
    """Self- and cross-attention of every layer, the result of one the query of the next."""
    for keys, values, cross_keys, cross_values in layers:
        query = attention(query, keys, values, mask).view(query.shape)
        query = attention(query, cross_keys, cross_values, None).view(query.shape)
    return query


class Inputs:
    """Random states, caches and the mask of T tokens, the last of which fill the self cache to three quarters."""

    def __init__(self, place: Place, shape: Shape, B: int, T: int) -> None:
        self.place, self.shape, self.B = place, shape, B
        self.query = place.randn(B, T, shape.heads, shape.head_dim) * shape.head_dim**-0.5
        length = 3 * shape.slots // 4
        slots, positions = (torch.arange(*ends, device=place.device) for ends in ((shape.slots,), (length - T, length)))
        self.mask = torch.zeros(1, 1, T, shape.slots, device=place.device, dtype=place.dtype)
        self.mask.masked_fill_(slots > positions[:, None], torch.finfo(place.dtype).min)

    def caches(self, slots: int) -> list[torch.Tensor]:
        return [self.place.randn(self.B, self.shape.heads, slots, self.shape.head_dim) for _ in range(2)]


def bench_call(inputs: Inputs, part: str) -> list[Row]:
    """One attention call, by itself."""
    place, query, mask = inputs.place, inputs.query, inputs.mask if part == "self" else None
    caches = inputs.caches(inputs.shape.slots if part == "self" else inputs.shape.frames)
    right, yardstick = exact(query, *caches, mask), stock(query, *caches, mask)
    rotated = place.clones(caches)

    def calls(attention: Attention, name: str) -> list[Callable[[], torch.Tensor]]:
        check(name, attention(query, *caches, mask), right, yardstick)
        return [lambda c=c: attention(query, *c, mask) for c in rotated]

    times: dict[str, list[tuple[float, float]]] = {}
    for attention in (reshaping, reshape_free):
        eager = calls(attention, attention.__name__)
        times.setdefault("eager", []).append(place.time(eager))
        if place.is_gpu:
            times.setdefault("graph", []).append(place.measure(eager))
        traced = calls(compiled(attention, place, mode="default"), f"{attention.__name__}, compiled")
        times.setdefault("compiled", []).append(place.measure(traced))
    return rows_of(part, 1, times)


def bench_stack(inputs: Inputs) -> list[Row]:
    """All attention calls of a step or of a prompt."""
    place, shape, query, mask = inputs.place, inputs.shape, inputs.query, inputs.mask
    layers = [(*inputs.caches(shape.slots), *inputs.caches(shape.frames)) for _ in range(shape.decoder_layers)]
    keep_still(query, mask, *(tensor for layer in layers for tensor in layer))
    right, yardstick = stack(exact, query.double(), layers, mask), stack(stock, query, layers, mask)
    times: dict[str, list[tuple[float, float]]] = {}
    for attention in (reshaping, reshape_free):

        def run(attention: Attention = attention) -> torch.Tensor:
            return stack(attention, query, layers, mask)

        check(f"stack of {attention.__name__}", run(), right, yardstick)
        times.setdefault("eager", []).append(place.time([run] * 4))
        if place.is_gpu:
            times.setdefault("graph", []).append(place.measure([run]))
        if query.shape[1] == 1:
            traced = compiled(run, place)
            check(f"stack of {attention.__name__}, compiled", traced(), right, yardstick)
            times.setdefault("compiled", []).append(place.time([traced] * 4))
    return rows_of("stack", shape.decoder_layers, times)


def rows_of(part: str, layers: int, times: dict[str, list[tuple[float, float]]]) -> list[Row]:
    return [
        {"part": part, "layers": layers, "how": how} | side_by_side(reshaping=older, reshape_free=newer)
        for how, (older, newer) in times.items()
    ]


def bench(place: Place, shape: Shape, B: int) -> list[Row]:
    rows = []
    for T in (1, PROMPT):
        inputs = Inputs(place, shape, B, T)
        found = [*bench_call(inputs, "self"), *bench_call(inputs, "cross"), *bench_stack(inputs)]
        rows += [{"benchmark": "reshape_free", "B": B, "T": T} | row for row in found]
    return rows


def main() -> None:
    args = parser_for(__doc__, model="large-v3,tiny").parse_args()
    measure_named(args, "reshape_free", {"reshape_free": bench}, shapes_on)


if __name__ == "__main__":
    main()
