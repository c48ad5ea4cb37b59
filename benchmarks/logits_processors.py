"""Stock's logits processors as they are, compiled, and as our two launches: is compiling them the next step?

    python benchmarks/logits_processors.py --batch 1,8

Greedy search with Whisper's rules, with and without timestamps, over fp16 logits of large-v3's vocabulary. `processors`: the
list alone, from logits to the scores of the allowed tokens. `choice`: all that stands between two forward passes: the list,
argmax, the stopping criteria, and the host's wait for the flag that ends the loop. Only a choice can be compared with ours,
which makes no scores and has the host look every few tokens. Equal for all: the logits (in the L2, as they come from the LM
head), rules and tokens.

How: `stock`, launched by the host; `compiled`, reduce-overhead, whole where it can be, the number of tokens fixed; `growing,
... pass`, compiled, choices as `generate` has them, each with one token more before it: in the first pass they are compiled, in
the second recorded, in the third replayed (the first batch only; the spread is half the range); `ours`, launched by the host;
`ours, graph`, as `accelerate` runs it. Microseconds a token, by the wall clock but for the graph. `is_whole`: whether
torch.compile takes it in one graph, and if not `why`, the line that it cannot take; `graphs`: how many it has compiled by then.
All results are checked first, for equality with stock's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._dynamo.utils import counters
from whisper_triton.benchmarks.harness import Place, Row, time_calls
from whisper_triton.benchmarks.models import Shape, shapes_on
from whisper_triton.benchmarks.questions import PASSES, compiled
from whisper_triton.benchmarks.select_token import CALLS, PROMPT, Stock, count_launches, processors_for, selection_for
from whisper_triton.benchmarks.tasks import measure_named, parser_for

Call = Callable[[torch.Tensor], torch.Tensor]


def check(name: str, out: torch.Tensor, stock: torch.Tensor) -> None:
    """Refuses another result than stock's."""
    if not torch.equal(out, stock):
        raise SystemExit(f"{name} is wrong: not what stock chooses")


def row(what: str, how: str, time: tuple[float, float], launches: int | None = None, **traced: object) -> Row:
    columns = {"what": what, "how": how, "us": time[0], "spread_us": time[1], "over_ours": None, "launches": launches}
    return columns | {name: traced.get(name) for name in ("is_whole", "why", "graphs")}


class Bench:
    """One batch with one set of rules."""

    def __init__(self, place: Place, shape: Shape, B: int, timestamps: bool) -> None:
        self.place = place
        self.processors = processors_for(shape, timestamps, place.device)
        self.stock = Stock(B, self.processors, place.device)
        self.selection, self.settings = selection_for(shape, B, self.processors, place.device)
        self.logits = [place.randn(B, shape.vocabulary, scale=3) for _ in range(CALLS if place.is_gpu else 2)]
        if not place.is_gpu:
            self.stock.ids = self.stock.ids[:, : PROMPT + 1].contiguous()

    def alone(self, logits: torch.Tensor) -> torch.Tensor:
        return self.processors(self.stock.ids, logits.float())

    def choice(self, logits: torch.Tensor) -> torch.Tensor:
        return self.stock(logits)

    def launches(self, call: Callable[[], object]) -> int | None:
        return count_launches(call) if self.place.is_gpu else None

    def rows(self, has_choice: bool, grows: bool) -> list[Row]:
        """Of stock's choice only if it `has_choice`."""
        choice = self.of_stock("choice", self.choice, grows) if has_choice else []
        found = [*self.of_stock("processors", self.alone, False), *choice, *self.of_ours()]
        ours = found[-1]["us"]
        return [row | ({"over_ours": row["us"] / ours} if row["what"] == "choice" else {}) for row in found]

    def of_stock(self, what: str, call: Call, grows: bool) -> list[Row]:
        """`call` as it is and compiled."""
        expected = [call(one).clone() for one in self.logits]
        counters.clear()
        traced, why = compiled(call, self.place), None
        try:
            traced(self.logits[0])
        except torch._dynamo.exc.TorchDynamoException as error:  # it cannot be taken whole
            stack = getattr(error, "real_stack", None)
            traced, why = compiled(call, self.place, fullgraph=False), stack[-1].line if stack else str(error).splitlines()[0]
            counters.clear()

        def run(function: Call, logits: torch.Tensor) -> torch.Tensor:
            out = function(logits)
            if what == "choice":
                bool(self.stock.finished)
            return out

        def time_all(function: Call) -> tuple[float, float]:
            return self.place.time([lambda one=one: run(function, one) for one in self.logits])

        def seen() -> Row:
            return {"is_whole": why is None, "why": why, "graphs": counters["stats"]["unique_graphs"]}

        for one, right in zip(self.logits, expected, strict=True):
            check(f"{what}, compiled", traced(one), right)
        rows = [row(what, "stock", time_all(call), self.launches(lambda: call(self.logits[0])))]
        rows.append(row(what, "compiled", time_all(traced), **seen()))
        for which in PASSES if grows else ():
            rows.append(row(what, f"growing, {which} pass", self.grow(lambda one: run(traced, one)), **seen()))
        return rows

    def grow(self, call: Call) -> tuple[float, float]:
        """(mean, half the range) in microseconds of a token, over rows that grow from the prompt on."""
        whole, times = self.stock.ids, []
        for length in range(PROMPT, whole.shape[1]):
            self.stock.ids, one, chosen = whole[:, :length].contiguous(), self.logits[length % len(self.logits)], []
            times.append(time_calls([lambda one=one, chosen=chosen: chosen.append(call(one))], rounds=1, warm_up=0)[0])
            check(f"a choice after {length} tokens, compiled", chosen[0], self.stock(one))
        self.stock.ids = whole
        return sum(times) / len(times), (max(times) - min(times)) / 2

    def of_ours(self) -> list[Row]:
        for one in self.logits:
            self.selection.begin(self.stock.ids, self.settings, None)
            self.selection(one)
            check("ours", self.selection.state.next_ids[:, 0], self.stock(one))
        self.selection.begin(self.stock.ids, self.settings, None)
        calls = [lambda one=one: self.selection(one) for one in self.logits]
        rows = [row("choice", "ours", self.place.time(calls), self.launches(calls[0]))]
        return [*rows, row("choice", "ours, graph", self.place.measure(calls))] if self.place.is_gpu else rows


def bench(place: Place, shape: Shape, B: int, *, grows: bool = True) -> list[Row]:
    rows = []
    for timestamps in (False, True):
        # Where it only shows that it runs, a choice by one set of rules will do: tracing takes long.
        is_whole_run = place.is_gpu or not timestamps
        found = Bench(place, shape, B, timestamps).rows(is_whole_run, grows and is_whole_run)
        rows += [{"benchmark": "logits_processors", "B": B, "timestamps": timestamps} | row for row in found]
    return rows


def main() -> None:
    args = parser_for(__doc__, model="large-v3").parse_args()
    first = args.batch[0]
    benches = {"logits_processors": lambda place, shape, B: bench(place, shape, B, grows=first == B)}
    measure_named(args, "logits_processors", benches, shapes_on)


if __name__ == "__main__":
    main()
