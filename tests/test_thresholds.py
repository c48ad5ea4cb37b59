"""Whisper's thresholds inside `generate`: what they compare is stock's, from what the selection and the prompt leave behind.

Stock decides by the scores of all steps, which it takes to the host, and by a second pass over the prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import relative_error
from transformers import WhisperForConditionalGeneration
from transformers.generation.logits_process import WhisperNoSpeechDetection
from transformers.modeling_outputs import BaseModelOutput
from whisper_models import EOS, START_OF_PREVIOUS, assert_same, mel, tensors_of, tiny_whisper
from whisper_triton.kernels.cross_attention import cross_attention_reference
from whisper_triton.kernels.embed_tokens import embed_tokens_reference
from whisper_triton.kernels.skinny_linear import skinny_linear_reference

from whisper_triton import accelerated, cross_projections, decode_loop, decoder, fused, generation
from whisper_triton.coverage import returns_tokens_alone

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels", "eager_steps")

Model = WhisperForConditionalGeneration


@pytest.fixture(autouse=True)
def _modules(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, the steps run in the model's modules, or in the chain of the kernels' references where a test says so."""
    if device.type == "cpu":
        monkeypatch.setattr(decoder, "is_fusable", lambda model, batch_size: False)
        monkeypatch.setattr(fused, "skinny_linear", skinny_linear_reference)
        monkeypatch.setattr(fused, "cross_attention", cross_attention_reference)
        monkeypatch.setattr(fused, "embed_tokens", embed_tokens_reference)


def talkative(device: torch.device, **options: Any) -> Model:
    """A tiny model whose rows end at different lengths."""
    model = tiny_whisper(device, seed=3, **options)
    model.model.decoder.embed_tokens.weight.data[EOS] *= 4.0
    return model


