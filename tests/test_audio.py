"""Decoding and resampling: formats, rates, channels, and what is no audio."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from whisper_triton import audio
from whisper_triton.audio import SAMPLE_RATE, AudioError, load_audio, probe_audio

SECONDS = 1.3
# How far a decoder may be off, relative to the signal: lossless but for 16 bits, or lossy.
TOLERANCE = {"wav": 2e-3, "flac": 2e-3, "mp3": 0.1, "ogg": 0.1}


def tone(rate: int, channels: int = 1) -> np.ndarray:
    """(samples,) or (samples, channels) float32: two tones that any rate from 8 kHz on can carry, fading in and out."""
    t = np.arange(round(SECONDS * rate)) / rate
    wave = (0.3 * np.sin(2 * np.pi * 440 * t) + 0.2 * np.sin(2 * np.pi * 1500 * t)) * np.sin(np.pi * t / SECONDS)
    return wave.astype(np.float32) if channels == 1 else np.repeat(wave[:, None], channels, 1).astype(np.float32)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Root of the mean square of the difference, relative to `expected`."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def refused(path: Path) -> str:
    """The message with which both functions refuse a file."""
    messages = []
    for function in (load_audio, probe_audio):
        with pytest.raises(AudioError) as caught:
            function(path)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].isprintable()  # one line
    return messages[0]


@pytest.mark.parametrize("extension", list(TOLERANCE))
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000])
def test_formats(tmp_path: Path, extension: str, channels: int, rate: int) -> None:
    path = tmp_path / f"tone.{extension}"
    soundfile.write(path, tone(rate, channels), rate)
    found = load_audio(path)
    assert found.dtype == np.float32
    expected = tone(SAMPLE_RATE)
    assert abs(found.size - expected.size) <= 1  # a rate may not divide into the length
    assert relative_error(found[: expected.size], expected[: found.size]) < TOLERANCE[extension]
    assert probe_audio(path) == pytest.approx(SECONDS, abs=1e-3)


def test_high_rate(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "tone.wav", tone(192_000), 192_000)
    assert relative_error(load_audio(tmp_path / "tone.wav"), tone(SAMPLE_RATE)) < 1e-3


def test_channels_are_averaged(tmp_path: Path) -> None:
    three = np.stack([tone(SAMPLE_RATE), -tone(SAMPLE_RATE), 3 * tone(SAMPLE_RATE) / 2], axis=1)
    soundfile.write(tmp_path / "tone.wav", three, SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "tone.wav"), tone(SAMPLE_RATE) / 2, atol=1e-6)


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_blocks_join_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int) -> None:
    soundfile.write(tmp_path / "tone.wav", tone(rate), rate, subtype="FLOAT")
    monkeypatch.setattr(audio, "BLOCK", 777)
    expected = tone(rate) if rate == SAMPLE_RATE else soxr.resample(tone(rate), rate, SAMPLE_RATE)
    np.testing.assert_allclose(load_audio(tmp_path / "tone.wav"), expected, atol=1e-6)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("truth", "name"), [("mp3", "a.wav"), ("flac", "a.mp3"), ("wav", "a.raw"), ("ogg", "a"), ("wav", "a.txt")]
)
def test_the_extension_may_lie(tmp_path: Path, truth: str, name: str) -> None:
    soundfile.write(tmp_path / f"tone.{truth}", tone(22050), 22050)
    (tmp_path / f"tone.{truth}").rename(tmp_path / name)
    assert relative_error(load_audio(tmp_path / name), tone(SAMPLE_RATE)) < TOLERANCE[truth]


def test_one_sample(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(1, np.float32), SAMPLE_RATE)
    assert load_audio(tmp_path / "a.wav").shape == (1,)


@pytest.mark.bad_input
def test_truncated_wav_gives_what_is_there(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(SAMPLE_RATE), SAMPLE_RATE)
    whole = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.wav").write_bytes(whole[: len(whole) // 2])
    assert 0.4 * SECONDS < load_audio(tmp_path / "a.wav").size / SAMPLE_RATE < 0.6 * SECONDS


@pytest.mark.bad_input
def test_truncated_flac(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", tone(SAMPLE_RATE), SAMPLE_RATE)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AudioError, match="is not audio that can be read"):
        load_audio(tmp_path / "a.flac")


@pytest.mark.bad_input
@pytest.mark.parametrize("extension", ["wav", "mp3", "flac", "ogg", "txt", ""])
def test_not_audio(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a{extension}"
    path.write_text("These are words, but no one says them.\n" * 1000)
    assert refused(path).startswith("is not audio that can be read, as wav, flac, mp3 and ogg can")
    path.write_bytes(bytes(10_000))
    assert refused(path).startswith("is not audio that can be read")
    path.write_bytes(b"")
    assert refused(path) == "is empty (0 bytes)"


@pytest.mark.bad_input
def test_no_samples(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(0, np.float32), SAMPLE_RATE)
    assert refused(tmp_path / "a.wav") == "holds no audio"


@pytest.mark.bad_input
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(tmp_path: Path, value: float) -> None:
    samples = tone(SAMPLE_RATE)
    samples[100] = value
    soundfile.write(tmp_path / "a.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    with pytest.raises(AudioError, match="NaN or infinite"):
        load_audio(tmp_path / "a.wav")


@pytest.mark.bad_input
def test_no_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "a.wav") == "No such file or directory"
    assert refused(tmp_path) == "Is a directory"
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe") == "is not a regular file"
