"""select_token: the kernels against their reference, and the reference's random draws against the distribution they are from.

That the reference is token for token what the stock processors give is tested in test_token_rules.py.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import TopKLogitsWarper
from whisper_triton.kernels._rules import ENDS, NEVER, TokenLimits, TokenRules, TokenState
from whisper_triton.kernels._sampling import keep_top_k, random_bits

from whisper_triton.kernels import select_token, select_token_reference

# The interpreter's NumPy warns of -inf - -inf and of log(0), whose results are not used.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

L, PROMPT, PAD = 12, 2, 1


def make_rules(V: int, device: torch.device, temperature: float = 0.0, timestamps: bool = True, **limits: int) -> TokenRules:
    """Text, then special tokens, then a quarter of timestamps; a tenth of the tokens has each flag."""
    flags = sum((torch.rand(V) < 0.1).to(torch.uint8) << bit for bit in range(4))
    begin = V - V // 4
    settings = {"max_length": L, "pad_token": PAD, "begin_length": PROMPT, "min_length": PROMPT + 2}
    if timestamps:
        settings |= {"timestamp_begin": begin, "timestamp_length": PROMPT, "last_initial_timestamp": begin + V // 8}
        settings |= {"end_of_text": begin - 5, "prefer_timestamps": 1}
    vector = torch.tensor(TokenLimits(**(settings | limits)), device=device)
    return TokenRules(flags.to(device), vector, torch.tensor(temperature, device=device))


def make_state(B: int, device: torch.device) -> TokenState:
    def integers(value: int) -> torch.Tensor:
        return torch.full((B,), value, device=device)

    ids, logprobs = torch.zeros(B, L, dtype=torch.int64, device=device), torch.zeros(B, L, device=device)
    seeds = 123456789012345 * (1 + torch.arange(B, device=device))
    next_ids = integers(-1)[:, None].clone()
    return TokenState(ids, logprobs, integers(PROMPT), integers(0), integers(0), seeds, next_ids, integers(0))


def assert_equal(ours: TokenState, reference: TokenState, atol: float = 1e-5) -> None:
    """`atol`: of log-probabilities, 1e-5 and a millionth of them being what PyTorch takes for close in fp32."""
    for name, a, b in zip(TokenState._fields, ours, reference, strict=True):
        if name == "logprobs":
            torch.testing.assert_close(a, b, rtol=1.3e-6, atol=atol, equal_nan=True)
        else:
            assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("B", "V", "dtype", "temperature", "timestamps"),
    [
        (3, 300, torch.float16, 0.0, True),
        (2, 300, torch.float32, 0.7, True),
        (2, 128, torch.bfloat16, 0.0, False),
        (1, 128, torch.float32, 1.5, False),
    ],
)
def test_a_few_steps_as_the_reference(B, V, dtype, temperature, timestamps, device):
    """Equal logits are frequent: the first of them is chosen, over chunks of 128 too."""
    rules, ours, reference = make_rules(V, device, temperature, timestamps), make_state(B, device), make_state(B, device)
    for _ in range(4):
        logits = (torch.randn(B, V, device=device) * 2).round().to(dtype)
        select_token(logits, rules, ours, block_size=128)
        select_token_reference(logits, rules, reference)
        assert_equal(ours, reference)
    assert (ours.lengths == PROMPT + 4).all()


def test_the_real_vocabulary(device):
    V = 51866
    rules, ours, reference = make_rules(V, device), make_state(1, device), make_state(1, device)
    logits = torch.randn(1, V, device=device, dtype=torch.float16)
    select_token(logits, rules, ours, block_size=16384)
    select_token_reference(logits, rules, reference)
    assert_equal(ours, reference)
    assert ours.next_ids.item() >= V - V // 4


def test_a_row_that_has_ended_gets_pads_and_its_logits_are_not_read(device):
    V = 128
    rules = make_rules(V, device, timestamps=False, begin_length=NEVER, min_length=0, max_length=PROMPT + 2)
    rules.flags.zero_()
    rules.flags[7] = ENDS
    logits = torch.zeros(2, V, device=device)
    logits[0, 7] = logits[1, 9] = 1.0
    state = make_state(2, device)
    for _ in range(L):
        select_token(logits, rules, state, block_size=128)
        logits[0] = torch.nan
    assert state.ids.tolist() == [[0, 0, 7, *[PAD] * (L - 3)], [0, 0, 9, 9, *[PAD] * (L - 4)]]
    assert state.ends.tolist() == [PROMPT + 1, PROMPT + 2]
    assert state.lengths.tolist() == [PROMPT + L] * 2


def test_where_nothing_is_left_or_nothing_is_a_number_the_choice_is_pytorchs(device):
    rules = make_rules(200, device, timestamps=False, begin_length=NEVER, min_length=0)
    rules.flags.zero_()
    logits = torch.full((4, 200), -torch.inf, device=device)
    logits[1, 150:160] = torch.nan
    logits[2, 130] = logits[3, 20] = logits[3, 140] = torch.inf
    logits[3, 30] = logits[3, 170] = torch.nan
    state = make_state(4, device)
    select_token(logits, rules, state, block_size=128)
    assert state.next_ids.flatten().tolist() == logits.argmax(-1).tolist() == [0, 150, 130, 30]


@pytest.mark.bad_input
@pytest.mark.parametrize("length", [-(1 << 20), -1, 0, L, L + 1, L + 2, 1 << 20])
def test_a_length_that_ran_away_reads_and_writes_nothing_outside(length, device):
    """As of the reference; and a read out there would fault, on a GPU and in the interpreter."""
    rules = make_rules(128, device, max_length=NEVER)
    buffers = [torch.full((2 + 2 * 64, L), 7, device=device) for _ in range(2)]
    before = buffers[0].clone()
    states = [make_state(2, device)._replace(ids=buffer[64:66]) for buffer in buffers]
    logits = torch.randn(2, 128, device=device)
    for state, select in zip(states, (select_token, select_token_reference), strict=True):
        state.lengths[1] = length
        select(logits, rules, state)
    assert_equal(*states)
    before[64, PROMPT] = states[0].next_ids[0, 0]  # of the other row, which is where it should be
    before[65, 0] = states[0].next_ids[1, 0] if length == 0 else 7
    assert torch.equal(buffers[0], before)
    assert torch.equal(buffers[1], before)


def test_random_bits_are_philox():
    """Known answers of the Random123 library, philox4x32-10."""
    ones, zeros = torch.full((1,), 0xFFFFFFFF), torch.zeros(1, dtype=torch.int64)
    assert random_bits(torch.tensor(0), zeros, zeros).item() == 0x6627E8D5
    assert random_bits(torch.tensor(-1), ones, ones).item() != random_bits(torch.tensor(0), ones, ones).item()


def draws(select, B: int, device: torch.device, temperature: float, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of B rows with the same logits over 8 lengths, and how often each of the 20 is expected."""
    rules = make_rules(20, device, temperature, timestamps=False, begin_length=NEVER, min_length=0, top_k=top_k)
    rules.flags.zero_()
    rules.flags[3] = 1
    row = torch.randn(20, generator=torch.Generator().manual_seed(5)).to(device) * 2
    state = make_state(B, device)
    for _ in range(8):
        select(row.repeat(B, 1), rules, state, top_k=top_k > 0)
    left = row.index_fill(0, torch.tensor(3, device=device), -torch.inf)
    probabilities = torch.softmax((TopKLogitsWarper(top_k)(None, left) if top_k else left) / temperature, 0)
    return state.ids[:, PROMPT : PROMPT + 8], probabilities.cpu().double() * 8 * B


