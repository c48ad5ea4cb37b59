"""The reference of `select_token`, under rules read from the stock processors, against these processors: token for token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WhisperTimeStampLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria
from whisper_triton.kernels._rules import TokenLimits, TokenState
from whisper_triton.kernels._sampling import gumbel_reference

from whisper_triton.kernels import select_token, select_token_reference
from whisper_triton.token_rules import NotCovered, allocate_rules, read_settings, write_rules

V, EOS, NO_TIMESTAMPS, L = 64, 40, 47, 24
TIMESTAMPS = NO_TIMESTAMPS + 1


def timestamp_processor(begin_index: int, last_initial: int | None, detect: bool) -> WhisperTimeStampLogitsProcessor:
    config = GenerationConfig(eos_token_id=EOS, no_timestamps_token_id=NO_TIMESTAMPS, max_initial_timestamp_index=last_initial)
    return WhisperTimeStampLogitsProcessor(config, begin_index, _detect_timestamp_from_logprob=detect)


class Draw:
    """Random rules, histories and logits."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.prompt_length = self.number(1, 4)
        self.length = self.prompt_length + self.number(0, 8)

    def number(self, low: int, high: int) -> int:
        """One of low .. high - 1."""
        return int(torch.randint(low, high, (), generator=self.generator))

    def tokens(self, count: int) -> list[int]:
        return torch.randint(-1, V + 2, (count,), generator=self.generator).tolist()

    def processors(self) -> LogitsProcessorList:
        p, eos = self.prompt_length, torch.tensor([EOS])
        masks = [
            SuppressTokensLogitsProcessor(self.tokens(self.number(0, 30))),
            SuppressTokensAtBeginLogitsProcessor(self.tokens(3), p + self.number(0, 2)),
            MinNewTokensLengthLogitsProcessor(p, self.number(0, 8), eos),
            MinLengthLogitsProcessor(self.number(0, 12), eos),
        ]
        kept = [masks[int(i)] for i in torch.randperm(4, generator=self.generator) if self.number(0, 3)]
        if self.number(0, 4):
            last_initial = None if self.number(0, 2) else self.number(0, 12)
            kept.append(timestamp_processor(p, last_initial, detect=bool(self.number(0, 5))))
        return LogitsProcessorList(kept)

    def ids(self, B: int) -> torch.Tensor:
        """Half of the new tokens are timestamps, so that all patterns of the last two occur."""
        ids = torch.randint(0, NO_TIMESTAMPS, (B, self.length), generator=self.generator)
        times = torch.randint(TIMESTAMPS, V, ids.shape, generator=self.generator)
        return torch.where(torch.rand(ids.shape, generator=self.generator) < 0.5, ids, times)

    def logits(self, B: int) -> torch.Tensor:
        scale = (0.1, 1.0, 10.0)[self.number(0, 3)]
        logits = torch.randn(B, V, generator=self.generator) * scale
        if self.number(0, 2):
            logits = (logits * 2).round() / 2  # many equal ones: the first wins
        logits[torch.rand(logits.shape, generator=self.generator) < 0.1] = -torch.inf
        if self.number(0, 8) == 0:
            logits[0] = -torch.inf
        return logits.to((torch.float32, torch.float16, torch.bfloat16)[self.number(0, 3)])


def state_of(ids: torch.Tensor, prompt_length: int) -> TokenState:
    B, length = ids.shape
    new = torch.where(ids >= TIMESTAMPS, ids, 0)[:, prompt_length:].tolist()
    newest = [next((token for token in reversed(row) if token), 0) for row in new]
    return TokenState(
        torch.cat([ids, torch.full((B, L - length), -7)], 1),
        torch.full((B, L), -7.0),
        torch.full((B,), length),
        torch.tensor(newest),
        torch.zeros(B, dtype=torch.int64),
        7919 * (1 + torch.arange(B)),
        torch.zeros(B, 1, dtype=torch.int64),
        torch.zeros(B, dtype=torch.int64),
    )


CRITERIA = StoppingCriteriaList([MaxLengthCriteria(L), EosTokenCriteria(EOS)])


