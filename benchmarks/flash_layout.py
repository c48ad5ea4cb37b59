"""What FlashAttention's layout costs a decode step with a static cache, against kernels that read the cache by its strides.

    python benchmarks/flash_layout.py --model large-v3 --batch 1,8

FlashAttention wants states and caches as (B, tokens, H, D); the static cache is (B, H, S, D). `flash` is PyTorch's own flash
kernel called that way, on transposed caches. It takes neither a mask nor a length from the device: over a static cache it reads
every slot, and is right only when the cache is full; or the host reads the length and hands over slices. Ours take strides and
a length on the device. Equal for all: shapes, caches, query, fp16, one new token. Three costs, each in rows of its own:

- `transposes`: attention alone, the cache full (self: 448 slots, cross: 1500 frames). `flash` reads transposed views; `flash,
  copies` gets `.transpose(1, 2).contiguous()` keys and values; `SDPA flash` is the same kernel behind
  scaled_dot_product_attention, which transposes within; `ours` is `decode_attention`.
- `unread slots`: the same by the length in use. `flash, slices` gets the slots in use, as if the host knew their number for
  nothing; over the whole static length it takes at any length what it takes at the longest.
- `launches`: write and attend in a stack of 8 layers (of fewer if the model has fewer), each with its caches (at batch 1 in the
  L2), a layer's query the result of the one before. `flash` writes with `index_copy_` and reads all slots, which are full;
  `flash, slices` has the host read the length once a step; `ours` is `append_attention`.

How: `graph`, in a CUDA graph, but for the stack over buffers rotated past the L2 (a graph of slices holds for one length only);
`eager`, launched by the host, by the wall clock; `compiled`, reduce-overhead, with its graph breaks; `compiled, ... pass`, as
the position advances like in `generate`: 16 lengths never seen before, again (they are recorded), and again (replayed); their
spread is half the range. Microseconds a call, or a whole stack. A result is checked before it is timed: at most twice as far
from float64 as SDPA's. Without a GPU SDPA stands in for flash.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from whisper_triton.benchmarks.harness import Place, Row, check, time_calls
from whisper_triton.benchmarks.models import Shape, shapes_on
from whisper_triton.benchmarks.questions import PASSES, compiled, keep_still
from whisper_triton.benchmarks.tasks import measure_named, parser_for

from whisper_triton.kernels import append_attention, append_attention_reference, decode_attention, decode_attention_reference

LAYERS, TOKENS = 8, 16
LENGTHS = (20, 100, 200, 448)
SCALE = 0.125
Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (B, 1, H, D), two (B, H, S, D) to (B, 1, H, D)
LIBRARY = torch.library.Library("whisper_triton_benchmarks", "FRAGMENT")


def _flash(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    sizes = (query.shape[1], keys.shape[1])
    return torch.ops.aten._flash_attention_forward(query, keys, values, None, None, *sizes, 0.0, False, False, scale=SCALE)[0]


def _stand_in(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    states = (x.transpose(1, 2) for x in (query, keys, values))
    return scaled_dot_product_attention(*states, scale=SCALE).transpose(1, 2).contiguous()


# An op, as the flash-attn package's function is one: torch.compile takes it whole and hands it the strides that eager would.
LIBRARY.define("flash(Tensor query, Tensor keys, Tensor values) -> Tensor", tags=torch.Tag.needs_exact_strides)
LIBRARY.impl("flash", _flash, "CUDA")
LIBRARY.impl("flash", _stand_in, "CPU")
torch.library.register_fake(
    "whisper_triton_benchmarks::flash", lambda query, keys, values: query.new_empty(query.shape), lib=LIBRARY
)
flash = torch.ops.whisper_triton_benchmarks.flash.default


def sdpa(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(query.transpose(1, 2), keys, values, scale=SCALE).transpose(1, 2)


def flash_views(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return flash(query, keys.transpose(1, 2), values.transpose(1, 2))


def flash_copies(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return flash(query, keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous())


def sdpa_flash(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if query.is_cuda else SDPBackend.MATH):
        return sdpa(query, keys, values)


def ours(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return decode_attention(query, keys, values, scale=SCALE)


WAYS = {"flash": flash_views, "flash, copies": flash_copies, "SDPA flash": sdpa_flash, "ours": ours}


class Inputs:
    """Random states of one token; caches on demand."""

    def __init__(self, place: Place, shape: Shape, B: int) -> None:
        self.place, self.shape, self.B = place, shape, B
        self.query, self.key, self.value = (place.randn(B, 1, shape.heads, shape.head_dim) for _ in range(3))

    def caches(self, slots: int) -> list[torch.Tensor]:
        return [self.place.randn(self.B, self.shape.heads, slots, self.shape.head_dim) for _ in range(2)]

    def time(self, ways: dict[str, Way], caches: list[torch.Tensor], touched: int | None = None) -> list[Row]:
        """A row a way, in a CUDA graph, over caches that rotate where a call touches `touched` bytes of them (all)."""
        rotated, how = self.place.clones(caches, touched), "graph" if self.place.is_gpu else "eager"
        times = {
            name: self.place.measure([lambda c=c, way=way: way(self.query, *c) for c in rotated]) for name, way in ways.items()
        }
        return [row(name, how, time, times["ours"]) for name, time in times.items()]


def row(way: str, how: str, time: tuple[float, float], ours: tuple[float, float]) -> Row:
    return {"way": way, "how": how, "us": time[0], "spread_us": time[1], "way/ours": time[0] / ours[0]}


def bench_transposes(inputs: Inputs, slots: int) -> list[Row]:
    """Attention over full caches of `slots` keys."""
    query, caches = inputs.query, inputs.caches(slots)
    exact = decode_attention_reference(query.double(), *(c.double() for c in caches), scale=SCALE)
    for name, way in WAYS.items():
        check(name, way(query, *caches), exact, sdpa(query, *caches))
    return inputs.time(WAYS, caches)


def bench_unread(inputs: Inputs, length: int) -> list[Row]:
    """Ours by a length on the device, and flash on slices of that length."""
    query, caches = inputs.query, inputs.caches(inputs.shape.slots)
    on_device = torch.tensor(length, device=inputs.place.device)
    ways = {
        "flash, slices": lambda query, keys, values: flash_views(query, keys[:, :, :length], values[:, :, :length]),
        "ours": lambda query, keys, values: decode_attention(query, keys, values, on_device, scale=SCALE),
    }
    exact = decode_attention_reference(query.double(), *(c.double() for c in caches), on_device, scale=SCALE)
    for name, way in ways.items():
        check(name, way(query, *caches), exact, sdpa(query, *(c[:, :, :length] for c in caches)))
    touched = 2 * inputs.B * inputs.shape.heads * length * inputs.shape.head_dim * query.element_size()
    return inputs.time(ways, caches, touched)


class Stack:
    """Write and attend, layer after layer, at `position` (0-dim, on the device)."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.query, self.key, self.value = inputs.query, inputs.key, inputs.value
        self.layers = [inputs.caches(inputs.shape.slots) for _ in range(min(LAYERS, inputs.shape.decoder_layers))]
        self.position = torch.tensor(inputs.shape.slots - 1, device=inputs.place.device)
        keep_still(self.query, self.key, self.value, self.position, *chain(*self.layers))

    def _written(self, keys: torch.Tensor, values: torch.Tensor, length: int | None) -> list[torch.Tensor]:
        slots = self.position.view(1)
        keys.index_copy_(2, slots, self.key.transpose(1, 2))
        values.index_copy_(2, slots, self.value.transpose(1, 2))
        return [cache if length is None else cache[:, :, :length] for cache in (keys, values)]

    def _through(self, attend: Way, length: int | None = None) -> torch.Tensor:
        query = self.query
        for layer in self.layers:
            query = attend(query, *self._written(*layer, length))
        return query

    def flash(self) -> torch.Tensor:
        return self._through(flash_views)

    def flash_slices(self, length: int | None = None) -> torch.Tensor:
        return self._through(flash_views, int(self.position) + 1 if length is None else length)

    def ours(self) -> torch.Tensor:
        query = self.query
        for layer in self.layers:
            query = append_attention(query, self.key, self.value, *layer, self.position, scale=SCALE)
        return query

    def check(self, name: str, way: Callable[[], torch.Tensor]) -> None:
        """Runs `way`, which must write what the slots at `position` lack."""
        length = int(self.position) + 1
        for cache in chain(*self.layers):
            cache[:, :, length - 1].fill_(torch.nan)
        out = way()
        stock, exact, key, value = self.query, self.query.double(), self.key.double(), self.value.double()
        for layer in self.layers:
            caches = [cache.double() for cache in layer]
            exact = append_attention_reference(exact, key, value, *caches, self.position, scale=SCALE)
            stock = sdpa(stock, *(cache[:, :, :length].to(stock.dtype) for cache in caches))
        check(name, out, exact, stock)


