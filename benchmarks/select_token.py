"""The choice of the next token: our two launches against what stock transformers does between two forward passes, by batch.

    python benchmarks/select_token.py

large-v3's vocabulary, fp16 logits, Whisper's rules with and without timestamps. Microseconds a token: ours in a CUDA graph,
logits as they come from the LM head, that is in the L2; stock's processors, argmax and stopping criteria eagerly, host
included, and in a graph where they can be captured, which nothing can that waits for the device (`stock_waits`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from harness import measure, parse_args, print_table, write_rows
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperTimeStampLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from whisper_triton.decode_loop import TokenSelection
from whisper_triton.kernels import select_token
from whisper_triton.token_rules import Settings, read_settings

V, EOS, NO_TIMESTAMPS = 51866, 50257, 50364
PROMPT, LENGTH, CALLS = 4, 64, 16
BLOCKS = (512, 1024, 2048, 4096)


def processors_for(timestamps: bool, device: str = "cuda") -> LogitsProcessorList:
    processors = [
        SuppressTokensAtBeginLogitsProcessor([220, EOS], PROMPT, device=device),
        SuppressTokensLogitsProcessor(list(range(1, 89)), device=device),
    ]
    if timestamps:
        config = GenerationConfig(eos_token_id=EOS, no_timestamps_token_id=NO_TIMESTAMPS, max_initial_timestamp_index=50)
        processors.append(WhisperTimeStampLogitsProcessor(config, PROMPT))
    return LogitsProcessorList(processors)


class Stock:
    """What `_sample` does with a step's logits, up to the flag that the host then waits for."""

    def __init__(self, B: int, processors: LogitsProcessorList, device: str = "cuda") -> None:
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


def selection_for(B: int, processors: LogitsProcessorList, device: str = "cuda") -> tuple[TokenSelection, Settings]:
    """Ours, by the same rules. Rows go on for as many calls as are made here, so that each reads its logits."""
    most = LENGTH + 1000 * CALLS
    criteria = StoppingCriteriaList([MaxLengthCriteria(most)])
    settings = read_settings(processors, criteria, GenerationConfig(do_sample=False), PROMPT, V)
    return TokenSelection(B, most, V, torch.device(device)), settings


def eager_us(call: Callable[[], object], repeats: int = 50) -> float:
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e6


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


def bench(B: int, timestamps: bool) -> dict[str, object]:
    processors = processors_for(timestamps)
    stock = Stock(B, processors)
    selection, settings = selection_for(B, processors)
    logits = [torch.randn(B, V, device="cuda").mul_(3).half() for _ in range(CALLS)]
    for one in logits:
        selection.begin(stock.ids, settings, None)
        selection(one)
        if not torch.equal(selection.state.next_ids[:, 0], stock(one)):
            raise SystemExit(f"wrong tokens at batch {B}, timestamps {timestamps}")

    def ours(block_size: int, temperature: float = 0.0, top_k: int = 0) -> float:
        changed = settings._replace(temperature=temperature, limits=settings.limits._replace(top_k=top_k))
        selection.begin(stock.ids, changed, None)
        kwargs = {"top_k": top_k > 0, "block_size": block_size}
        return measure([lambda one=one: select_token(one, selection.rules, selection.state, **kwargs) for one in logits])[0]

    def stock_step() -> bool:
        stock(logits[0])
        return bool(stock.finished)

    row: dict[str, object] = {"B": B, "timestamps": timestamps}
    row |= {f"block_{block}_us": ours(block) for block in BLOCKS}
    row["ours_us"] = ours(1024)
    row["ours_sampling_us"] = ours(1024, temperature=0.7)
    row["ours_top_k_us"] = ours(1024, temperature=0.7, top_k=50)
    row["stock_eager_us"] = eager_us(stock_step)
    row["stock_waits"] = waits(lambda: stock(logits[0]))
    if not row["stock_waits"]:
        row["stock_graph_us"] = measure([lambda one=one: stock(one) for one in logits])[0]
    row["stock_launches"] = count_launches(stock_step)
    return row


def main() -> None:
    args = parse_args(__doc__, "select_token.jsonl")
    rows = [bench(B, timestamps) for timestamps in (False, True) for B in (1, 8, 32)]
    print_table(rows)
    write_rows(args.output, rows)


if __name__ == "__main__":
    main()
