"""`generate` on an accelerated model returns what stock returns: tokens exactly, logits and scores to rounding."""

import copy
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    WhisperForCausalLM,
    WhisperForConditionalGeneration,
)
from transformers.cache_utils import EncoderDecoderCache, StaticCache
from transformers.generation.streamers import BaseStreamer
from whisper_models import (
    FRAMES,
    LANGUAGES,
    NO_TIMESTAMPS,
    START_OF_PREVIOUS,
    assert_generates_as_stock,
    assert_same,
    mel,
    tiny_whisper,
)

from whisper_triton import accelerated, build_static_cache
from whisper_triton.cache import CACHE_NAME

pytest_plugins = ["whisper_fixtures"]


def count_encoder_runs(model: WhisperForConditionalGeneration, run: Callable[[], Any]) -> int:
    runs: list[int] = []
    handle = model.model.encoder.register_forward_hook(lambda module, args, output: runs.append(1))
    run()
    handle.remove()
    return len(runs)


def test_the_kernels_give_stocks_tokens(device: torch.device) -> None:
    assert_generates_as_stock(tiny_whisper(device, seed=3), mel(2, device), max_new_tokens=5, distinct=5)


def test_the_kernels_give_stocks_tokens_in_a_beam_search(device: torch.device) -> None:
    assert_generates_as_stock(tiny_whisper(device, seed=3), mel(1, device), num_beams=2, max_new_tokens=4, distinct=3)


