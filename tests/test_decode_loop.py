"""`generate` through our decoding loop gives stock's tokens, and what the loop does not cover is decoded by stock's.

Without a GPU a step runs eagerly where a graph would be replayed; the loop around it is the same.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ctranslate2_writer import write_directory
from transformers import GenerationConfig, StoppingCriteria, SuppressTokensLogitsProcessor, WhisperForConditionalGeneration
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput
from whisper_models import EOS, NO_TIMESTAMPS, START_OF_PREVIOUS, Recorder, assert_same, mel, tiny_whisper
from whisper_triton.kernels._rules import TokenLimits

from whisper_triton import StaticEncoderDecoderCache, accelerated, attention, decode_loop, decoder, fused, model_state
from whisper_triton.attention import STATE
from whisper_triton.cache import CACHE_NAME
from whisper_triton.checkpoints import load_model
from whisper_triton.coverage import why_not_our_loop
from whisper_triton.decode_loop import STOCKS_LOOP
from whisper_triton.token_rules import Settings

README = Path(__file__).parent.parent / "README.md"
# Which loop decodes which calls, as README has it: every row is stated by the test that holds it.
DECODED_BY: dict[str, str] = {}

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels", "eager_steps")


def row(call: str, loop: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks the test of a row of README's table."""
    DECODED_BY[call] = loop
    return lambda test: test