def check(select: Callable[..., None], seed: int, B: int, device: torch.device, top_k: bool = False) -> None:
    """One choice of B rows under random rules, after random tokens, against the stock processors and their argmax.

    With `top_k` it is the argmax of what the stock processors have left and our noise.
    """
    draw, rules = Draw(seed), allocate_rules(V, device)
    processors, ids, logits = draw.processors(), draw.ids(B), draw.logits(B)
    warpers = LogitsProcessorList()
    if top_k:
        logits = logits.where(logits.isneginf().all(-1, keepdim=True).logical_not(), 1.0)  # there must be something to draw
        warpers += [TemperatureLogitsWarper((0.3, 0.7, 5.0)[draw.number(0, 3)]), TopKLogitsWarper(draw.number(1, V + 2))]
    settings = read_settings(
        LogitsProcessorList([*processors, *warpers]), CRITERIA, GenerationConfig(do_sample=top_k), draw.prompt_length, V
    )
    settings = settings._replace(limits=settings.limits._replace(call=9))
    write_rules(settings, torch.tensor(5, device=device), rules)
    state = TokenState(*(tensor.to(device) for tensor in state_of(ids, draw.prompt_length)))
    select(logits.to(device), rules, state, top_k=top_k)
    scores = processors(ids, logits.float())
    noise = 0.0
    if top_k:
        noise = gumbel_reference(state.seeds.cpu()[:, None], torch.arange(V), torch.full((B, 1), draw.length))
    scores = warpers(ids, scores)
    expected = (scores + noise).argmax(-1)
    # As Whisper's threshold of log-probability has it: without the temperature.
    logprobs = (scores * (warpers[0].temperature if top_k else 1.0)).log_softmax(-1).gather(1, expected[:, None])[:, 0]
    state = TokenState(*(tensor.cpu() for tensor in state))
    assert torch.equal(state.next_ids[:, 0], expected), seed
    assert torch.equal(state.ids[:, draw.length], expected)
    assert torch.equal(state.ids[:, : draw.length], ids)
    torch.testing.assert_close(state.logprobs[:, draw.length], logprobs, equal_nan=True, msg=str(seed))
    for tensor in (state.ids[:, draw.length + 1 :], state.logprobs[:, : draw.length], state.logprobs[:, draw.length + 1 :]):
        assert (tensor == -7).all()
    assert torch.equal(state.ends, torch.where(expected == EOS, draw.length + 1, 0))
    assert torch.equal(state.host_ends, torch.where(expected == EOS, 9 << 32 | draw.length + 1, 0))


@pytest.mark.parametrize("block", range(4))
def test_token_for_token_as_the_stock_processors(block: int) -> None:
    for seed in range(150 * block, 150 * (block + 1)):
        check(select_token_reference, seed, 8, torch.device("cpu"))


