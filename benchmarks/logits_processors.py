"""Stock's logits processors as they are, compiled, and as our two launches: is compiling them the next step?

    python benchmarks/logits_processors.py --batch 1,8

Greedy search with Whisper's rules, with and without timestamps, over 51,866 fp16 logits. `processors`: the list alone, from
logits to the scores of the allowed tokens. `choice`: all that stands between two forward passes: the list, argmax, the stopping
criteria, and the host's wait for the flag that ends the loop. Only a choice can be compared with ours, which makes no scores
and has the host look every few tokens. Equal for all: the logits (in the L2, as they come from the LM head), rules and tokens.

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
from harness import measure, time_calls
from questions import PASSES, compiled, parse_question, parser_for, report
from select_token import CALLS, PROMPT, Stock, V, count_launches, processors_for, selection_for
from torch._dynamo.utils import counters

Call = Callable[[torch.Tensor], torch.Tensor]


def check(name: str, out: torch.Tensor, stock: torch.Tensor) -> None:
    """Refuses another result than stock's."""
    if not torch.equal(out, stock):
        raise SystemExit(f"{name} is wrong: not what stock chooses")


def row(what: str, how: str, time: tuple[float, float], launches: int | None = None, **traced: object) -> dict[str, object]:
    columns = {"what": what, "how": how, "us": time[0], "spread_us": time[1], "over_ours": None, "launches": launches}
    return columns | {name: traced.get(name) for name in ("is_whole", "why", "graphs")}


class Bench:
    """One batch with one set of rules."""

    def __init__(self, B: int, timestamps: bool, device: str) -> None:
        self.device = device
        self.processors = processors_for(timestamps, device)
        self.stock = Stock(B, self.processors, device)
        self.selection, self.settings = selection_for(B, self.processors, device)
        dtype, calls = (torch.float16, CALLS) if device == "cuda" else (torch.float32, 2)
        self.logits = [torch.randn(B, V, device=device).mul_(3).to(dtype) for _ in range(calls)]
        if device == "cpu":
            self.stock.ids = self.stock.ids[:, : PROMPT + 2].contiguous()

    def alone(self, logits: torch.Tensor) -> torch.Tensor:
        return self.processors(self.stock.ids, logits.float())

    def choice(self, logits: torch.Tensor) -> torch.Tensor:
        return self.stock(logits)

    def launches(self, call: Callable[[], object]) -> int | None:
        return count_launches(call) if self.device == "cuda" else None

    def rows(self, grows: bool) -> list[dict[str, object]]:
        found = [*self.of_stock("processors", self.alone, False), *self.of_stock("choice", self.choice, grows), *self.of_ours()]
        ours = found[-1]["us"]
        return [row | ({"over_ours": row["us"] / ours} if row["what"] == "choice" else {}) for row in found]

    def of_stock(self, what: str, call: Call, grows: bool) -> list[dict[str, object]]:
        """`call` as it is and compiled."""
        expected = [call(one).clone() for one in self.logits]
        counters.clear()
        traced, why = compiled(call, self.device), None
        try:
            traced(self.logits[0])
        except torch._dynamo.exc.TorchDynamoException as error:  # it cannot be taken whole
            stack = getattr(error, "real_stack", None)
            traced, why = compiled(call, self.device, fullgraph=False), stack[-1].line if stack else str(error).splitlines()[0]
            counters.clear()

        def run(function: Call, logits: torch.Tensor) -> torch.Tensor:
            out = function(logits)
            if what == "choice":
                bool(self.stock.finished)
            return out

        def time_all(function: Call) -> tuple[float, float]:
            return time_calls([lambda one=one: run(function, one) for one in self.logits])

        def seen() -> dict[str, object]:
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

    def of_ours(self) -> list[dict[str, object]]:
        for one in self.logits:
            self.selection.begin(self.stock.ids, self.settings, None)
            self.selection(one)
            check("ours", self.selection.state.next_ids[:, 0], self.stock(one))
        self.selection.begin(self.stock.ids, self.settings, None)
        calls = [lambda one=one: self.selection(one) for one in self.logits]
        rows = [row("choice", "ours", time_calls(calls), self.launches(calls[0]))]
        return [*rows, row("choice", "ours, graph", measure(calls))] if self.device == "cuda" else rows


@torch.no_grad()
def main() -> None:
    args = parse_question(parser_for(__doc__))
    rows = []
    for timestamps in (False, True):
        for B in args.batches:
            # Where it only shows that it runs, one set of rules will do.
            grows = args.batches[0] == B and (args.device == "cuda" or not timestamps)
            rows += [{"B": B, "timestamps": timestamps} | row for row in Bench(B, timestamps, args.device).rows(grows)]
    report(args, rows, "logits_processors.jsonl")


if __name__ == "__main__":
    main()