@pytest.fixture(autouse=True)
def _modules(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, the steps run in the model's modules: the chain has tests of its own, and takes long in the interpreter."""
    if device.type == "cpu":
        monkeypatch.setattr(decoder, "is_fusable", lambda model, batch_size: False)


def talkative(device: torch.device, eos_bias: float = 1.0, **config: Any) -> WhisperForConditionalGeneration:
    """A tiny model whose rows end at different lengths: `eos_bias` scales the end token's embedding, that is its logits."""
    model = tiny_whisper(device, seed=3, **config)
    model.model.decoder.embed_tokens.weight.data[EOS] *= eos_bias
    return model


def assert_as_stock(model: WhisperForConditionalGeneration, features: torch.Tensor, **kwargs: Any) -> Any:
    """The same tokens, and scores no further from float64's than twice stock's."""
    stock = model.generate(features, **kwargs)
    exact = copy.deepcopy(model).double().generate(features.double(), **kwargs)
    with accelerated(model):
        for _ in range(2):  # the second call finds the buffers of the first
            assert_same(model.generate(features, **kwargs), stock, exact)
    return stock


class TestStocksTokens:
    @row("greedy search", "ours")
    def test_greedy(self, device: torch.device, loops: list[int]) -> None:
        tokens = assert_as_stock(talkative(device), mel(3, device), max_new_tokens=30)
        assert tokens.unique().numel() > 8
        assert len(loops) == 2

    @pytest.mark.parametrize("is_large", [False, True])
    @pytest.mark.parametrize(("eos_bias", "length"), [(4.0, 28), (-3.0, 5)])
    def test_rows_that_end_early_are_padded(
        self,
        device: torch.device,
        eos_bias: float,
        length: int,
        is_large: bool,
        loops: list[int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(decode_loop, "LARGE", 0 if is_large else 1 << 40)
        tokens = assert_as_stock(talkative(device, eos_bias), mel(5, device))
        assert tokens.shape[1] == length
        assert (tokens != EOS).sum(1).unique().numel() > 2
        # The last token is found at the first look after it, when one more has been asked for, or before that is decoded.
        assert length - 1 <= loops[0] <= length + (0 if is_large else decode_loop.LOOK_EVERY)

    @pytest.mark.parametrize("has_chain", [True, False])
    def test_of_rows_that_have_ended_no_keys_are_read(
        self, device: torch.device, has_chain: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(decoder, "is_fusable", fused.is_fusable if has_chain else lambda model, batch_size: False)
        model, features = talkative(device, 4.0, dtype=torch.float16), mel(5, device).half()
        of_steps, across = (fused, "cross_attention") if has_chain else (attention, "decode_attention")
        given: dict[str, list[torch.Tensor | None]] = {across: [], "append_attention": []}
        for name, seen in given.items():
            attend = getattr(of_steps, name)

            def spy(*args: Any, attend: Callable[..., Any] = attend, seen: list[Any] = seen, **kwargs: Any) -> torch.Tensor:
                seen.append(kwargs["ended"])
                return attend(*args, **kwargs)

            monkeypatch.setattr(of_steps, name, spy)
        with accelerated(model):
            tokens = model.generate(features)
            ends = [seen[-1].clone() for seen in given.values()]
            for seen in given.values():
                seen.clear()
            # All that this hands out is stock's for such rows too: as in a call that no other came before.
            whole = model.generate(features, return_dict_in_generate=True, output_scores=True)
            assert all(given.values())
            assert not any(end is not None for seen in given.values() for end in seen)
            again = model.generate(features)
            single = model.generate(features[:1])
        other = talkative(device, 4.0, dtype=torch.float16)
        with accelerated(other):
            wanted = other.generate(features, return_dict_in_generate=True, output_scores=True)
        assert all(torch.equal(ours, first) for ours, first in zip(whole.scores, wanted.scores, strict=True))
        assert torch.equal(again, tokens)
        assert (tokens != EOS).sum(1).unique().numel() > 2
        assert torch.equal(tokens, whole.sequences[:, 2 : 2 + tokens.shape[1]])  # after the prompt
        assert torch.equal(tokens[0, : single.shape[1]], single[0])
        assert all(end.all() for end in ends)

    @row("timestamps", "ours")
    def test_timestamps(self, device: torch.device, loops: list[int]) -> None:
        tokens = assert_as_stock(talkative(device), mel(2, device), return_timestamps=True)
        assert (tokens > NO_TIMESTAMPS).sum() > 2
        assert len(loops) >= 2

    @pytest.mark.parametrize("length", [1, 2, 5, 6])
    def test_lengths_around_the_hosts_looks(self, device: torch.device, length: int, loops: list[int]) -> None:
        assert assert_as_stock(talkative(device), mel(2, device), max_new_tokens=length).shape == (2, length)
        assert loops == [length - 1] * 2

    def test_longer_calls_get_a_longer_cache(
        self, device: torch.device, loops: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model_state, "MIN_SLOTS", 8)
        model, features = talkative(device), mel(2, device)
        lengths = [*range(3, 10), 14, 15, 30, 4, 40, 58]  # and two tokens of the prompt
        wanted = [model.generate(features, max_new_tokens=length, min_new_tokens=length) for length in lengths]
        slots = []
        with accelerated(model):
            for length, tokens in zip(lengths, wanted, strict=True):
                assert torch.equal(model.generate(features, max_new_tokens=length, min_new_tokens=length), tokens)
                slots.append(getattr(model, STATE).steps[2].num_slots)
        assert slots == [8] * 5 + [16] * 4 + [32, 32, 64, 64]
        assert len(loops) == len(lengths)

    @pytest.mark.parametrize(
        ("steps_of_one", "kept"),
        [
            (6.0, [[1], [1, 2], [1, 2, 3], [2, 3, 1], [1, 4], [4, 2]]),
            (3.0, [[1], [1, 2], [3], [1], [4], [2]]),
            (0.5, [[1], [2], [3], [1], [4], [2]]),
        ],
    )
    def test_kept_steps_never_take_more_than_their_share(
        self,
        device: torch.device,
        steps_of_one: float,
        kept: list[list[int]],
        loops: list[int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """But for one that is larger by itself, which is kept alone."""
        model, found = talkative(device), []
        size = decoder.cache_bytes(model, 1, model.config.max_source_positions, model_state.slots_for(8, 64))
        most, nbytes = int(steps_of_one * size), decoder.DecoderStep.nbytes.fget
        monkeypatch.setattr(model_state, "MAX_BYTES", most)
        # Of the caches alone: what a graph takes depends on the GPU.
        monkeypatch.setattr(decoder.DecoderStep, "nbytes", property(lambda step: size * step.encoder_states.shape[0]))
        with accelerated(model):
            steps = getattr(model, STATE).steps
            init = decoder.DecoderStep.__init__

            def spy(step: decoder.DecoderStep, *args: Any) -> None:
                others = sum(other.nbytes for other in steps.values())
                init(step, *args)
                assert nbytes(step) == step.nbytes  # before there is a graph
                assert not others or others + step.nbytes <= most

            monkeypatch.setattr(decoder.DecoderStep, "__init__", spy)
            for B in (1, 2, 3, 1, 4, 2):
                model.generate(mel(B, device), max_new_tokens=4)
                found.append(list(steps))
        assert found == kept
        assert len(loops) == len(found)

    def test_graphs_captured_since_count_when_a_step_is_used_again(
        self, device: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with accelerated(talkative(device)) as model:
            steps = getattr(model, STATE).steps
            for B in (1, 2, 3):
                model.generate(mel(B, device), max_new_tokens=4)
            monkeypatch.setattr(model_state, "MAX_BYTES", steps[1].nbytes + steps[3].nbytes)
            model.generate(mel(1, device), max_new_tokens=4)
            assert list(steps) == [3, 1]

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"min_new_tokens": 12},
            {"min_length": 12, "begin_suppress_tokens": None},
            {"suppress_tokens": [5, 17, 42, *range(60, 90)], "begin_suppress_tokens": [1, EOS]},
            {"suppress_tokens": None, "begin_suppress_tokens": None},
            {"prompt_ids": torch.tensor([START_OF_PREVIOUS, 5, 17, 42, 8])},
            {"num_beams": 1, "do_sample": False, "temperature": 0.0},
            {"return_dict_in_generate": True},
            {"eos_token_id": [EOS, 7, 30], "return_timestamps": False},
        ],
        ids=str,
    )
    @row("suppressed tokens, least and greatest lengths", "ours")
    def test_options(self, device: torch.device, kwargs: dict[str, Any], loops: list[int]) -> None:
        kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        assert_as_stock(talkative(device, eos_bias=2.0), mel(2, device), max_new_tokens=20, **kwargs)
        assert len(loops) == 2

    @row("long audio, window by window", "ours")
    def test_windows_in_a_row(self, device: torch.device, loops: list[int]) -> None:
        mask = torch.ones(2, 250, dtype=torch.int64, device=device)
        mask[1, 120:] = 0
        assert_as_stock(talkative(device), mel(2, device, seconds=2.5), attention_mask=mask, return_timestamps=True)
        assert len(loops) > 4

    @row("previous tokens or a prompt before a window", "ours")
    def test_a_window_that_follows_the_previous_tokens(self, device: torch.device, loops: list[int]) -> None:
        """One audio's prompt has no padding, though a mask comes with it."""
        features = mel(1, device, seconds=2.5)
        assert_as_stock(talkative(device), features, return_timestamps=True, condition_on_prev_tokens=True)
        assert len(loops) > 4

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"condition_on_prev_tokens": True},
            {"condition_on_prev_tokens": True, "logprob_threshold": -0.5, "temperature": (0.0, 0.0)},
            {"condition_on_prev_tokens": True, "return_segments": True},
        ],
        ids=lambda kwargs: ",".join(kwargs),
    )
    def test_a_cache_that_grows_from_window_to_window(
        self, device: torch.device, kwargs: dict[str, Any], loops: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model_state, "MIN_SLOTS", 4)
        slots, model = [], talkative(device)
        init = decoder.DecoderStep.__init__

        def noted(step: decoder.DecoderStep, *args: Any) -> None:
            init(step, *args)
            slots.append(step.num_slots)

        monkeypatch.setattr(decoder.DecoderStep, "__init__", noted)
        features = mel(1, device, seconds=2.5)
        assert_as_stock(model, features, return_timestamps=True, max_new_tokens=5, **kwargs)
        assert slots == sorted(set(slots))
        assert len(slots) > 1
        assert len(loops) > 4

    @row("scores, logits, thresholds of compression ratio, log probability and no speech", "ours")
    @pytest.mark.parametrize(
        "kwargs",
        [
            {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "return_timestamps": False},
            {"return_dict_in_generate": True, "output_scores": True, "return_timestamps": True, "return_segments": True},
            {"compression_ratio_threshold": 0.1, "temperature": (0.0, 0.0)},
            {"logprob_threshold": -0.5, "temperature": (0.0, 0.0)},
            {"logprob_threshold": 0.0, "no_speech_threshold": 0.0, "temperature": (0.0,), "return_timestamps": True},
        ],
        ids=lambda kwargs: ",".join(kwargs),
    )
    def test_scores_and_what_is_decided_by_them(self, device: torch.device, kwargs: dict[str, Any], loops: list[int]) -> None:
        assert_as_stock(talkative(device, eos_bias=4.0), mel(3, device), max_new_tokens=20, **kwargs)
        assert len(loops) >= 2

    def test_the_scores_of_samples_are_those_they_were_drawn_from(self, device: torch.device) -> None:
        model, features = talkative(device), mel(2, device)
        with accelerated(model):
            output = model.generate(features, **SAMPLING, return_dict_in_generate=True, output_scores=True)
        scores = torch.stack(output.scores, 1)
        drawn = scores.gather(2, output.sequences[:, -scores.shape[1] :, None])
        assert drawn.isfinite().all()
        left = scores.isfinite()

        def again(model: WhisperForConditionalGeneration) -> torch.Tensor:
            with torch.no_grad():
                logits = model(features.to(model.dtype), decoder_input_ids=output.sequences[:, :-1]).logits
            return (logits[:, -scores.shape[1] :] / SAMPLING["temperature"])[left]

        assert_same(scores[left], again(model), again(copy.deepcopy(model).double()))

    def test_settings_that_change_from_call_to_call(self, device: torch.device, loops: list[int]) -> None:
        model, features = talkative(device, eos_bias=2.0), mel(2, device)
        calls = [
            {"max_new_tokens": 9},
            {"return_timestamps": True},
            {"suppress_tokens": [3, 5]},
            {"max_new_tokens": 3},
            {"min_length": 30},
        ]
        stock = [model.generate(features, **kwargs).tolist() for kwargs in calls]
        with accelerated(model):
            assert [model.generate(features, **kwargs).tolist() for kwargs in calls] == stock
        assert len(loops) >= len(calls)
        assert len({str(tokens) for tokens in stock}) == len(calls)

    def test_buffers_made_in_inference_mode_serve_outside_it(self, device: torch.device, loops: list[int]) -> None:
        model, features = talkative(device), mel(2, device)
        stock = model.generate(features, max_new_tokens=8)
        with accelerated(model):
            with torch.inference_mode():
                inside = model.generate(features, max_new_tokens=8)
            outside = model.generate(features, max_new_tokens=8)
        assert inside.tolist() == outside.tolist() == stock.tolist()
        assert len(loops) == 2


SAMPLING = {"temperature": 0.8, "max_new_tokens": 10}  # and transformers' default of top_k, 50


class TestSampling:
    @row("temperature with top-k up to 128 (50 by default) or without, its tokens from a random stream of our own", "ours")
    def test_a_seed_gives_the_same_tokens(self, device: torch.device, loops: list[int]) -> None:
        model, results = talkative(device), []
        with accelerated(model):
            for seed in (1, 1, 2):
                torch.manual_seed(seed)
                results.append(model.generate(mel(2, device), **SAMPLING).tolist())
        assert results[0] == results[1] != results[2]
        assert len(loops) == 3

    @pytest.mark.parametrize("top_k", [1, 3, 0])
    def test_only_the_most_probable_are_drawn(self, device: torch.device, top_k: int, loops: list[int]) -> None:
        """The scores of those that are not are stock's: -inf. Greedy calls before and after it are not changed."""
        model, features = talkative(device), mel(2, device)
        with accelerated(model):
            greedy = [model.generate(features, max_new_tokens=10).tolist()]
            output = model.generate(features, **SAMPLING, top_k=top_k, return_dict_in_generate=True, output_scores=True)
            greedy.append(model.generate(features, max_new_tokens=10).tolist())
        kept = torch.stack(output.scores, 1).isfinite()
        tokens = output.sequences[:, -kept.shape[1] :]
        assert kept.gather(2, tokens[..., None]).all()
        assert (kept.sum(-1) == top_k).all() if top_k else (kept.sum(-1) > 50).all()
        assert greedy[0] == greedy[1]
        assert (tokens.tolist() == [row[-10:] for row in greedy[0]]) == (top_k == 1)
        assert len(loops) == 3

    def test_falling_back_to_temperatures(self, device: torch.device, loops: list[int]) -> None:
        """As Whisper does it: greedy first, then drawn, in one call."""
        model, temperatures = talkative(device), (0.0, 0.4, 0.8)
        with accelerated(model):
            model.generate(mel(2, device), temperature=temperatures, compression_ratio_threshold=0.1, max_new_tokens=10)
        assert len(loops) == len(temperatures)

    def test_a_row_is_the_same_whatever_the_batch(self, device: torch.device) -> None:
        model, features, results = talkative(device), mel(3, device), []
        with accelerated(model):
            for B in (1, 3):
                torch.manual_seed(5)
                results.append(model.generate(features[:B], **SAMPLING).tolist()[0])
        alone, beside = results
        assert beside[: len(alone)] == alone
        assert set(beside[len(alone) :]) <= {EOS}  # what pads a row that ends before the others

    @staticmethod
    def sampled(model: WhisperForConditionalGeneration, features: torch.Tensor, **kwargs: Any) -> list[list[int]]:
        """A row's tokens, without what pads it."""
        torch.manual_seed(5)
        return [row[: row.index(EOS)] if EOS in row else row for row in model.generate(features, **kwargs).tolist()]

    @pytest.mark.parametrize("top_k", [50, 0])
    def test_a_row_is_the_same_wherever_in_the_batch(self, device: torch.device, top_k: int) -> None:
        model, features = talkative(device), mel(3, device)
        with accelerated(model):
            rows = [self.sampled(model, features[i : i + 1], **SAMPLING, top_k=top_k)[0] for i in range(3)]
            for order in ([0, 1, 2], [2, 0, 1], [1, 0]):
                assert self.sampled(model, features[order], **SAMPLING, top_k=top_k) == [rows[i] for i in order]
        assert len({tuple(row) for row in rows}) == 3

    def test_a_row_is_the_same_whatever_temperatures_others_need(
        self, device: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, features, sizes, run = talkative(device), mel(4, device), [], decode_loop.run_until_ended

        def spy(advance: Callable[[], object], selection: decode_loop.TokenSelection, *args: Any) -> int:
            sizes.append(len(selection.state.ids))
            return run(advance, selection, *args)

        monkeypatch.setattr(decode_loop, "run_until_ended", spy)
        found = set()
        for threshold in (-2.0, -1.5, -1.0):
            kwargs = SAMPLING | {"temperature": (0.0, 0.4, 0.8, 1.2), "logprob_threshold": threshold}
            with accelerated(model):
                rows, attempts = [], []
                for i in range(4):
                    sizes.clear()
                    rows += self.sampled(model, features[i : i + 1], **kwargs)
                    attempts.append(len(sizes))
                for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
                    sizes.clear()
                    assert self.sampled(model, features[order], **kwargs) == [rows[i] for i in order]
            found |= set(attempts)
            assert sizes == [sum(attempt > i for attempt in attempts) for i in range(max(attempts))]
        assert len(found) > 1

    def test_a_row_is_the_same_whatever_windows_others_have(self, device: torch.device, loops: list[int]) -> None:
        features, lengths = mel(3, device, seconds=4.5), (450, 210, 330)
        mask = torch.stack([torch.arange(450, device=device) < length for length in lengths]).long()
        kwargs = SAMPLING | {"return_timestamps": True}
        with accelerated(talkative(device)) as model:
            beside = self.sampled(model, features, attention_mask=mask, **kwargs)
            assert len(loops) > 3
            for i, length in enumerate(lengths):
                assert self.sampled(model, features[i : i + 1, :, :length], **kwargs) == beside[i : i + 1]

    @pytest.mark.parametrize("temperature", [0.8, (0.0, 0.8)])
    def test_equal_rows_draw_different_tokens(self, device: torch.device, temperature: float | tuple[float, ...]) -> None:
        kwargs = SAMPLING | {"temperature": temperature, "compression_ratio_threshold": 0.0}
        with accelerated(talkative(device)) as model:
            features = mel(1, device)
            copies = self.sampled(model, features.repeat(3, 1, 1), **kwargs)
            alone = self.sampled(model, features, **kwargs)
            sequences = self.sampled(model, features, **kwargs, num_return_sequences=3, do_sample=True)
        assert len({tuple(row) for row in copies}) == 3
        assert copies[0] == alone[0]
        assert sequences == copies

    def test_each_temperature_and_each_call_draws_anew(self, device: torch.device) -> None:
        kwargs = SAMPLING | {"compression_ratio_threshold": 0.0}  # which nothing meets
        with accelerated(talkative(device)) as model:
            once, twice = (self.sampled(model, mel(1, device), **kwargs | {"temperature": t}) for t in ((0.8,), (0.8, 0.8)))
            again = model.generate(mel(1, device), **kwargs).tolist()
        assert len({str(once[0]), str(twice[0]), str(again[0])}) == 3

    def test_a_call_draws_one_number_and_a_greedy_one_none(self, device: torch.device) -> None:
        def state() -> list[int]:
            return (torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()).tolist()

        torch.manual_seed(5)
        torch.randint(1 << 62, (), device=device)
        after_one = state()
        with accelerated(talkative(device)) as model:
            self.sampled(model, mel(2, device), **SAMPLING | {"temperature": (0.4, 0.8)}, compression_ratio_threshold=0.0)
            assert state() == after_one
            model.generate(mel(2, device), max_new_tokens=10)
            assert state() == after_one

    def test_of_given_states_the_states_count(self, device: torch.device) -> None:
        with accelerated(talkative(device)) as model:
            with torch.no_grad():
                states = model.model.encoder(mel(3, device)).last_hidden_state

            def sampled(rows: list[int]) -> list[list[int]]:
                return self.sampled(model, None, encoder_outputs=BaseModelOutput(last_hidden_state=states[rows]), **SAMPLING)

            alone, beside = sampled([1]), sampled([0, 2, 1])
        assert beside[2] == alone[0]
        assert len({tuple(row) for row in beside}) == 3


class Streamer(BaseStreamer):
    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        pass


class AfterTwelve(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 12, device=input_ids.device)


NOT_COVERED = [
    ("top-p, other warpers, a greater top-k", {"temperature": 0.7, "top_k": 129}),
    ("top-p, other warpers, a greater top-k", {"temperature": 0.7, "top_p": 0.8}),
    ("top-p, other warpers, a greater top-k", {"temperature": 0.7, "typical_p": 0.8}),
    ("beam search, an assistant", {"num_beams": 2}),
    ("attentions, hidden states", {"return_dict_in_generate": True, "output_hidden_states": True}),
    ("attentions, hidden states", {"return_dict_in_generate": True, "output_attentions": True}),
    ("a user's logits processors or stopping criteria", {"logits_processor": [Recorder()]}),
    (
        "a user's logits processors or stopping criteria",
        {"logits_processor": [SuppressTokensLogitsProcessor([4])], "return_timestamps": True},
    ),
    ("a user's logits processors or stopping criteria", {"stopping_criteria": [AfterTwelve()]}),
    ("other processors, as a repetition penalty", {"repetition_penalty": 1.3}),
    ("token timestamps", {"return_token_timestamps": True}),
    ("a limit of time, strings to stop at", {"max_time": 1000.0}),
    ("no cache, another cache", {"use_cache": False}),
    ("no cache, another cache", {"cache_implementation": "static", "disable_compile": True}),
]
for name, _ in NOT_COVERED:
    row(name, "stock's")


class TestStocksLoop:
    @pytest.mark.parametrize("kwargs", [kwargs for _, kwargs in NOT_COVERED], ids=lambda kwargs: ",".join(kwargs))
    def test_what_is_not_covered(self, device: torch.device, kwargs: dict[str, Any], loops: list[int]) -> None:
        model, results = talkative(device), []
        for context in (torch.no_grad(), accelerated(model)):
            torch.manual_seed(0)
            with context:
                result = model.generate(mel(2, device), max_new_tokens=14, **kwargs)
            results.append(result if isinstance(result, torch.Tensor) else result["sequences"])
        assert results[0].tolist() == results[1].tolist()
        assert not loops

    @row("a `custom_generate` of the user's", "the user's")
    def test_a_loop_of_the_users(self, device: torch.device, loops: list[int]) -> None:
        """It finds an accelerated model, whose steps are over our cache."""
        caches = []

        def second_best(model: WhisperForConditionalGeneration, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            caches.append(type(kwargs[CACHE_NAME]))
            given = {name: kwargs[name] for name in ("encoder_outputs", CACHE_NAME)}
            new = input_ids
            for _ in range(8):
                logits = model(decoder_input_ids=new, use_cache=True, **given).logits
                new = logits[:, -1].topk(2).indices[:, 1:]
                input_ids = torch.cat([input_ids, new], 1)
            return input_ids

        model, features = talkative(device), mel(2, device)
        stock = model.generate(features, custom_generate=second_best).tolist()
        with accelerated(model):
            assert model.generate(features, custom_generate=second_best).tolist() == stock
        assert not loops
        assert caches[0] is not caches[1] is StaticEncoderDecoderCache
        assert len(set(stock[0])) > 4

    def test_an_assistant(self, device: torch.device, loops: list[int]) -> None:
        model, features, assistant = talkative(device), mel(1, device), tiny_whisper(device, seed=5)
        stock = model.generate(features, max_new_tokens=14, assistant_model=assistant).tolist()
        with accelerated(model):
            assert model.generate(features, max_new_tokens=14, assistant_model=assistant).tolist() == stock
        assert not loops

    def test_strings_to_stop_at(self, device: torch.device, loops: list[int], tmp_path: Path) -> None:
        model, features = talkative(device), mel(1, device)
        tokenizer = load_model(str(write_directory(tmp_path, model)), torch.float32, "cpu")[1].tokenizer
        whole = model.generate(features, max_new_tokens=14)[0]
        kwargs = {"max_new_tokens": 14, "tokenizer": tokenizer, "stop_strings": [tokenizer.decode(whole[5:6])]}
        stock = model.generate(features, **kwargs)[0].tolist()
        with accelerated(model):
            assert model.generate(features, **kwargs)[0].tolist() == stock
        assert not loops
        assert len(stock) < len(whole)

    def test_the_log_says_why_once(self, device: torch.device, fallbacks: Callable[[], list[str]]) -> None:
        with accelerated(talkative(device)) as model:
            for B in (1, 2):
                model.generate(mel(B, device), max_new_tokens=4, repetition_penalty=1.3)
            model.generate(mel(1, device), max_new_tokens=4)
            said = [f"{STOCKS_LOOP}: RepetitionPenaltyLogitsProcessor"]
            assert fallbacks() == said
            model.register_forward_hook(lambda *args: None)
            model.generate(mel(1, device), max_new_tokens=4)
        assert fallbacks() == [
            *said,
            "tokens are chosen in stock's loop: the model has hooks, or methods that are not transformers'",
        ]

    @pytest.mark.parametrize(
        ("kwargs", "reason"),
        [
            ({}, None),
            ({"num_beams": 1, "streamer": None, "generation_config": GenerationConfig(do_sample=True)}, None),
            ({"streamer": Streamer()}, "streamer is given"),
            ({"num_beams": 2}, "a search over beams, or another mode of generation"),
            ({"generation_config": GenerationConfig(num_beams=2)}, "a search over beams, or another mode of generation"),
            ({"generation_config": GenerationConfig(num_beams=2), "num_beams": 1}, None),
            ({"num_beams": "two"}, "a search over beams, or another mode of generation"),
        ],
        ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
    )
    def test_what_another_loop_decodes_has_a_reason(self, kwargs: dict[str, Any], reason: str | None) -> None:
        assert why_not_our_loop(talkative(torch.device("cpu")), (), kwargs) == reason

    @row("a streamer", "stock's")
    def test_a_streamer(self, device: torch.device, loops: list[int]) -> None:
        with accelerated(talkative(device)) as model:
            model.generate(mel(1, device), max_new_tokens=4, streamer=Streamer())
        assert not loops

    @row("a batch of prompts padded on the left", "stock's")
    def test_rows_of_a_batch_padded_on_the_left(self, device: torch.device, loops: list[int]) -> None:
        features = mel(2, device, seconds=2.5)
        mask = torch.ones(2, features.shape[-1], dtype=torch.int64, device=device)
        assert_as_stock(talkative(device), features, attention_mask=mask, return_timestamps=True, condition_on_prev_tokens=True)
        assert loops  # of the first window, which has no prompt, and of windows with prompts of one length

    @pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
    @row("hooks on the model, a forward pass or another method of the user's", "stock's")
    def test_a_hook_on_the_model_is_called_at_every_step(self, device: torch.device, hook: str, loops: list[int]) -> None:
        calls: list[int] = []
        with accelerated(talkative(device)) as model:
            getattr(model, hook)(lambda *args: calls.append(1))
            model.generate(mel(1, device), max_new_tokens=8, min_new_tokens=8)
        assert len(calls) == 8
        assert not loops

    def test_a_forward_pass_of_the_users_is_called_at_every_step(self, device: torch.device, loops: list[int]) -> None:
        model, calls = talkative(device), []
        stock = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return stock(*args, **kwargs)

        model.forward = forward
        with accelerated(model):
            model.generate(mel(1, device), max_new_tokens=8, min_new_tokens=8)
        assert len(calls) == 8
        assert not loops


def test_what_an_interrupted_call_tells_late_is_not_taken(device: torch.device) -> None:
    selection, prompt = decode_loop.TokenSelection(2, 8, 20, device), torch.zeros(2, 2, dtype=torch.int64, device=device)
    settings = Settings((), None, TokenLimits(max_length=3, pad_token=0), 0.0)
    for ends in ([3, 3], [0, 0]):
        selection.begin(prompt, settings, None)
        if any(ends):
            selection(torch.zeros(2, 20, device=device))
        selection.look()
        assert selection.ends() == ends


class Device:
    """A clock for `run_until_ended`, in microseconds: steps take their time one after the other, the host a little for each."""

    def __init__(self, step: int, ends_after: int, host: int = 10) -> None:
        self.step, self.host, self.ends_after = step, host, ends_after
        self.now = self.waits = self.idle = 0
        self.finished: list[int] = []  # when each of the steps queued so far has been done
        self.marked = 0  # the steps that the event stands behind
        self.ahead = 0  # the most steps that were queued and not done

    def advance(self) -> None:
        self.now += self.host
        before = self.finished[-1] if self.finished else self.now
        self.idle += max(0, self.now - before)
        self.finished.append(max(self.now, before) + self.step)
        self.ahead = max(self.ahead, sum(when > self.now for when in self.finished))

    def record(self) -> None:
        self.marked = len(self.finished)

    def synchronize(self) -> None:
        done = self.finished[self.marked - 1] if self.marked else 0
        if done > self.now:
            self.waits += 1
            assert len(self.finished) > self.marked, "the newest step is waited for, and nothing is queued behind it"
            self.now = done

    def tolist(self) -> list[int]:
        """What the host finds in its memory: the call's number, 0, and the row's end once it is there."""
        return [self.ends_after if sum(when <= self.now for when in self.finished) >= self.ends_after else 0]


@pytest.mark.parametrize(("step", "look_every"), [(800, 1), (100, decode_loop.LOOK_EVERY)])
def test_the_host_never_waits_for_the_newest_step(step: int, look_every: int) -> None:
    """So the device is never idle; beyond the end are `look_every` steps at most, and the host is one more ahead at most."""
    for ends_after in range(1, 40):
        selection = decode_loop.TokenSelection(1, 8, 20, torch.device("cpu"))
        device = selection._event = Device(step, ends_after)
        selection.state = selection.state._replace(host_ends=device)
        assert decode_loop.run_until_ended(device.advance, selection, 440, look_every) == ends_after
        assert device.idle == 0
        assert device.ahead <= look_every + 1
        assert 0 < len(device.finished) - ends_after <= look_every
        assert device.waits <= len(device.finished) / look_every + 1


@pytest.mark.parametrize(
    ("step", "look_every", "first"),
    [(800, 1, decode_loop.QUEUED_FIRST_OF_LARGE), (125, decode_loop.LOOK_EVERY, decode_loop.QUEUED_FIRST)],
)
def test_what_the_host_does_meanwhile_keeps_no_device_waiting(step: int, look_every: int, first: int) -> None:
    """Late looks of 1.7 ms, once, with the first steps queued."""
    for ends_after in range(1, 40):
        selection, calls = decode_loop.TokenSelection(1, 8, 20, torch.device("cpu")), []
        device = selection._event = Device(step, ends_after)
        selection.state = selection.state._replace(host_ends=device)

        def meanwhile(device: Device = device, calls: list[int] = calls) -> None:
            calls.append(len(device.finished))
            device.now += 1700

        assert decode_loop.run_until_ended(device.advance, selection, 440, look_every, first, meanwhile) == ends_after
        assert calls == [first]
        assert device.idle == 0
        assert len(device.finished) <= max(ends_after + look_every, first + 1)


@pytest.mark.parametrize("steps", [1, 3, 4, 5])
def test_what_the_host_does_meanwhile_is_done_where_there_are_few_steps(steps: int) -> None:
    selection, seen = decode_loop.TokenSelection(1, 8, 20, torch.device("cpu")), []
    selection.state.host_ends.fill_(7)  # of call 0
    decode_loop.run_until_ended(lambda: seen.append("step"), selection, steps, 1, 4, lambda: seen.append("meanwhile"))
    assert seen == ["step"] * min(steps, 4) + ["meanwhile"] + ["step"] * (steps - 4)


@pytest.mark.gpu
@pytest.mark.parametrize("is_large", [False, True])
def test_no_token_is_copied_to_the_host(device: torch.device, is_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first step to the last nothing is: what stock copies comes before and after them."""
    monkeypatch.setattr(decode_loop, "LARGE", 0 if is_large else 1 << 40)
    run, seen = decode_loop.run_until_ended, []

    def profiled(*args: Any) -> int:
        torch.cuda.synchronize()
        with torch.profiler.profile() as profile:
            length = run(*args)
            torch.cuda.synchronize()
        seen.extend(event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)
        return length

    with accelerated(talkative(device)) as model:
        for _ in range(2):  # the second call finds its graphs captured
            model.generate(mel(2, device), max_new_tokens=10, min_new_tokens=10)
            monkeypatch.setattr(decode_loop, "run_until_ended", profiled)
    assert sum("_pick_token_kernel" in name for name in seen) == 9  # the first token is chosen before the steps
    assert not [name for name in seen if "DtoH" in name]


def test_readme_says_which_loop_decodes_what() -> None:
    rows = dict(re.findall(r"^\| ([^|]+) \| (ours|stock's|the user's) \|$", README.read_text(), flags=re.MULTILINE))
    assert rows == DECODED_BY