def test_drawn_from_the_k_most_probable_that_the_stock_processors_leave() -> None:
    for seed in range(300):
        check(select_token_reference, seed, 8, torch.device("cpu"), top_k=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of -inf - -inf, in the interpreter
@pytest.mark.parametrize("top_k", [False, True])
def test_the_kernels_token_for_token(top_k: bool, device: torch.device) -> None:
    for seed in range(20 if device.type == "cpu" else 1000):
        check(partial(select_token, block_size=32), seed, 2 if device.type == "cpu" else 8, device, top_k)


def test_the_cases_above_reach_every_rule() -> None:
    counts = {"opened": 0, "closed": 0, "first": 0, "preferred": 0, "all banned": 0}
    for seed in range(600):
        draw = Draw(seed)
        processors, ids, logits = draw.processors(), draw.ids(8), draw.logits(8)
        if not processors or type(processors[-1]) is not WhisperTimeStampLogitsProcessor:
            continue
        scores = processors(ids, logits.float())
        new = ids[:, draw.prompt_length :]
        is_time = new >= TIMESTAMPS
        counts["first"] += 8 * (new.shape[1] == 0)
        if new.shape[1] > 1:
            counts["opened"] += int((is_time[:, -1] & ~is_time[:, -2]).sum())
            counts["closed"] += int((is_time[:, -1] & is_time[:, -2]).sum())
        processors[-1]._detect_timestamp_from_logprob = False
        weaker = processors(ids, logits.float())
        counts["preferred"] += int((weaker.argmax(-1) != scores.argmax(-1)).sum())
        counts["all banned"] += int(scores.isneginf().all(-1).sum())
    assert min(counts.values()) > 30, counts


def test_the_limits_and_flags_that_are_written() -> None:
    eos = torch.tensor([EOS, EOS + 1])
    processors = LogitsProcessorList(
        [
            MinLengthLogitsProcessor(9, eos),
            MinNewTokensLengthLogitsProcessor(3, 4, eos),
            SuppressTokensLogitsProcessor([1, -1, V]),
            SuppressTokensAtBeginLogitsProcessor([1, 2], 3),
            timestamp_processor(3, 5, detect=True),
            TemperatureLogitsWarper(0.5),
            TopKLogitsWarper(50),
        ]
    )
    criteria = StoppingCriteriaList([MaxLengthCriteria(L), EosTokenCriteria(eos)])
    rules = allocate_rules(V, torch.device("cpu"))
    write_rules(read_settings(processors, criteria, GenerationConfig(do_sample=True), 3, V), torch.tensor([6]), rules)
    limits = TokenLimits(*rules.limits.tolist())
    assert limits == TokenLimits(L, 6, 3, 9, TIMESTAMPS, 3, TIMESTAMPS + 5, EOS, 1, 50)
    assert {i: flag for i, flag in enumerate(rules.flags.tolist()) if flag} == {
        1: 1 | 2, 2: 2, EOS: 4 | 8, EOS + 1: 4 | 8, NO_TIMESTAMPS: 1
    }  # fmt: skip
    assert rules.temperature == 0.5
    write_rules(read_settings(LogitsProcessorList(), criteria, GenerationConfig(do_sample=False), 3, V), None, rules)
    assert TokenLimits(*rules.limits.tolist()) == TokenLimits(L, 0)
    assert rules.temperature == 0.0
    assert rules.flags.nonzero().flatten().tolist() == eos.tolist()


class OfTheUser(SuppressTokensLogitsProcessor):
    """A subclass may do anything."""


@pytest.mark.parametrize(
    ("processors", "reason"),
    [
        ([OfTheUser([1])], "OfTheUser"),
        ([NoBadWordsLogitsProcessor([[3]])], "NoBadWords"),
        ([TopKLogitsWarper(129)], "TopK"),
        ([TopKLogitsWarper(50, filter_value=-9.0)], "TopK"),
        ([TopKLogitsWarper(50), TemperatureLogitsWarper(0.5)], "after the temperature"),
        ([TopKLogitsWarper(50), TopPLogitsWarper(0.9)], "TopP"),
        ([SuppressTokensLogitsProcessor([1]), SuppressTokensLogitsProcessor([2])], "a second time"),
        ([timestamp_processor(3, None, True), SuppressTokensLogitsProcessor([2])], "after the rules for timestamps"),
        ([TemperatureLogitsWarper(0.5), SuppressTokensLogitsProcessor([2])], "after the temperature"),
        ([timestamp_processor(2, None, True)], "where the prompt ends"),
        ([MinLengthLogitsProcessor(5, EOS), MinNewTokensLengthLogitsProcessor(3, 5, EOS + 1)], "different tokens"),
    ],
)
def test_what_is_not_covered_has_a_reason(processors: list, reason: str) -> None:
    with pytest.raises(NotCovered, match=reason):
        read_settings(LogitsProcessorList(processors), CRITERIA, GenerationConfig(do_sample=True), 3, V)


@pytest.mark.parametrize("warper", [TemperatureLogitsWarper(0.5), TopKLogitsWarper(5)])
def test_a_warper_without_sampling_is_not_covered(warper: LogitsProcessor) -> None:
    with pytest.raises(NotCovered, match=type(warper).__name__):
        read_settings(LogitsProcessorList([warper]), CRITERIA, GenerationConfig(do_sample=False), 3, V)


@pytest.mark.parametrize(
    ("criteria", "reason"), [([MaxLengthCriteria(9), MaxTimeCriteria(1.0)], "MaxTime"), ([EosTokenCriteria(EOS)], "length")]
)
def test_other_stopping_criteria_are_not_covered(criteria: list, reason: str) -> None:
    with pytest.raises(NotCovered, match=reason):
        read_settings(LogitsProcessorList(), StoppingCriteriaList(criteria), GenerationConfig(do_sample=False), 3, V)