def bench_launches(inputs: Inputs) -> list[Row]:
    """A stack at the last position, where the cache is full, and from there back over the positions before it."""
    stack, place = Stack(inputs), inputs.place
    ways = {"flash": stack.flash, "flash, slices": stack.flash_slices, "ours": stack.ours}
    times: dict[str, dict[str, tuple[float, float]]] = {}
    breaks = {}
    for name, way in ways.items():
        stack.check(name, way)
        times.setdefault("eager", {})[name] = place.time([way] * 4)
        if place.is_gpu:
            # While it captures the host cannot read the length.
            fixed = partial(way, inputs.shape.slots) if name == "flash, slices" else way
            times.setdefault("graph", {})[name] = place.measure([fixed])
        breaks[name] = torch._dynamo.explain(way)().graph_break_count
        traced = compiled(way, place, fullgraph=breaks[name] == 0)
        stack.check(f"{name}, compiled", traced)
        times.setdefault("compiled", {})[name] = place.time([traced] * 4)
        if name != "flash":  # wrong before the cache is full
            for which in PASSES:
                times.setdefault(f"compiled, {which} pass", {})[name] = advance(stack, traced)
            stack.check(f"{name}, compiled, after {TOKENS} positions", traced)
    return [
        row(name, how, time, found["ours"]) | {"graph_breaks": breaks[name] if how.startswith("compiled") else None}
        for how, found in times.items()
        for name, time in found.items()
    ]


