"""Samples in, timed words out: one call of `model.generate` for a batch of recordings of any length.

Always with timestamps, whatever is printed in the end: so the words are the same in every output format, and recordings
over 30 s go through Whisper's own long-form loop, window after window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from whisper_triton.audio import SAMPLE_RATE
from whisper_triton.output import Segment

FRAME = 0.01  # seconds between two columns of the spectrogram


class Speech(NamedTuple):
    """What was said in one recording: the language's code, or None; all words in one line; the same words timed."""

    language: str | None
    text: str
    segments: list[Segment]


def parse_language(language: str | None) -> str | None:
    """The code of a language given as a code ("de") or an English name ("German"); None stays None.

    Raises:
        ValueError: not a language that Whisper has a code for.
    """
    if language is None:
        return None
    code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
    if code not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}: give a code such as de or a name such as german")
    return code


def check_request(model: WhisperForConditionalGeneration, language: str | None, task: str) -> None:
    """Checks a language code (None: to be detected) and a task against what the model can do.

    Raises:
        ValueError: a language the model does not know, or an English-only model asked for more than English.
    """
    if not _is_multilingual(model):
        if language not in (None, "en"):
            raise ValueError(f"this model knows English only, not {LANGUAGES[language]}: take a multilingual one")
        if task != "transcribe":
            raise ValueError(f"this model knows English only and cannot {task}: take a multilingual one")
    elif language is not None and f"<|{language}|>" not in model.generation_config.lang_to_id:
        raise ValueError(f"this model does not know {LANGUAGES[language]}")


def transcribe(
    model: WhisperForConditionalGeneration,
    processor: WhisperProcessor,
    recordings: Sequence[np.ndarray],
    *,
    language: str | None = None,
    task: str = "transcribe",
    on_progress: Callable[[float], None] | None = None,
) -> list[Speech]:
    """The words of each recording, by greedy search.

    Args:
        model: a Whisper model.
        processor: its processor.
        recordings: each (samples,) float32 at 16 kHz; done together, as one batch.
        language: a code; None detects it for each recording from its first 30 s. See `check_request`.
        task: "transcribe" or "translate" (into English).
        on_progress: called before each window with the seconds done so far, summed over the recordings.

    Raises:
        ValueError: no recording, or one that is no such array, empty, or holds NaN or infinity.
    """
    _check(recordings)
    features, mask = _features(model, processor, recordings)
    options: dict[str, object] = {}
    languages: list[str | None] = ["en"] * len(recordings)
    if _is_multilingual(model):
        languages = [language] * len(recordings) if language else _detect(model, features)
        options = {"language": languages, "task": task}

    def report(frames: torch.Tensor) -> None:  # (B, 2): done, in all
        if on_progress is not None:
            on_progress(frames.min(dim=1).values.sum().item() * FRAME)

    output = model.generate(
        features,
        attention_mask=mask,
        return_timestamps=True,
        return_segments=True,
        monitor_progress=report,
        **options,
    )
    return [
        _speech(processor, language, segments, recording.size / SAMPLE_RATE)
        for language, segments, recording in zip(languages, output["segments"], recordings, strict=True)
    ]


def _check(recordings: Sequence[np.ndarray]) -> None:
    if not isinstance(recordings, Sequence) or not recordings:
        raise ValueError(f"a list of at least one recording is wanted, got {type(recordings).__name__} {recordings!r:.40}")
    for i, samples in enumerate(recordings):
        if not isinstance(samples, np.ndarray) or samples.ndim != 1 or samples.dtype != np.float32 or samples.size == 0:
            is_array = isinstance(samples, np.ndarray)
            found = f"{samples.dtype} {samples.shape}" if is_array else type(samples).__name__
            raise ValueError(f"recording {i} must be (samples,) float32 and not empty, got {found}")
        if not np.isfinite(samples).all():
            raise ValueError(f"recording {i} holds samples that are NaN or infinite")


def _is_multilingual(model: WhisperForConditionalGeneration) -> bool:
    # Without languages in its configuration `generate` refuses to be told one, so such a model runs as it comes.
    return getattr(model.generation_config, "is_multilingual", True) and hasattr(model.generation_config, "lang_to_id")


def _features(
    model: WhisperForConditionalGeneration, processor: WhisperProcessor, recordings: Sequence[np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The spectrograms (B, mel bins, frames) in the model's dtype, and which frames are audio (B, frames)."""
    extractor = processor.feature_extractor
    longest = max(recording.size for recording in recordings)
    # `generate` minds the lengths in a batch only past 30 s; shorter ones it would search to the end of the padding.
    least = 0 if len(recordings) == 1 else extractor.n_samples + extractor.hop_length
    inputs = extractor(
        list(recordings),
        sampling_rate=SAMPLE_RATE,
        padding="max_length",
        # Silence at every end, because a spectrogram's last columns reach beyond it: alone or in a batch, a recording
        # then gets the same features.
        max_length=max(least, longest + extractor.n_fft),
        truncation=False,
        return_attention_mask=True,
        return_tensors="pt",
    )
    features, mask = inputs.input_features.to(model.device, model.dtype), inputs.attention_mask.to(model.device)
    if len(recordings) == 1:  # whose mask `generate` does not look at
        frames = int(mask.sum())
        features, mask = features[..., :frames], mask[..., :frames]
    return features, mask


def _detect(model: WhisperForConditionalGeneration, features: torch.Tensor) -> list[str]:
    # `generate` would do this too, but on unpadded features of less than 30 s it fails, and it tells no one the result.
    window = 2 * model.config.max_source_positions
    first = features[..., :window]
    ids = model.detect_language(pad(first, (0, window - first.shape[-1])))
    codes = {i: token.strip("<|>") for token, i in model.generation_config.lang_to_id.items()}
    return [codes[i] for i in ids.tolist()]


def _speech(processor: WhisperProcessor, language: str | None, segments: list[dict], duration: float) -> Speech:
    texts, timed = [], []
    for segment in segments:
        text = processor.tokenizer.decode(segment["tokens"], skip_special_tokens=True)
        texts.append(text)
        start, end = (round(min(float(segment[key]), duration), 3) for key in ("start", "end"))
        if line := " ".join(text.split()):
            timed.append(Segment(start, end, line))
    # Joined as they came: a token of Whisper begins with its space, in languages that have any.
    return Speech(language, " ".join("".join(texts).split()), timed)
