"""The choice of the next token: our two launches against what stock transformers does between two forward passes, by batch.

    python benchmarks/select_token.py

By default large-v3's vocabulary, fp16 logits, Whisper's rules with and without timestamps. Microseconds a token: ours in a CUDA
graph, logits as they come from the LM head, that is in the L2; stock's processors, argmax and stopping criteria eagerly, host
included, and in a graph where they can be captured, which nothing can that waits for the device (`stock_waits`); `compiled` is
our reference under torch.compile, which waits for nothing, in a graph. Checked first are greedy tokens against stock's, and
those of every block size and way to draw against the reference's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperTimeStampLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from whisper_triton.benchmarks.alternatives import time_alternatives
from whisper_triton.benchmarks.harness import Place, Row
from whisper_triton.benchmarks.models import Shape, shapes_on
from whisper_triton.benchmarks.tasks import measure_named, parser_for
from whisper_triton.kernels._rules import TokenRules, TokenState
from whisper_triton.kernels.select_token import BLOCK_V

from whisper_triton.decode_loop import TokenSelection
from whisper_triton.kernels import select_token, select_token_reference
from whisper_triton.token_rules import Settings, read_settings

EOS, TIMESTAMPS = 50257, 1501  # a timestamp every 0.02 s: the last tokens of every Whisper's vocabulary
PROMPT, LENGTH, CALLS = 4, 64, 16
BLOCKS = (512, 1024, 2048, 4096)
MOST_TURNED = 0.01  # of the draws: two keys of one may be closer than the last bit of a logarithm
Choose = Callable[[torch.Tensor, TokenRules, TokenState], None]


def processors_for(shape: Shape, timestamps: bool, device: torch.device) -> LogitsProcessorList:
    processors = [
        SuppressTokensAtBeginLogitsProcessor([220, EOS], PROMPT, device=device),
        SuppressTokensLogitsProcessor(list(range(1, 89)), device=device),
    ]
    if timestamps:
        no_timestamps = shape.vocabulary - TIMESTAMPS - 1
        config = GenerationConfig(eos_token_id=EOS, no_timestamps_token_id=no_timestamps, max_initial_timestamp_index=50)
        processors.append(WhisperTimeStampLogitsProcessor(config, PROMPT))
    return LogitsProcessorList(processors)


class Stock:
    """What `_sample` does with a step's logits, up to the flag that the host then waits for."""

    def __init__(self, B: int, processors: LogitsProcessorList, device: torch.device) -> None:
        self.processors = processors
        self.criteria = StoppingCriteriaList([MaxLengthCriteria(448), EosTokenCriteria(torch.tensor([EOS], device=device))])
        self.ids = torch.randint(100, 50000, (B, LENGTH), device=device)
        self.unfinished, self.pad = torch.ones(B, dtype=torch.int64, device=device), torch.tensor(EOS, device=device)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        scores = self.processors(self.ids, logits.to(copy=True, dtype=torch.float32))
        tokens = scores.argmax(-1) * self.unfinished + self.pad * (1 - self.unfinished)
        ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        self.finished = (self.unfinished & ~self.criteria(ids, None)).max() == 0
        return tokens


def selection_for(
    shape: Shape, B: int, processors: LogitsProcessorList, device: torch.device
) -> tuple[TokenSelection, Settings]:
    """Ours, by the same rules. Rows go on for as many calls as are made here, so that each reads its logits."""
    most = LENGTH + 1000 * CALLS
    criteria = StoppingCriteriaList([MaxLengthCriteria(most)])
    settings = read_settings(processors, criteria, GenerationConfig(do_sample=False), PROMPT, shape.vocabulary)
    return TokenSelection(B, most, shape.vocabulary, device), settings


def on_device(state: TokenState, device: torch.device) -> TokenState:
    """A copy, of which nothing lies in the host's memory."""
    return TokenState(*(tensor.to(device, copy=True) for tensor in state))