@pytest.mark.usefixtures("reference_kernels")
class TestShortForm:
    def test_greedy(self, device: torch.device) -> None:
        assert_generates_as_stock(tiny_whisper(device, seed=3), mel(3, device))

    def test_sampling_with_a_seed(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        sampled = assert_generates_as_stock(model, features, do_sample=True, temperature=0.7, top_k=20, top_p=0.9)
        assert sampled.tolist() != model.generate(features).tolist()

    def test_several_sequences_an_audio(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        stock = assert_generates_as_stock(model, features, do_sample=True, num_return_sequences=3, max_new_tokens=20)
        assert stock.shape == (6, 20)

    def test_beam_search(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        beams = assert_generates_as_stock(model, features, num_beams=3, max_new_tokens=30, length_penalty=0.6)
        assert beams.tolist() != model.generate(features, max_new_tokens=30).tolist()

    def test_sampling_in_a_beam_search(self, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3)
        assert_generates_as_stock(model, mel(2, device), num_beams=3, do_sample=True, temperature=0.7, max_new_tokens=30)

    def test_timestamps(self, device: torch.device) -> None:
        tokens = assert_generates_as_stock(tiny_whisper(device, seed=3), mel(2, device), return_timestamps=True)
        assert (tokens > NO_TIMESTAMPS).sum() > 2

    def test_a_prompt(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3), mel(2, device)
        prompt = torch.tensor([START_OF_PREVIOUS, 5, 17, 42, 8], device=device)
        prompted = assert_generates_as_stock(model, features, prompt_ids=prompt)
        assert prompted.tolist() != model.generate(features).tolist()

    def test_a_prompt_of_one_token(self, device: torch.device) -> None:
        """Then the very first pass has one query token, like a step, and an empty cache."""
        model = tiny_whisper(device, seed=3)
        del model.generation_config.no_timestamps_token_id
        assert_generates_as_stock(model, mel(2, device), max_new_tokens=20)

    def test_the_language_is_detected_alike(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=4, is_multilingual=True), mel(6, device)
        languages = model.detect_language(features).tolist()
        with accelerated(model):
            assert model.detect_language(features).tolist() == languages
        assert set(languages) <= set(LANGUAGES.values())
        assert len(set(languages)) > 1
        assert_generates_as_stock(model, features, max_new_tokens=20)

    def test_a_language_and_task_an_audio(self, device: torch.device) -> None:
        model, features = tiny_whisper(device, seed=3, is_multilingual=True), mel(2, device)
        assert_generates_as_stock(model, features, language=["fr", "de"], task="translate", max_new_tokens=20)

    def test_the_encoders_output_instead_of_features(self, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3)
        with torch.no_grad():
            encoded = model.model.encoder(mel(2, device))
        stock = model.generate(encoder_outputs=encoded, max_new_tokens=20)
        with accelerated(model):
            ours = model.generate(encoder_outputs=encoded, max_new_tokens=20)
        assert ours.tolist() == stock.tolist()

    def test_no_cache(self, device: torch.device) -> None:
        assert_generates_as_stock(tiny_whisper(device, seed=3), mel(2, device), use_cache=False, max_new_tokens=12)

    def test_other_attention_shapes(self, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3, d_model=160, encoder_attention_heads=5, decoder_attention_heads=2)  # D = 80
        assert_generates_as_stock(model, mel(2, device), max_new_tokens=20)

    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_all_that_return_dict_brings(self, device: torch.device, num_beams: int) -> None:
        """Scores, logits, hidden states, and the cache, of which the caller sees no unused slot."""

        class AfterTwelve(StoppingCriteria):
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
                return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 12, device=input_ids.device)

        stock = assert_generates_as_stock(
            tiny_whisper(device, seed=3),
            mel(2, device),
            num_beams=num_beams,
            stopping_criteria=StoppingCriteriaList([AfterTwelve()]),
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            output_hidden_states=True,
        )
        assert {"scores", "logits", "decoder_hidden_states", CACHE_NAME} <= set(stock)
        assert stock[CACHE_NAME].get_seq_length() == 11

    def test_a_streamer_gets_the_same_tokens_one_by_one(self, device: torch.device) -> None:
        class Recorder(BaseStreamer):
            def __init__(self) -> None:
                self.received: list[list[int]] = []

            def put(self, value: torch.Tensor) -> None:
                self.received.append(value.flatten().tolist())

            def end(self) -> None:
                self.received.append([])

        model, features = tiny_whisper(device, seed=3), mel(1, device)
        streamed = []
        for context in (torch.no_grad(), accelerated(model)):
            recorder = Recorder()
            with context:
                model.generate(features, streamer=recorder, max_new_tokens=10)
            streamed.append(recorder.received)
        assert streamed[0] == streamed[1]
        assert len(streamed[0]) > 10

    @pytest.mark.parametrize("num_beams", [1, 3])
    def test_cache_implementation_static(self, device: torch.device, num_beams: int) -> None:
        assert_generates_as_stock(
            tiny_whisper(device, seed=3),
            mel(2, device),
            cache_implementation="static",
            disable_compile=True,
            num_beams=num_beams,
            max_new_tokens=20,
            return_dict_in_generate=True,
            output_scores=True,
        )

    def test_a_static_cache_of_a_model_whose_decoder_is_the_deeper_half(self, device: torch.device) -> None:
        """Stock sizes its static caches by the encoder's layers and fails; compare with its dynamic cache."""
        model = tiny_whisper(device, seed=3, encoder_layers=1, decoder_layers=3)
        features = mel(2, device)
        stock = model.generate(features, max_new_tokens=20)
        with accelerated(model):
            ours = model.generate(features, max_new_tokens=20, cache_implementation="static", disable_compile=True)
        assert ours.tolist() == stock.tolist()

    def test_a_cache_of_our_own_passed_by_the_user_and_used_again_after_reset(self, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3)
        cache = build_static_cache(model, 2)
        for seed in (1, 2):
            features = mel(2, device, seed=seed)
            stock = model.generate(features, max_new_tokens=20)
            with accelerated(model):
                ours = model.generate(features, max_new_tokens=20, past_key_values=cache, disable_compile=True)
            assert ours.tolist() == stock.tolist()
            cache.reset()


@pytest.mark.usefixtures("reference_kernels")
class TestAssistant:
    """Speculative decoding needs caches that can be cut back, so it stays stock's: results and refusals."""

    def outcome(self, model: WhisperForConditionalGeneration, features: torch.Tensor, **kwargs: Any) -> Any:
        try:
            return model.generate(features, max_new_tokens=12, **kwargs).tolist()
        except Exception as error:
            return type(error), str(error)

    def outcomes(self, model: WhisperForConditionalGeneration, features: torch.Tensor, **kwargs: Any) -> tuple[Any, Any]:
        stock = self.outcome(model, features, **kwargs)
        with accelerated(model):
            return self.outcome(model, features, **kwargs), stock

    def causal_lm(self, device: torch.device, **config: Any) -> WhisperForCausalLM:
        donor = tiny_whisper(device, seed=5, decoder_layers=1, **config)
        assistant = WhisperForCausalLM(donor.config).to(device).eval()
        assistant.model.decoder.load_state_dict(donor.model.decoder.state_dict())
        assistant.generation_config = donor.generation_config
        return assistant

    def test_an_assistant_that_stock_accepts_gives_the_same_tokens(self, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3)
        ours, stock = self.outcomes(model, mel(1, device), assistant_model=self.causal_lm(device))
        assert isinstance(stock, list)
        assert ours == stock

    def test_an_accelerated_assistant_gives_the_same_tokens(self, device: torch.device) -> None:
        model, assistant, features = tiny_whisper(device, seed=3), tiny_whisper(device, seed=5), mel(1, device)
        stock = self.outcome(model, features, assistant_model=assistant)
        assert isinstance(stock, list)
        with accelerated(model), accelerated(assistant):
            assert self.outcome(model, features, assistant_model=assistant) == stock

    @pytest.mark.parametrize(
        ("batch_size", "kwargs"),
        [
            (2, {}),
            (1, {"cache_implementation": "static", "disable_compile": True}),
            (1, {"use_cache": False}),
            (1, {"num_return_sequences": 2}),
        ],
        ids=["batch", "static cache", "no cache", "several sequences"],
    )
    def test_what_stock_refuses_is_refused_in_its_words(
        self, device: torch.device, batch_size: int, kwargs: dict[str, Any]
    ) -> None:
        model = tiny_whisper(device, seed=3)
        ours, stock = self.outcomes(model, mel(batch_size, device), assistant_model=self.causal_lm(device), **kwargs)
        kind, words = stock
        found, ours_words = ours
        assert found is kind
        # Since transformers 5.24 the words name a static cache's classes, which are ours.
        assert re.sub(r"\b(Self|Cross)AttentionLayer", "StaticLayer", ours_words) == words.replace("StaticCache(", "Cache(")

    def test_an_assistant_with_another_encoder_is_refused_in_stocks_words(self, device: torch.device) -> None:
        assistant = self.causal_lm(device, encoder_layers=2)
        ours, stock = self.outcomes(tiny_whisper(device, seed=3), mel(1, device), assistant_model=assistant)
        assert stock[0] is ValueError
        assert ours == stock

    def test_a_static_cache_is_refused_with_an_assistant_as_stocks_is(self, device: torch.device) -> None:
        model = tiny_whisper(device, seed=3)
        caches = (
            EncoderDecoderCache(StaticCache(model.config, 64), StaticCache(model.config, FRAMES)),
            build_static_cache(model, 1),
        )
        for cache in caches:
            kwargs = {"assistant_model": self.causal_lm(device), "past_key_values": cache, "disable_compile": True}
            kind, message = self.outcome(model, mel(1, device), **kwargs)
            assert kind is TypeError
            assert message.startswith("`crop` is only defined for dynamic cache")


@pytest.mark.usefixtures("reference_kernels")
class TestLongForm:
    """The tiny models' window is one second, so three seconds are what ninety are to the real ones."""

    def test_one_audio(self, device: torch.device) -> None:
        assert_generates_as_stock(tiny_whisper(device, seed=3), mel(1, device, seconds=3), return_timestamps=True)

    def test_a_batch_of_different_lengths(self, device: torch.device) -> None:
        features = mel(3, device, seconds=3)
        mask = torch.ones(3, features.shape[-1], dtype=torch.int64, device=device)
        for row, frames in enumerate((300, 120, 210)):
            mask[row, frames:] = 0
            features[row, :, frames:] = 0
        assert_generates_as_stock(tiny_whisper(device, seed=3), features, attention_mask=mask, return_timestamps=True)

    @pytest.mark.parametrize("batch_size", [1, 2])
    def test_conditioned_on_the_previous_tokens(self, device: torch.device, batch_size: int) -> None:
        """Rows of a batch that have less to say are padded on the left."""
        model, features = tiny_whisper(device, seed=3), mel(batch_size, device, seconds=2.5)
        kwargs = {
            "return_timestamps": True,
            "attention_mask": torch.ones(batch_size, features.shape[-1], dtype=torch.int64, device=device),
        }
        conditioned = assert_generates_as_stock(model, features, condition_on_prev_tokens=True, **kwargs)
        assert conditioned.tolist() != model.generate(features, **kwargs).tolist()

    def test_conditioned_on_a_prompt_in_all_segments(self, device: torch.device) -> None:
        assert_generates_as_stock(
            tiny_whisper(device, seed=3),
            mel(1, device, seconds=2.5),
            return_timestamps=True,
            condition_on_prev_tokens=True,
            prompt_ids=torch.tensor([START_OF_PREVIOUS, 5, 17], device=device),
            prompt_condition_type="all-segments",
        )

    def test_temperature_fallback(self, device: torch.device) -> None:
        """A threshold that no segment meets, so that each is tried at every temperature."""
        model, features = tiny_whisper(device, seed=3), mel(2, device, seconds=2)
        kwargs = {
            "return_timestamps": True,
            "attention_mask": torch.ones(2, features.shape[-1], dtype=torch.int64, device=device),
            "compression_ratio_threshold": 1.35,
        }
        thresholds = {"logprob_threshold": 0.0, "no_speech_threshold": 0.6, "temperature": (0.0, 0.4, 0.8)}
        assert_generates_as_stock(model, features, condition_on_prev_tokens=True, **thresholds, **kwargs)
        greedy = count_encoder_runs(model, lambda: model.generate(features, **kwargs))
        assert count_encoder_runs(model, lambda: model.generate(features, **thresholds, **kwargs)) > 2 * greedy

    def test_segments_with_their_results(self, device: torch.device) -> None:
        stock = assert_generates_as_stock(
            tiny_whisper(device, seed=3),
            mel(1, device, seconds=2),
            return_timestamps=True,
            return_segments=True,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert len(stock["segments"][0]) > 1

    def test_cache_implementation_static(self, device: torch.device) -> None:
        """Stock then pads the batch to its first size, and prompts to their greatest length."""
        features = mel(2, device, seconds=2.5)
        mask = torch.ones(2, features.shape[-1], dtype=torch.int64, device=device)
        mask[1, 120:] = 0
        assert_generates_as_stock(
            tiny_whisper(device, seed=3),
            features,
            attention_mask=mask,
            return_timestamps=True,
            condition_on_prev_tokens=True,
            cache_implementation="static",
            disable_compile=True,
        )


def sound(name: str, speech: np.ndarray) -> np.ndarray:
    """As long as `speech`, 16 kHz: silence, white noise, chords that change twice a second, or two voices at once."""
    time, random = np.arange(len(speech)) / 16000, np.random.default_rng(0)
    if name == "silence":
        return np.zeros_like(speech)
    if name == "noise":
        return 0.1 * random.standard_normal(len(speech)).astype(np.float32)
    if name == "chords":
        root = 220 * 2 ** (random.integers(0, 12, 60)[(2 * time).astype(int)] / 12)
        phase = 2 * np.pi * np.cumsum(root) / 16000
        return (0.1 * sum(np.sin(phase * ratio) for ratio in (1, 1.25, 1.5))).astype(np.float32)
    other = np.interp(0.8 * np.arange(len(speech)), np.arange(len(speech)), speech)  # lower and slower
    return (0.5 * (speech + np.roll(other, 16000))).astype(np.float32)


class Watching(BaseStreamer):
    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


class Seldom(LogitsProcessor):
    """Makes every third token less likely, and notes how many there are before."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.shape[1])
        scores = scores.clone()
        scores[:, ::3] -= 0.5
        return scores


class AfterTwenty(StoppingCriteria):
    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids[:, -1].tolist())
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 20, device=input_ids.device)


class Spoken(NamedTuple):
    """A call over the spoken sample, and what is known of it."""

    options: Callable[[Any, list[Any]], dict[str, Any]]  # of the processor, and a list for what the call shows
    is_ours: bool = True  # our loop decodes it
    is_watched: bool = False  # something looks on
    has_scores: bool = False
    is_long: bool = False
    words: int = 8  # at the text's beginning that must be there


def scores_of(**options: Any) -> Callable[[Any, list[Any]], dict[str, Any]]:
    return lambda processor, seen: {"return_dict_in_generate": True, "output_scores": True} | options


LONG = {"truncation": False, "padding": "longest", "return_attention_mask": True}
SPOKEN = {
    "a prompt": Spoken(lambda processor, seen: {"prompt_ids": processor.get_prompt_ids("Hills.", return_tensors="pt")}),
    "scores": Spoken(scores_of(max_new_tokens=8), has_scores=True, words=6),
    "scores of segments": Spoken(
        scores_of(return_timestamps=True, return_segments=True, max_new_tokens=8), has_scores=True, words=6
    ),
    "a streamer": Spoken(lambda processor, seen: {"streamer": Watching(seen)}, is_ours=False, is_watched=True),
    "logits processors": Spoken(
        lambda processor, seen: {"logits_processor": [Seldom(seen)]}, is_ours=False, is_watched=True, words=0
    ),
    "stopping criteria": Spoken(
        lambda processor, seen: {"stopping_criteria": [AfterTwenty(seen)]}, is_ours=False, is_watched=True
    ),
    "segments": Spoken(lambda processor, seen: {"return_timestamps": True, "return_segments": True}),
    "segments of forty seconds": Spoken(
        lambda processor, seen: {"return_timestamps": True, "return_segments": True, "condition_on_prev_tokens": True},
        is_long=True,
    ),
}


@pytest.mark.usefixtures("reference_kernels", "eager_steps")
class TestTinyEn:
    """The real tiny.en on the spoken sample and on what is no speech, its tokens chosen in our loop but for beams."""

    def tokens(self, tiny_en: tuple, audio: list[np.ndarray], **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Ours and stock's."""
        model, processor = tiny_en
        long = {"truncation": False, "padding": "longest", "return_attention_mask": True} if len(audio[0]) > 480000 else {}
        inputs = processor(audio, sampling_rate=16000, return_tensors="pt", **long).to(model.device)
        torch.manual_seed(0)
        stock = model.generate(**inputs, **kwargs)
        torch.manual_seed(0)
        with accelerated(model):
            return model.generate(**inputs, **kwargs), stock

    def test_a_batch_of_different_lengths(self, tiny_en: tuple, speech: np.ndarray, speech_text: str, loops: list[int]) -> None:
        ours, stock = self.tokens(tiny_en, [speech, speech[: 4 * 16000]])
        assert ours.tolist() == stock.tolist()
        assert len(loops) == 1
        texts = tiny_en[1].batch_decode(ours, skip_special_tokens=True)
        assert texts[0].strip() == speech_text
        assert speech_text.startswith(texts[1].strip().rstrip(".").rstrip())

    def test_timestamps_in_a_beam_search(self, tiny_en: tuple, speech: np.ndarray) -> None:
        ours, stock = self.tokens(tiny_en, [speech], return_timestamps=True, num_beams=2)
        assert ours.tolist() == stock.tolist()
        assert (ours >= tiny_en[0].generation_config.no_timestamps_token_id).any()

    def test_forty_seconds_with_the_usual_thresholds(self, tiny_en: tuple, speech: np.ndarray, loops: list[int]) -> None:
        ours, stock = self.tokens(
            tiny_en,
            [np.tile(speech, 4)],
            return_timestamps=True,
            condition_on_prev_tokens=True,
            temperature=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
            compression_ratio_threshold=2.4,
            logprob_threshold=-1.0,
            no_speech_threshold=0.6,
        )
        assert ours.tolist() == stock.tolist()
        assert len(loops) > 1
        text = tiny_en[1].batch_decode(ours, skip_special_tokens=True)[0]
        assert text.count("quiet valley") == 4

    @pytest.mark.parametrize("option", SPOKEN)
    def test_speech_with(self, option: str, tiny_en: tuple, speech: np.ndarray, speech_text: str, loops: list[int]) -> None:
        """Equal in all that is handed out and, of what a call is given to look on, in what it has seen."""
        case = SPOKEN[option]
        model, processor = tiny_en
        audio, long = (np.tile(speech, 4), LONG) if case.is_long else (speech, {})
        inputs = processor([audio], sampling_rate=16000, return_tensors="pt", **long).to(model.device)

        def run(model: WhisperForConditionalGeneration) -> tuple[Any, list[Any]]:
            seen: list[Any] = []
            features = {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in inputs.items()}
            return model.generate(**features, **case.options(processor, seen)), seen

        stock, stock_seen = run(model)
        exact = run(copy.deepcopy(model).double()) if case.has_scores else (stock, stock_seen)
        with accelerated(model):
            ours, seen = run(model)
        assert_same(ours, stock, exact[0])
        assert seen == stock_seen
        assert bool(loops) == case.is_ours
        assert bool(seen) == case.is_watched
        tokens = stock if isinstance(stock, torch.Tensor) else stock["sequences"]
        words = processor.batch_decode(tokens, skip_special_tokens=True)[0].split()
        assert words[: case.words] == speech_text.split()[: case.words]

    @pytest.mark.parametrize("name", ["silence", "noise", "chords", "two speakers"])
    def test_what_is_not_one_voice(self, name: str, tiny_en: tuple, speech: np.ndarray, loops: list[int]) -> None:
        options = {"return_timestamps": True, "return_segments": True, "max_new_tokens": 40}
        ours, stock = self.tokens(tiny_en, [sound(name, speech)], **options)
        assert ours["sequences"].tolist() == stock["sequences"].tolist()
        assert loops  # one window, or two where the first ends at a timestamp
        for mine, theirs in zip(ours["segments"], stock["segments"], strict=True):
            assert [(float(s["start"]), float(s["end"]), s["tokens"].tolist()) for s in mine] == [
                (float(s["start"]), float(s["end"]), s["tokens"].tolist()) for s in theirs
            ]

    def test_logits(self, tiny_en: tuple, speech: np.ndarray) -> None:
        model, processor = tiny_en
        features = processor(speech, sampling_rate=16000, return_tensors="pt").input_features.to(model.device)
        assert_generates_as_stock(model, features, max_new_tokens=6, distinct=6)


@pytest.mark.usefixtures("reference_kernels", "eager_steps")
@pytest.mark.parametrize("name", ["speech", *(pytest.param(n, marks=pytest.mark.gpu) for n in ("noise", "two speakers"))])
def test_half_precision_differs_from_stocks_only_at_ties(
    name: str, tiny_en: tuple, speech: np.ndarray, loops: list[int]
) -> None:
    """Where another token is chosen first, the two are as close as fp16's rounding of the logits makes them."""
    exact, processor = tiny_en
    model, audio = copy.deepcopy(exact).half(), speech if name == "speech" else sound(name, speech)
    features = processor(audio, sampling_rate=16000, return_tensors="pt").input_features.to(model.device)
    stock = model.generate(features.half(), max_new_tokens=60)[0]
    with accelerated(model):
        ours = model.generate(features.half(), max_new_tokens=60)[0]
    assert len(loops) == 1
    n = min(len(ours), len(stock))
    differs = (ours[:n] != stock[:n]).nonzero()
    if len(differs) == 0:
        assert len(ours) == len(stock)
        return
    first = int(differs[0])
    prompt = [exact.generation_config.decoder_start_token_id, exact.generation_config.no_timestamps_token_id]
    ids = torch.cat([torch.tensor([prompt], device=model.device), ours[None, :first]], 1)
    with torch.no_grad():
        wanted = exact(features, decoder_input_ids=ids).logits[0, -1]
        rounded = model(features.half(), decoder_input_ids=ids).logits[0, -1]
    gap = (wanted[ours[first]] - wanted[stock[first]]).abs()
    assert gap <= 2 * (rounded - wanted).abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("num_beams", [1, 2])
def test_half_precision_transcribes_the_sample(tiny_en: tuple, speech: np.ndarray, speech_text: str, num_beams: int) -> None:
    model, processor = copy.deepcopy(tiny_en[0]).half(), tiny_en[1]
    features = processor(speech, sampling_rate=16000, return_tensors="pt").input_features.to(model.device, torch.float16)
    with accelerated(model):
        for _ in range(2):  # the second call replays what the first has captured
            tokens = model.generate(features, num_beams=num_beams)
            assert processor.batch_decode(tokens, skip_special_tokens=True)[0].strip() == speech_text
