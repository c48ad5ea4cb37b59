"""Audio that lies about its format, and recordings that are none: one line says why, or what is there is heard."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from ctranslate2_writer import write_directory
from whisper_models import NO_TIMESTAMPS, tiny_whisper

from whisper_triton import accelerated
from whisper_triton.audio import SAMPLE_RATE, AudioError, load_audio, probe_audio
from whisper_triton.checkpoints import load_model
from whisper_triton.cli import main
from whisper_triton.transcription import transcribe

pytest_plugins = ["whisper_fixtures"]
pytestmark = pytest.mark.usefixtures("reference_kernels")


def wav(
    rate: int = SAMPLE_RATE,
    channels: int = 1,
    bits: int = 16,
    kind: int = 1,
    data: bytes = bytes(3200),
    size: int | None = None,
    riff: int | None = None,
) -> bytes:
    """A tenth of a second of silence, or whatever its header claims. kind: 1 for whole numbers, 3 for floats."""
    size = len(data) if size is None else size
    block = channels * bits // 8 & 0xFFFF
    header = struct.pack("<HHIIHH", kind, channels, rate, rate * block & 0xFFFFFFFF, block, bits)
    riff = 36 + size if riff is None else riff
    return b"RIFF" + struct.pack("<I", riff) + b"WAVEfmt \x10\0\0\0" + header + b"data" + struct.pack("<I", size) + data


def floats(value: float, kind: type = np.float32) -> dict[str, Any]:
    return {"kind": 3, "bits": 8 * np.dtype(kind).itemsize, "data": np.full(100, value, kind).tobytes()}


# What a file holds, and what is said of it; a number: so many samples at 16 kHz are what is there.
LIES: dict[str, tuple[bytes, str | int]] = {
    "a rate of 0": (wav(rate=0), "is not audio that can be read"),
    "a rate of 1 Hz": (wav(rate=1, data=bytes(200_000)), "claims a sample rate of 1 Hz"),
    "a rate of 999 Hz": (wav(rate=999), "claims a sample rate of 999 Hz"),
    "a rate of 2 GHz": (wav(rate=2**31 - 1), "claims a sample rate of 2147483647 Hz"),
    "a rate below 0": (wav(rate=2**32 - 1), "is not audio that can be read"),
    "no channel": (wav(channels=0), "is not audio that can be read"),
    "65535 channels": (wav(channels=65535), "is not audio that can be read"),
    "1024 channels": (wav(channels=1024, data=bytes(20480)), 10),
    "no bits": (wav(bits=0), "is not audio that can be read"),
    "samples of 64 bits": (wav(bits=64), "is not audio that can be read"),
    "a codec nobody knows": (wav(kind=0xFFFF), "is not audio that can be read"),
    "more data than there is": (wav(size=2**32 - 1, riff=2**32 - 1), 1600),
    "less data than there is": (wav(size=1600), 800),
    "no data": (wav(size=0), "holds no audio"),
    "a file of no size": (wav(riff=0), 1600),
    "half a sample at the end": (wav(data=bytes(3201)), 1600),
    "NaN": (wav(**floats(np.nan)), "holds samples that are NaN or infinite"),
    "infinite samples": (wav(**floats(np.inf, np.float64)), "holds samples that are NaN or infinite"),
    "samples beyond fp32": (wav(**floats(1e300, np.float64)), "holds samples that are NaN or infinite"),
    "two channels beyond fp32": (wav(channels=2, **floats(3e38)), "holds samples that are NaN or infinite"),
    "samples beyond measure": (wav(**floats(-3e38)), "holds samples of more than 1e+09 times full scale"),
    "a header alone": (wav()[:44], "holds no audio"),
    "half a header": (wav()[:20], "is not audio that can be read"),
    "flac in name": (b"fLaC" + bytes(1000), "is not audio that can be read"),
    "ogg in name": (b"OggS" + bytes(1000), "is not audio that can be read"),
    "mp3 in name": (b"ID3\4" + bytes(1000), "is not audio that can be read"),
    "an archive": (b"PK\3\4" + bytes(1000), "is not audio that can be read"),
    "a web page": (b"<!DOCTYPE html><title>Not found</title>" * 50, "is not audio that can be read"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("what", LIES)
def test_a_header_that_lies(tmp_path: Path, what: str) -> None:
    content, expected = LIES[what]
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    if isinstance(expected, int):
        assert load_audio(path).shape == (expected,)
        assert probe_audio(path) == expected / SAMPLE_RATE
    else:
        with pytest.raises(AudioError) as caught:
            load_audio(path)
        assert str(caught.value).startswith(expected)
        assert str(caught.value).isprintable()
    assert path.read_bytes() == content


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model whose windows are Whisper's 30 s, and end after few tokens.

    Past a window's first token it prefers text: with a timestamp of those that it knows, of up to a second, a window would end
    there, and the next one begin: an hour would be 5,000 windows.
    """
    sizes = {"max_source_positions": 1500, "max_target_positions": 8, "encoder_layers": 1, "decoder_layers": 1}
    model = tiny_whisper(**sizes)
    model.model.decoder.embed_tokens.weight.data[NO_TIMESTAMPS + 1 :] = 0
    return write_directory(tmp_path_factory.mktemp("model"), model)