def check_choices(
    name: str, choose: Choose, reference: Choose, logits: Sequence[torch.Tensor], selection: TokenSelection, may_turn: float
) -> None:
    """Exits if more than the share `may_turn` of the tokens that `choose` writes into a selection are not the reference's."""
    expected, same = on_device(selection.state, logits[0].device), []
    for one in logits:
        choose(one, selection.rules, selection.state)
        reference(one, selection.rules, expected)
        same.append(selection.state.next_ids == expected.next_ids)
        for ours, theirs in zip(selection.state, expected, strict=True):
            ours.copy_(theirs)  # so that the next choice is from the same
    turned = 1 - torch.cat(same).double().mean().item()
    if turned > may_turn:
        raise SystemExit(f"{name} is wrong: {100 * turned:.1f} % of the tokens are not the reference's")


def time_compiled(
    place: Place, ids: torch.Tensor, settings: Settings, selection: TokenSelection, logits: Sequence[torch.Tensor]
) -> dict[str, float | None]:
    """`compiled_us`: our reference under torch.compile; None where that does not run or chooses other tokens."""
    selection.begin(ids, settings, None)
    expected, state = (on_device(selection.state, place.device) for _ in range(2))
    select_token_reference(logits[0], selection.rules, expected)
    compiled = place.compile(select_token_reference)

    def choose(one: torch.Tensor) -> torch.Tensor:
        compiled(one, selection.rules, state)
        return state.next_ids

    exact = expected.next_ids.double()
    return time_alternatives(place, {"compiled": choose}, [[one] for one in logits], exact, exact)


def count_launches(call: Callable[[], object]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def waits(call: Callable[[], object]) -> bool:
    """Whether a call waits for the device: such a one cannot be captured."""
    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def bench_rules(place: Place, shape: Shape, B: int, timestamps: bool) -> Row:
    processors = processors_for(shape, timestamps, place.device)
    stock = Stock(B, processors, place.device)
    selection, settings = selection_for(shape, B, processors, place.device)
    logits = [place.randn(B, shape.vocabulary, scale=3) for _ in range(CALLS if place.is_gpu else 1)]
    for one in logits:
        selection.begin(stock.ids, settings, None)
        selection(one)
        if not torch.equal(selection.state.next_ids[:, 0], stock(one)):
            raise SystemExit(f"select_token is wrong at batch {B}, timestamps {timestamps}")

    def ours(name: str, block_size: int = BLOCK_V, temperature: float = 0.0, top_k: int = 0) -> tuple[float, float]:
        changed = settings._replace(temperature=temperature, limits=settings.limits._replace(top_k=top_k))
        choose = partial(select_token, top_k=top_k > 0, block_size=block_size)
        reference = partial(select_token_reference, top_k=top_k > 0)
        selection.begin(stock.ids, changed, None)
        check_choices(f"select_token, {name}", choose, reference, logits, selection, MOST_TURNED if temperature else 0)
        selection.begin(stock.ids, changed, None)
        return place.measure([partial(choose, one, selection.rules, selection.state) for one in logits])

    def stock_step() -> bool:
        stock(logits[0])
        return bool(stock.finished)

    row: Row = {"benchmark": "select_token", "B": B, "timestamps": timestamps}
    row |= {f"block_{block}_us": ours(f"blocks of {block}", block)[0] for block in BLOCKS}
    row["ours_us"], row["spread_us"] = ours("greedy")
    row["ours_sampling_us"] = ours("sampling", temperature=0.7)[0]
    row["ours_top_k_us"] = ours("top-k", temperature=0.7, top_k=50)[0]
    row |= time_compiled(place, stock.ids, settings, selection, logits)
    row["stock_eager_us"] = place.time([stock_step])[0]
    if not place.is_gpu:
        return row
    row["stock_waits"] = waits(lambda: stock(logits[0]))
    if not row["stock_waits"]:
        row["stock_graph_us"] = place.measure([lambda one=one: stock(one) for one in logits])[0]
    row["stock_launches"] = count_launches(stock_step)
    return row


def bench(place: Place, shape: Shape, B: int) -> list[Row]:
    return [bench_rules(place, shape, B, timestamps) for timestamps in (False, True)]


def main() -> None:
    measure_named(parser_for(__doc__, "large-v3", "1,8,32").parse_args(), "select_token", {"select_token": bench}, shapes_on)


if __name__ == "__main__":
    main()
