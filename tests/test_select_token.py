"""select_token: the kernels against their reference, and the reference's random draws against the distribution they are from.

That the reference is token for token what the stock processors give is tested in test_token_rules.py.
"""

from __future__ import annotations

import pytest
import torch
from whisper_triton.kernels.select_token import (
    ENDS,
    NEVER,
    TokenLimits,
    TokenRules,
    TokenState,
    random_bits,
    select_token,
    select_token_reference,
)

# The interpreter's NumPy warns of -inf - -inf and of log(0), whose results are not used.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

L, PROMPT, PAD = 12, 2, 1


def make_rules(V: int, device: torch.device, temperature: float = 0.0, timestamps: bool = True, **limits: int) -> TokenRules:
    """Text, then special tokens, then a quarter of timestamps; a tenth of the tokens has each flag."""
    flags = sum((torch.rand(V) < 0.1).to(torch.uint8) << bit for bit in range(4))
    begin = V - V // 4
    settings = {"max_length": L, "pad_token": PAD, "begin_length": PROMPT, "min_length": PROMPT + 2, "seed": 123456789012345}
    if timestamps:
        settings |= {"timestamp_begin": begin, "timestamp_length": PROMPT, "last_initial_timestamp": begin + V // 8}
        settings |= {"end_of_text": begin - 5, "prefer_timestamps": 1}
    vector = torch.tensor(TokenLimits(**(settings | limits)), device=device)
    return TokenRules(flags.to(device), vector, torch.tensor(temperature, device=device))


def make_state(B: int, device: torch.device) -> TokenState:
    def integers(value: int) -> torch.Tensor:
        return torch.full((B,), value, device=device)

    ids = torch.zeros(B, L, dtype=torch.int64, device=device)
    sums = torch.zeros(B, device=device)
    return TokenState(ids, integers(PROMPT), integers(0), integers(0), sums, integers(-1)[:, None].clone())


def assert_equal(ours: TokenState, reference: TokenState) -> None:
    for name, a, b in zip(TokenState._fields, ours, reference, strict=True):
        if name == "sum_logprobs":
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
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
    sums = -2 * torch.log(torch.tensor(1 + (V - 1) / torch.e))
    assert state.ids.tolist() == [[0, 0, 7, *[PAD] * (L - 3)], [0, 0, 9, 9, *[PAD] * (L - 4)]]
    assert state.ends.tolist() == [PROMPT + 1, PROMPT + 2]
    assert state.lengths.tolist() == [PROMPT + L] * 2
    torch.testing.assert_close(state.sum_logprobs.cpu(), torch.stack([sums / 2, sums]))


def test_where_nothing_is_left_or_nothing_is_a_number_the_choice_is_pytorchs(device):
    rules = make_rules(200, device, timestamps=False, begin_length=NEVER, min_length=0)
    rules.flags.zero_()
    logits = torch.full((3, 200), -torch.inf, device=device)
    logits[1, 150:160] = torch.nan
    logits[2, 130] = torch.inf
    state = make_state(3, device)
    select_token(logits, rules, state, block_size=128)
    assert state.next_ids.flatten().tolist() == logits.argmax(-1).tolist() == [0, 150, 130]


def test_random_bits_are_philox():
    """Known answers of the Random123 library, philox4x32-10."""
    ones, zeros = torch.full((1,), 0xFFFFFFFF), torch.zeros(1, dtype=torch.int64)
    assert random_bits(torch.tensor(0), zeros, zeros, zeros).item() == 0x6627E8D5
    assert random_bits(torch.tensor(-1), ones, ones, ones).item() != random_bits(torch.tensor(0), ones, ones, ones).item()


def draws(select, B: int, device: torch.device, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of B rows with the same logits over 8 lengths, and how often each of the 20 is expected."""
    rules = make_rules(20, device, temperature, timestamps=False, begin_length=NEVER, min_length=0)
    rules.flags.zero_()
    rules.flags[3] = 1
    row = torch.randn(20, generator=torch.Generator().manual_seed(5)).to(device) * 2
    state = make_state(B, device)
    for _ in range(8):
        select(row.repeat(B, 1), rules, state)
    probabilities = torch.softmax(row.index_fill(0, torch.tensor(3, device=device), -torch.inf) / temperature, 0)
    return state.ids[:, PROMPT : PROMPT + 8], probabilities.cpu().double() * 8 * B


def chi_square(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    counts = torch.bincount(tokens.flatten().cpu(), minlength=20).double()
    assert counts[3] == 0
    return float(((counts - expected).square() / expected)[expected > 0].sum())


@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_samples_are_from_the_softmax(temperature):
    tokens, expected = draws(select_token_reference, 4000, torch.device("cpu"), temperature)
    assert chi_square(tokens, expected) < 42.3  # the 0.1 % quantile of 18 degrees of freedom
    # Neither two lengths nor two rows share a stream: they agree as often as independent draws do.
    agreement = float((expected / expected.sum()).square().sum())
    for pair in ((tokens[:, 0], tokens[:, 1]), (tokens[:-1].flatten(), tokens[1:].flatten())):
        assert abs(float((pair[0] == pair[1]).double().mean()) - agreement) < 0.02


def test_a_row_draws_the_same_whatever_the_batch(device):
    rules, logits = make_rules(128, device, temperature=1.0), torch.randn(3, 128, device=device)
    states = [make_state(B, device) for B in (1, 3)]
    for state in states:
        for _ in range(2):
            select_token(logits[: len(state.ids)].contiguous(), rules, state, block_size=128)
    assert torch.equal(states[0].ids[0], states[1].ids[0])
    assert not torch.equal(states[1].ids[0], states[1].ids[1])


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
    @pytest.mark.parametrize("temperature", [0.0, 0.6])
    def test_many_steps_of_the_real_vocabulary(self, B, dtype, temperature, device):
        V = 51866
        for seed in range(20):
            torch.manual_seed(seed)
            rules = make_rules(V, device, temperature, timestamps=seed % 4 > 0)
            ours, reference = make_state(B, device), make_state(B, device)
            for _ in range(L - PROMPT + 1):
                logits = (torch.randn(B, V, device=device) * (seed + 1)).to(dtype)
                select_token(logits, rules, ours)
                select_token_reference(logits, rules, reference)
                if temperature == 0.0:
                    assert_equal(ours, reference)
                # Two keys of a draw may be closer than the last bit of a logarithm: go on from the same tokens.
                assert (ours.next_ids == reference.next_ids).double().mean() > 0.9
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

    def test_samples_are_from_the_softmax(self, device):
        tokens, expected = draws(select_token, 4000, device, 0.7)
        assert chi_square(tokens, expected) < 42.3
        assert (tokens == draws(select_token_reference, 4000, device, 0.7)[0]).double().mean() > 0.999