def advance(stack: Stack, step: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """(mean, half the range) in microseconds of a step over the TOKENS positions before the last, waiting after each."""
    last, times = stack.inputs.shape.slots - 1, []
    for position in range(last - TOKENS, last):
        stack.position.fill_(position)
        times.append(time_calls([step], rounds=1, warm_up=0)[0])
    stack.position.fill_(last)
    return sum(times) / TOKENS, (max(times) - min(times)) / 2


def bench(place: Place, shape: Shape, B: int) -> list[Row]:
    inputs, S = Inputs(place, shape, B), shape.slots
    found = [
        ("transposes", "self", S, bench_transposes(inputs, S)),
        ("transposes", "cross", shape.frames, bench_transposes(inputs, shape.frames)),
    ]
    found += [("unread slots", "self", n, bench_unread(inputs, n)) for n in sorted({min(n, S) for n in LENGTHS})]
    found += [("launches", "self", S, bench_launches(inputs))]
    facts = {"benchmark": "flash_layout", "B": B}
    return [facts | {"cost": cost, "part": part, "length": length} | row for cost, part, length, rows in found for row in rows]


def main() -> None:
    args = parser_for(__doc__, model="large-v3").parse_args()
    measure_named(args, "flash_layout", {"flash_layout": bench}, shapes_on)


if __name__ == "__main__":
    main()
