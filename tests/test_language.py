"""The language that `generate` detects where none is told: by a step that an earlier call has left, whose cross keys and values
the prompt then finds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import relative_error
from transformers import LogitsProcessor, WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperDecoder
from whisper_models import SOT, mel, tiny_whisper

from whisper_triton import accelerated, cross_projections, decoder, model_state
from whisper_triton.attention import STATE
from whisper_triton.cache import CACHE_NAME

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels", "eager_steps")

KWARGS = {"task": "transcribe", "max_new_tokens": 12}


@pytest.fixture(autouse=True)
def _no_chain(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """On a CPU steps run in the model's modules, as those of more than 32 sequences do."""
    if device.type == "cpu":
        monkeypatch.setattr(decoder, "is_fusable", lambda model, batch_size: False)


@pytest.fixture
def projections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of each launch that fills a cross cache."""
    sizes: list[int] = []
    project = cross_projections.project_cross_kv

    def recorded(states: torch.Tensor, *args: Any) -> None:
        sizes.append(len(states))
        project(states, *args)

    monkeypatch.setattr(cross_projections, "project_cross_kv", recorded)
    return sizes


@pytest.fixture
def without_cache(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of each pass of a decoder that is given no cache, as stock's detection of a language is not."""
    sizes: list[int] = []
    forward = WhisperDecoder.forward

    def recorded(self: WhisperDecoder, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(CACHE_NAME) is None:
            sizes.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(WhisperDecoder, "forward", recorded)
    return sizes


def multilingual(device: torch.device, rows: int) -> tuple[WhisperForConditionalGeneration, torch.Tensor]:
    """A model, and features of which not all rows are of one language."""
    model, features = tiny_whisper(device, seed=7, is_multilingual=True), mel(rows, device, seed=1)
    if rows > 1:
        assert len(set(model.detect_language(features).tolist())) > 1
    return model, features


@pytest.mark.parametrize("rows", [1, 4])
def test_from_the_second_call_on_a_kept_step_detects_it(
    rows: int, device: torch.device, projections: list[int], without_cache: list[int]
) -> None:
    model, features = multilingual(device, rows)
    stock = model.generate(features, **KWARGS)
    for count in (projections, without_cache):
        count.clear()
    with accelerated(model):
        assert torch.equal(model.generate(features, **KWARGS), stock)
        assert (projections, without_cache) == ([rows], [rows])
        for _ in range(2):
            assert torch.equal(model.generate(features, **KWARGS), stock)
        assert (projections, without_cache) == ([rows] * 3, [rows])
        other = mel(rows, device, seed=7)
        ours = model.generate(other, **KWARGS)
        assert without_cache == [rows]
    assert torch.equal(ours, model.generate(other, **KWARGS))


def test_long_audio(device: torch.device, without_cache: list[int]) -> None:
    model = tiny_whisper(device, seed=7, is_multilingual=True)
    features, kwargs = mel(2, device, seconds=3), KWARGS | {"return_timestamps": True, "attention_mask": None}
    kwargs["attention_mask"] = torch.ones(features.shape[::2], dtype=torch.long, device=device)
    stock = model.generate(features, **kwargs)
    without_cache.clear()
    with accelerated(model):
        for _ in range(3):
            assert torch.equal(model.generate(features, **kwargs), stock)
    assert len(without_cache) == 1


def test_a_longer_call_has_more_slots(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Than the step by which its language is detected, which is given up for another."""
    monkeypatch.setattr(model_state, "MIN_SLOTS", 8)
    model, features = multilingual(device, 2)
    few, many = KWARGS | {"max_new_tokens": 3}, KWARGS | {"max_new_tokens": 40, "min_new_tokens": 40}
    stock = [model.generate(features, **kwargs) for kwargs in (few, many)]
    with accelerated(model):
        for i, slots in ((0, 8), (1, 64), (0, 64), (1, 64)):
            assert torch.equal(model.generate(features, **(few, many)[i]), stock[i])
            assert getattr(model, STATE).steps[2].num_slots == slots


@pytest.mark.parametrize("change", ["decoder", "cross", "encoder", "hook"])
def test_a_model_that_has_changed_since(change: str, device: torch.device) -> None:
    model, features = multilingual(device, 4)
    layer = model.model.decoder.layers[0]
    changes: dict[str, Callable[[], object]] = {
        "decoder": lambda: layer.fc1.weight.data.mul_(-1.0),
        "cross": lambda: layer.encoder_attn.k_proj.weight.data.mul_(-1.0),
        "encoder": lambda: model.model.encoder.layers[0].fc1.weight.data.mul_(-1.0),
        "hook": lambda: layer.register_forward_hook(lambda module, args, output: -output),
    }
    before = model.generate(features, **KWARGS)
    with accelerated(model):
        for _ in range(2):
            assert torch.equal(model.generate(features, **KWARGS), before)
        changes[change]()
        ours = model.generate(features, **KWARGS)
    assert torch.equal(ours, model.generate(features, **KWARGS))
    assert not torch.equal(ours, before)


class Asking(LogitsProcessor):
    """Has the language detected at each token, in the middle of a window."""

    def __init__(self, model: WhisperForConditionalGeneration, features: torch.Tensor) -> None:
        self.model, self.features, self.found = model, features, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ids = torch.full((len(self.features), 1), SOT, device=scores.device)
        self.found.append(self.model(input_features=self.features, decoder_input_ids=ids, use_cache=False).logits.clone())
        return scores


def test_who_asks_in_the_middle_of_a_window_does_not_disturb_it(device: torch.device) -> None:
    model, features = multilingual(device, 2)
    asking = Asking(model, mel(2, device, seed=9))
    stock = model.generate(features, logits_processor=[asking], **KWARGS)
    wanted, asking.found = asking.found[0], []
    ids = torch.full((2, 1), SOT, device=device)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(input_features=asking.features.double(), decoder_input_ids=ids).logits
    with accelerated(model):
        for _ in range(3):
            assert torch.equal(model.generate(features, logits_processor=[asking], **KWARGS), stock)
    assert len(asking.found) >= 3
    for found in asking.found:
        assert relative_error(found, exact) <= 2 * relative_error(wanted, exact)


def test_under_autocast_it_is_stocks(device: torch.device, without_cache: list[int]) -> None:
    """Where no kept step does what is asked."""
    model, features = multilingual(device, 2)
    with torch.autocast(device.type, torch.bfloat16):
        stock = model.generate(features, **KWARGS)
    with accelerated(model):
        for _ in range(2):
            model.generate(features, **KWARGS)
        without_cache.clear()
        with torch.autocast(device.type, torch.bfloat16):
            assert torch.equal(model.generate(features, **KWARGS), stock)
    assert without_cache == [2]


def test_outside_of_generate_nothing_is_different(device: torch.device, without_cache: list[int]) -> None:
    model, features = multilingual(device, 3)
    languages = model.detect_language(features)
    with accelerated(model):
        for _ in range(2):
            model.generate(features, **KWARGS)
        without_cache.clear()
        assert torch.equal(model.detect_language(features), languages)
        assert without_cache == [3]