SECOND = np.zeros(SAMPLE_RATE, np.float32)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("recordings", "message"),
    [
        pytest.param(recordings, message, id=f"{i}")
        for i, (recordings, message) in enumerate(
            [
                ([], "at least one recording is wanted, got list"),
                (None, "at least one recording is wanted, got NoneType"),
                (SECOND, "at least one recording is wanted, got ndarray"),
                ("a.wav", "recording 0 must be .* got str"),
                ([None], "recording 0 must be .* got NoneType"),
                ([SECOND.tolist()], "recording 0 must be .* got list"),
                ([torch.zeros(16000)], "recording 0 must be .* got Tensor"),
                ([SECOND, SECOND[:0]], r"recording 1 must be .* got float32 \(0,\)"),
                ([SECOND[None]], r"recording 0 must be .* got float32 \(1, 16000\)"),
                ([SECOND.astype(np.int16)], "recording 0 must be .* got int16"),
                ([SECOND.astype(np.float64)], "recording 0 must be .* got float64"),
                ([SECOND, np.full(9, np.nan, np.float32)], "recording 1 holds samples that are NaN"),
                ([np.full(9, -np.inf, np.float32)], "recording 0 holds samples that are NaN or infinite"),
            ]
        )
    ],
)
def test_what_is_no_recording_is_refused(directory: Path, recordings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transcribe(*load_model(str(directory), torch.float32, "cpu"), recordings)


def silence(path: Path, minutes: int) -> Path:
    """A file of nothing at 8 kHz, as small as flac makes it."""
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_16") as file:
        for _ in range(minutes):
            file.write(np.zeros(60 * 8000, np.int16))
    return path


def is_stocks(directory: Path, samples: np.ndarray, device: torch.device) -> None:
    model, processor = load_model(str(directory), torch.float32, device)
    stock = transcribe(model, processor, [samples])
    with accelerated(model):
        assert transcribe(model, processor, [samples]) == stock


@pytest.mark.bad_input
def test_a_minute_of_silence(tmp_path: Path, directory: Path, device: torch.device) -> None:
    is_stocks(directory, load_audio(silence(tmp_path / "silence.flac", 1)), device)


@pytest.mark.bad_input
def test_an_hour_of_silence_is_read_in_pieces(tmp_path: Path) -> None:
    path = silence(tmp_path / "silence.flac", 60)
    assert path.stat().st_size < 1 << 20
    assert probe_audio(path) == 3600
    samples = load_audio(path)
    assert samples.shape == (3600 * SAMPLE_RATE,)
    assert not samples.any()


@pytest.mark.gpu
@pytest.mark.bad_input
def test_an_hour_of_silence(tmp_path: Path, directory: Path, device: torch.device) -> None:
    is_stocks(directory, load_audio(silence(tmp_path / "part.flac", 2)), device)
    path = silence(tmp_path / "silence.flac", 60)
    result = CliRunner().invoke(main, ["transcribe", str(path), "--model", str(directory)])
    assert result.exit_code == 0
    assert result.stderr.startswith("3600.0 s of audio in ")


@pytest.mark.bad_input
@pytest.mark.parametrize("what", ["a rate of 1 Hz", "NaN", "an archive"])
def test_the_command_reports_it_and_does_the_others(tmp_path: Path, directory: Path, what: str) -> None:
    bad, good = tmp_path / "bad.wav", tmp_path / "good.wav"
    bad.write_bytes(LIES[what][0])
    good.write_bytes(wav())
    result = CliRunner().invoke(main, ["transcribe", str(bad), str(good), "--model", str(directory), "--device", "cpu"])
    complaint, summary = result.stderr.splitlines()
    assert complaint.startswith(f"whisper-triton: {bad}: {LIES[what][1]}")
    assert summary.startswith("0.1 s of audio")
    assert (result.exit_code, result.stdout.count("\n")) == (1, 1)