def chi_square(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    counts = torch.bincount(tokens.flatten().cpu(), minlength=20).double()
    assert (counts[expected == 0] == 0).all()
    return float(((counts - expected).square() / expected)[expected > 0].sum())


@pytest.mark.parametrize(("temperature", "top_k"), [(0.4, 0), (1.0, 0), (1.0, 8)])
def test_samples_are_from_the_softmax(temperature, top_k):
    tokens, expected = draws(select_token_reference, 4000, torch.device("cpu"), temperature, top_k)
    assert chi_square(tokens, expected) < 42.3  # the 0.1 % quantile of 18 degrees of freedom
    # Neither two lengths nor two rows share a stream: they agree as often as independent draws do.
    agreement = float((expected / expected.sum()).square().sum())
    for pair in ((tokens[:, 0], tokens[:, 1]), (tokens[:-1].flatten(), tokens[1:].flatten())):
        assert abs(float((pair[0] == pair[1]).double().mean()) - agreement) < 0.02


@pytest.mark.parametrize("top_k", [0, 50])
@pytest.mark.parametrize("select", [partial(select_token, block_size=128), select_token_reference])
def test_a_row_draws_by_its_seed_and_not_by_its_place(select, top_k, device):
    rules = make_rules(128, device, temperature=1.0, top_k=top_k)
    logits = torch.randn(1, 128, device=device).repeat(3, 1)
    alone, beside = make_state(1, device), make_state(3, device)
    beside.seeds.copy_(alone.seeds[0] + torch.tensor([1, 0, 1 << 40], device=device))
    for state in (alone, beside):
        for _ in range(4):
            select(logits[: len(state.ids)].contiguous(), rules, state, top_k=top_k > 0)
    assert torch.equal(alone.ids[0], beside.ids[1])
    assert len({tuple(row) for row in beside.ids.tolist()}) == 3


def equal_values(B: int, V: int, levels: int) -> torch.Tensor:
    """Few different values, so that the k-th greatest is met in many places, both zeros among them."""
    logits = (torch.rand(B, V) * levels).floor() - levels // 2
    return torch.where((logits == 0) & (torch.rand(B, V) < 0.5), -0.0, logits)


@pytest.mark.parametrize(
    ("V", "levels", "top_k", "timestamps"),
    [(5000, 2, 50, False), (5000, 40, 128, False), (5000, 3000, 7, True), (5000, 1_000_000, 128, True), (90, 50, 100, True)],
)
def test_the_k_most_probable_and_those_that_equal_the_last_of_them(V, levels, top_k, timestamps, device):
    """Over more groups than are looked at at once. At this temperature all that are kept are about as probable."""
    rules = make_rules(V, device, 1000.0 * levels, timestamps, top_k=top_k, begin_length=NEVER, min_length=0)
    ours, reference = make_state(2, device), make_state(2, device)
    for seed in range(3 if device.type == "cpu" else 50):
        for state in (ours, reference):
            state.seeds.fill_(seed)
        logits = equal_values(2, V, levels).to(device)
        select_token(logits, rules, ours, top_k=True)
        select_token_reference(logits, rules, reference, top_k=True)
        assert torch.equal(ours.next_ids, reference.next_ids)
        assert_equal(ours, reference, atol=max(1e-5, 2 * levels * torch.finfo(torch.float32).eps))  # scores' last bits


@pytest.mark.parametrize("top_k", [1, 5, 128, 400])
@pytest.mark.parametrize("levels", [2, 30, 100_000])
def test_what_is_kept_is_what_stock_keeps(top_k, levels):
    scores = equal_values(16, 300, levels) / 0.7
    scores[torch.rand(scores.shape) < 0.2] = -torch.inf
    scores[0] = -torch.inf
    assert torch.equal(keep_top_k(scores, top_k), TopKLogitsWarper(top_k)(None, scores))
    assert torch.equal(keep_top_k(scores, torch.tensor(top_k)), TopKLogitsWarper(top_k)(None, scores))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits, rules, state: (logits[:, :-1], rules, state), "contiguous"),
        (lambda logits, rules, state: (logits[0], rules, state), r"\(B, V\)"),
        (lambda logits, rules, state: (logits.long(), rules, state), "int64"),
        (lambda logits, rules, state: (logits, rules._replace(flags=rules.flags[:-1]), state), "flags"),
        (lambda logits, rules, state: (logits, rules._replace(limits=rules.limits[:-1]), state), "limits"),
        (lambda logits, rules, state: (logits, rules, state._replace(lengths=state.lengths[:1])), "lengths"),
        (lambda logits, rules, state: (logits, rules, state._replace(ids=state.ids.T.contiguous().T)), "ids"),
        (lambda logits, rules, state: (logits, rules, state._replace(ends=state.ends.int())), "int32"),
    ],
)
def test_bad_input_is_refused_with_a_reason(change, message, device):
    state = make_state(2, device)
    with pytest.raises(ValueError, match=message):
        select_token(*change(torch.zeros(2, 64, device=device), make_rules(64, device), state))
    assert_equal(state, make_state(2, device))


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("B", [1, 8, 64])
    @pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (0.6, 0), (0.6, 50), (1.5, 128)])
    def test_many_steps_of_the_real_vocabulary(self, B, dtype, temperature, top_k, device):
        V = 51866
        for seed in range(20):
            torch.manual_seed(seed)
            rules = make_rules(V, device, temperature, timestamps=seed % 4 > 0, top_k=top_k)
            ours, reference = make_state(B, device), make_state(B, device)
            for _ in range(L - PROMPT + 1):
                logits = (torch.randn(B, V, device=device) * (seed + 1)).to(dtype)
                select_token(logits, rules, ours, top_k=top_k > 0)
                select_token_reference(logits, rules, reference, top_k=top_k > 0)
                if temperature == 0.0:
                    assert_equal(ours, reference)
                # Two keys of a draw may be closer than the last bit of a logarithm: go on from the same tokens.
                same = (ours.next_ids == reference.next_ids)[:, 0]
                assert same.double().mean() > 0.9
                torch.testing.assert_close(ours.logprobs[same], reference.logprobs[same], rtol=1.3e-6, atol=1e-4)
                for a, b in zip(ours, reference, strict=True):
                    a.copy_(b)

    def test_one_graph_serves_other_rules(self, device):
        B, V = 4, 51866
        logits, rules = torch.randn(B, V, device=device, dtype=torch.float16), make_rules(V, device)
        ours, reference = make_state(B, device), make_state(B, device)
        select_token(logits, rules, make_state(B, device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            select_token(logits, rules, ours)
        for timestamps in (True, False):
            for a, b in zip(rules, make_rules(V, device, timestamps=timestamps, pad_token=3), strict=True):
                a.copy_(b)
            for state in (ours, reference):
                for a, b in zip(state, make_state(B, device), strict=True):
                    a.copy_(b)
            for _ in range(L - PROMPT + 2):
                logits.normal_()
                graph.replay()
                select_token_reference(logits, rules, reference)
                assert_equal(ours, reference)

    @pytest.mark.parametrize("top_k", [0, 8])
    def test_samples_are_from_the_softmax(self, device, top_k):
        tokens, expected = draws(select_token, 4000, device, 0.7, top_k)
        assert chi_square(tokens, expected) < 42.3
        assert (tokens == draws(select_token_reference, 4000, device, 0.7, top_k)[0]).double().mean() > 0.999

    def test_the_host_reads_the_ends_of_a_graph_from_its_own_memory(self, device):
        """Rows that end at different lengths, and one that goes on until the greatest."""
        B, V = 3, 300
        rules = make_rules(V, device, timestamps=False, begin_length=NEVER, min_length=0, call=7)
        rules.flags.zero_()
        rules.flags[9] = ENDS
        logits = torch.zeros(B, V, device=device)
        state = make_state(B, device)._replace(host_ends=torch.zeros(B, dtype=torch.int64).pin_memory())
        select_token(logits, rules, make_state(B, device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            select_token(logits, rules, state)
        event, seen = torch.cuda.Event(), []
        for i in range(L - PROMPT):
            if i == 2:
                logits[2, 9] = 1.0
            graph.replay()
            event.record()
            event.synchronize()
            seen.append(state.host_ends.tolist())
        two = 7 << 32 | PROMPT + 3
        assert seen[1:4] == [[0, 0, 0], [0, 0, two], [0, 0, two]]
        assert seen[-1] == [7 << 32 | L, 7 << 32 | L, two]
        assert state.ends.tolist() == [L, L, PROMPT + 3]