def means(model: Model, features: torch.Tensor, monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> list[float]:
    """The mean log-probability of each row that stock's own function computes, which gets all scores."""
    seen: list[float] = []
    with monkeypatch.context() as patch:
        stock = WhisperForConditionalGeneration._retrieve_avg_logprobs

        def recorded(*args: Any) -> torch.Tensor:
            seen.append(stock(*args))
            return seen[-1]

        patch.setattr(WhisperForConditionalGeneration, "_retrieve_avg_logprobs", staticmethod(recorded))
        model.generate(features, **kwargs)
    return [float(mean) for mean in seen]


@pytest.fixture
def our_means(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What is computed from the log-probabilities of the tokens alone."""
    seen: list[float] = []

    def recorded(*args: Any) -> torch.Tensor:
        seen.append(float(decode_loop.mean_logprob(*args)))
        return torch.tensor(seen[-1])

    monkeypatch.setattr(generation, "mean_logprob", recorded)
    return seen


class TestLogProbability:
    @pytest.mark.parametrize(
        "kwargs",
        [
            {},
            {"return_timestamps": True},
            {"suppress_tokens": [5, 17, *range(60, 90)], "min_new_tokens": 12},
            {"max_new_tokens": 1},
            {"prompt_ids": torch.tensor([START_OF_PREVIOUS, 5, 17])},
        ],
        ids=",".join,
    )
    def test_the_mean_is_stocks(
        self, device: torch.device, kwargs: dict[str, Any], our_means: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        model, features = talkative(device), mel(5, device)
        kwargs |= {"logprob_threshold": -9.0, "temperature": (0.0, 0.0)}
        stock = means(model, features, monkeypatch, **kwargs)
        with accelerated(model):
            model.generate(features, **kwargs)
        torch.testing.assert_close(our_means, stock, rtol=1e-4, atol=1e-5)
        assert len(set(our_means)) >= 5

    @pytest.mark.parametrize("top_k", [0, 3, 50])
    def test_of_samples_too(
        self, device: torch.device, top_k: int, our_means: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without the temperature, and among the `top_k` alone, as stock has it."""
        features, kwargs = mel(3, device), {"temperature": 0.7, "top_k": top_k, "logprob_threshold": -9.0}
        with accelerated(talkative(device)) as model:
            torch.manual_seed(0)
            from_scores = means(model, features, monkeypatch, **kwargs)
            assert not our_means
            torch.manual_seed(0)
            model.generate(features, **kwargs)
        torch.testing.assert_close(our_means, from_scores, rtol=1e-4, atol=1e-5)
        assert len(our_means) == 3

    def test_no_scores_are_kept_for_it(self, device: torch.device, loops: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        """Nor a row that has ended decoded."""

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("nobody asked for scores")

        asked: list[bool] = []
        advance = decoder.DecoderStep.advance

        def recorded(*args: Any, decodes_ended: bool) -> Callable[[], torch.Tensor]:
            asked.append(decodes_ended)
            return advance(*args, decodes_ended=decodes_ended)

        monkeypatch.setattr(decoder.DecoderStep, "advance", recorded)
        model, features, kwargs = talkative(device), mel(3, device), {"logprob_threshold": -9.0, "temperature": (0.0,)}
        stock = model.generate(features, **kwargs)
        with accelerated(model), monkeypatch.context() as patch:
            patch.setattr(decode_loop, "apply_rules", refuse)
            assert model.generate(features, **kwargs).tolist() == stock.tolist()
        assert asked == [False]
        assert len(loops) == 1

    @pytest.mark.parametrize(
        "seen",
        [
            {"return_segments": True},
            {"return_dict_in_generate": True},
            {"return_dict_in_generate": True, "return_timestamps": True},
        ],
        ids=",".join,
    )
    def test_who_sees_scores_gets_stocks(self, device: torch.device, seen: dict[str, Any], loops: list[int]) -> None:
        model, features = talkative(device), mel(2, device)
        kwargs = {"logprob_threshold": -9.0, "temperature": (0.0,), "max_new_tokens": 6} | seen
        stock, exact = model.generate(features, **kwargs), copy.deepcopy(model).double().generate(features.double(), **kwargs)
        with accelerated(model):
            ours = model.generate(features, **kwargs)
        assert any("scores" in path for path in tensors_of(ours))
        assert_same(ours, stock, exact)
        assert len(loops) == 1

    @pytest.mark.parametrize("name", ["_need_fallback", "_retrieve_segment"])
    def test_who_reads_scores_in_stocks_place_gets_them(self, device: torch.device, name: str) -> None:
        model, seen = talkative(device), []
        stock = getattr(model, name)

        def reader(*args: Any, **kwargs: Any) -> Any:
            outputs, index = (kwargs["seek_outputs"], kwargs["idx"]) if kwargs else args[1:3]
            seen.append(outputs[index]["scores"][0].shape)
            return stock(*args, **kwargs)

        setattr(model, name, reader)
        with accelerated(model):
            assert not returns_tokens_alone(model, model._whisper_triton.overridden, (), {})
            model.generate(mel(2, device), max_new_tokens=4, logprob_threshold=-9.0, temperature=(0.0,))
        assert seen == [(model.config.vocab_size,)] * 2
        assert getattr(model, name) is reader

    def test_outputs_of_the_users_own_are_not_looked_into(self, device: torch.device) -> None:
        model = talkative(device)
        stock = model.generate(mel(2, device), max_new_tokens=4)

        def postprocess(seek_outputs: torch.Tensor, decoder_input_ids: torch.Tensor, **kwargs: Any) -> Any:
            return seek_outputs[:, decoder_input_ids.shape[-1] :], list(seek_outputs)

        model._postprocess_outputs = postprocess
        with accelerated(model):
            assert model.generate(mel(2, device), max_new_tokens=4).tolist() == stock.tolist()


@pytest.fixture
def detectors(monkeypatch: pytest.MonkeyPatch) -> list[WhisperNoSpeechDetection]:
    """Those that `generate` makes."""
    made: list[WhisperNoSpeechDetection] = []
    make = WhisperNoSpeechDetection.__init__

    def recorded(self: WhisperNoSpeechDetection, *args: Any, **kwargs: Any) -> None:
        made.append(self)
        make(self, *args, **kwargs)

    monkeypatch.setattr(WhisperNoSpeechDetection, "__init__", recorded)
    return made


class TestNoSpeech:
    @pytest.mark.parametrize("prompted", [False, True])
    @pytest.mark.parametrize("is_fused", [False, True])
    def test_the_probability_is_stocks_without_a_second_pass(
        self,
        device: torch.device,
        is_fused: bool,
        prompted: bool,
        detectors: list[WhisperNoSpeechDetection],
        loops: list[int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """In the modules all logits of a prompt are at hand, in the chain those of its last token alone."""
        dtype = torch.float16 if is_fused else torch.float32
        if is_fused:
            monkeypatch.setattr(decoder, "is_fusable", fused.is_fusable)
        kwargs = {"logprob_threshold": -9.0, "no_speech_threshold": 0.6, "temperature": (0.0,), "language": "de"}
        if prompted:
            kwargs["prompt_ids"] = torch.tensor([START_OF_PREVIOUS, 5, 17], device=device)
        features = mel(2, device)
        for name in (torch.float64, dtype):
            model = talkative(device, is_multilingual=True, dtype=name)
            model.generate(features.to(name), **kwargs)
        with accelerated(model), monkeypatch.context() as patch:
            patch.setattr(WhisperNoSpeechDetection, "__call__", None)
            model.generate(features.to(dtype), **kwargs)
        exact, stock, ours = (detector.no_speech_prob for detector in detectors)
        assert relative_error(ours, exact) <= 2 * relative_error(stock, exact) + torch.finfo(dtype).eps
        assert len(loops) == 1

    def test_rows_that_fall_back_keep_the_probability_of_all(
        self, device: torch.device, detectors: list[WhisperNoSpeechDetection], loops: list[int], our_means: list[float]
    ) -> None:
        """As in stock, whose detector goes on encoding the first temperature's rows."""
        model, features = talkative(device, is_multilingual=True), mel(4, device)
        kwargs = {"no_speech_threshold": 0.6, "language": "de"}
        model.generate(features, logprob_threshold=-9.0, temperature=(0.0,), **kwargs)
        with accelerated(model):
            model.generate(features, logprob_threshold=-9.0, temperature=(0.0,), **kwargs)
            threshold = sorted(our_means)[1] + 1e-3  # two rows below
            model.generate(features, logprob_threshold=threshold, temperature=(0.0, 0.4), **kwargs)
        stock, *ours = (detector.no_speech_prob for detector in detectors)
        for probabilities in ours:
            torch.testing.assert_close(probabilities, stock, rtol=1e-4, atol=1e-6)
        assert len(loops) == 3
        assert len(our_means) == 4 + 4 + 2

    def test_silence_is_skipped_as_stock_does(self, device: torch.device, loops: list[int]) -> None:
        model, features = talkative(device, is_multilingual=True), mel(2, device, seconds=2.5)
        mask = torch.ones(2, features.shape[-1], dtype=torch.int64, device=device)
        kwargs = {"attention_mask": mask, "return_timestamps": True, "temperature": (0.0,), "language": "de"}
        tokens = []
        for threshold in (0.0, 1.0):  # all windows are silent, none is
            kwargs |= {"logprob_threshold": 0.0, "no_speech_threshold": threshold}
            stock = model.generate(features, **kwargs)
            with accelerated(model):
                assert model.generate(features, **kwargs).tolist() == stock.tolist()
            tokens.append(stock.numel())
        assert tokens[0] < tokens[1]
        assert loops


class TestWhatIsProjected:
    """The cross keys and values stay for a call's further temperatures, and for nothing else."""

    @pytest.fixture
    def launches(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        launched: list[int] = []
        project = cross_projections.project_cross_kv

        def recorded(*args: Any) -> None:
            launched.append(1)
            project(*args)

        monkeypatch.setattr(cross_projections, "project_cross_kv", recorded)
        return launched

    def test_once_for_all_temperatures(self, device: torch.device, launches: list[int], loops: list[int]) -> None:
        kwargs = {"compression_ratio_threshold": 0.1, "temperature": (0.0, 0.0, 0.0)}
        model, features = talkative(device), mel(2, device)
        stock = model.generate(features, **kwargs)
        with accelerated(model):
            assert model.generate(features, **kwargs).tolist() == stock.tolist()
        assert len(loops) == 3
        assert len(launches) == 1

    @pytest.mark.parametrize(("is_multilingual", "ratio", "rows"), [(False, 0.88, 4), (True, 1.0, 2), (True, 1.1, 1)])
    def test_once_where_some_rows_fall_back(
        self,
        device: torch.device,
        is_multilingual: bool,
        ratio: float,
        rows: int,
        launches: list[int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Their keys and values are copied from where they are; of two equal rows, from either."""
        model, features, sizes = tiny_whisper(device, seed=3, is_multilingual=is_multilingual), mel(5, device), []
        features[3] = features[1]
        kwargs = {"compression_ratio_threshold": ratio, "temperature": (0.0, 0.0, 0.0), "max_new_tokens": 40}
        stock, run = model.generate(features, **kwargs), decode_loop.run_until_ended

        def recorded(advance: Callable[[], object], selection: decode_loop.TokenSelection, *args: int) -> int:
            sizes.append(len(selection.state.ids))
            return run(advance, selection, *args)

        monkeypatch.setattr(decode_loop, "run_until_ended", recorded)
        with accelerated(model):
            for _ in range(3):
                launches.clear(), sizes.clear()
                assert model.generate(features, **kwargs).tolist() == stock.tolist()
                assert sizes == [5, rows, rows]
                assert len(launches) == 1

    @pytest.mark.parametrize("what", ["states", "weights"])
    def test_anew_in_a_call_after_what_no_version_tells_of(self, device: torch.device, what: str, loops: list[int]) -> None:
        """A buffer that a graph of the caller's fills, an adapter merged through `.data`."""
        model, outputs = talkative(device), []
        with torch.no_grad():
            first, second = (model.model.encoder(mel(2, device, seed=seed)).last_hidden_state for seed in (1, 2))
        weight = model.model.decoder.layers[1].encoder_attn.v_proj.weight
        buffer, kept = first.clone(), weight.detach().clone()
        for run in (model, accelerated(model)):
            buffer.data.copy_(first)
            weight.data.copy_(kept)
            with run if run is not model else torch.no_grad():
                for _ in range(2):
                    encoded = BaseModelOutput(buffer)
                    outputs.append(model.generate(encoder_outputs=encoded, max_new_tokens=8).tolist())
                    if what == "states":
                        buffer.data.copy_(second)
                    else:
                        weight.data.mul_(-3)
        assert outputs[:2] == outputs[2:]
        assert outputs[0] != outputs[1]
        assert len(loops) == 2
