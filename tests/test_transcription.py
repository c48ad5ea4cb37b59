"""From samples to timed words: batches, long recordings, languages."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ctranslate2_writer import vocabulary, write_directory
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from whisper_models import tiny_whisper

from whisper_triton import accelerated
from whisper_triton.audio import SAMPLE_RATE
from whisper_triton.checkpoints import load_model
from whisper_triton.transcription import check_request, parse_language, transcribe

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels", "eager_steps")

Loaded = tuple[WhisperForConditionalGeneration, WhisperProcessor]


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A small random multilingual model of three languages; windows of 30 s, at most 16 tokens each."""
    model = tiny_whisper(vocab_size=51865, max_source_positions=1500, max_target_positions=16)
    tokens = vocabulary(50257, 51865, ["<|en|>", "<|fr|>", "<|de|>"])
    return load_model(str(write_directory(tmp_path_factory.mktemp("m"), model, tokens=tokens)), torch.float32, "cpu")


def test_sample(tiny_en: Loaded, speech: np.ndarray, speech_text: str) -> None:
    model, processor = tiny_en
    with accelerated(model):
        (result,) = transcribe(model, processor, [speech])
    assert result.text == speech_text
    assert result.language == "en"
    assert " ".join(segment.text for segment in result.segments) == speech_text
    times = [time for segment in result.segments for time in (segment.start, segment.end)]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= speech.size / SAMPLE_RATE


def test_batch_is_as_one_by_one(tiny_en: Loaded, speech: np.ndarray) -> None:
    model, processor = tiny_en
    recordings = [speech, speech[: 4 * SAMPLE_RATE], speech[:50]]
    done: list[float] = []
    with accelerated(model):
        alone = [transcribe(model, processor, [recording])[0] for recording in recordings]
        together = transcribe(model, processor, recordings, on_progress=done.append)
    assert together == alone
    assert done[0] == 0
    assert done == sorted(done)


def test_over_30_seconds(tiny_en: Loaded, speech: np.ndarray, speech_text: str) -> None:
    model, processor = tiny_en
    pause = np.zeros(SAMPLE_RATE, np.float32)
    long = np.concatenate([speech, pause] * 3)  # 32 s
    done: list[float] = []
    with accelerated(model):
        both = transcribe(model, processor, [long, speech], on_progress=done.append)
    assert both[0].text == " ".join([speech_text] * 3)
    assert both[1].text == speech_text
    assert 30 < both[0].segments[-1].end <= long.size / SAMPLE_RATE
    assert len(done) >= 2
    assert done[-1] <= (long.size + speech.size) / SAMPLE_RATE + 0.02


def test_language_is_detected_for_each_recording(multilingual: Loaded, speech: np.ndarray) -> None:
    model, processor = multilingual
    recordings = [speech[:SAMPLE_RATE], -speech[3 * SAMPLE_RATE :]]
    features = [processor(r, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features for r in recordings]
    assert model.detect_language(features[0]).shape == (1,)
    detected = transcribe(model, processor, recordings)
    assert all(result.language in ("en", "fr", "de") for result in detected)
    # What was detected is what was used.
    given = [transcribe(model, processor, [r], language=d.language)[0] for r, d in zip(recordings, detected, strict=True)]
    assert given == detected
    assert all(math.isfinite(segment.end) for result in detected for segment in result.segments)


def test_language_and_task_reach_the_model(multilingual: Loaded, speech: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = multilingual
    seen: list[dict] = []
    generate = type(model).generate

    def record(*args: object, **kwargs: object) -> object:
        seen.append(kwargs)
        return generate(model, *args, **kwargs)

    monkeypatch.setattr(model, "generate", record)
    (result,) = transcribe(model, processor, [speech[:SAMPLE_RATE]], language="fr", task="translate")
    assert result.language == "fr"
    assert (seen[0]["language"], seen[0]["task"]) == (["fr"], "translate")


@pytest.mark.parametrize(("language", "code"), [(None, None), ("de", "de"), ("German", "de"), ("DE", "de"), ("mandarin", "zh")])
def test_parse_language(language: str | None, code: str | None) -> None:
    assert parse_language(language) == code


@pytest.mark.parametrize("language", ["", "klingon", "<|de|>"])
def test_unknown_language(language: str) -> None:
    with pytest.raises(ValueError, match=f"unknown language {language!r}".replace("|", r"\|")):
        parse_language(language)


def test_check_request(multilingual: Loaded, tmp_path: Path) -> None:
    model, _ = multilingual
    for language in (None, "de"):
        check_request(model, language, "translate")
    with pytest.raises(ValueError, match="does not know spanish"):
        check_request(model, "es", "transcribe")
    english, _ = load_model(str(write_directory(tmp_path, tiny_whisper())), torch.float32, "cpu")
    for language in (None, "en"):
        check_request(english, language, "transcribe")
    with pytest.raises(ValueError, match="knows English only, not german"):
        check_request(english, "de", "transcribe")
    with pytest.raises(ValueError, match="knows English only and cannot translate"):
        check_request(english, "en", "translate")
