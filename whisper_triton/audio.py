"""Audio files to what Whisper hears: mono float32 at 16 kHz, decoded by libsndfile and resampled by soxr.

A file is read and resampled block by block, so that hours of stereo at 48 kHz never lie in memory at their full size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000
BLOCK = 1 << 18  # frames read at a time
RATES = (1_000, 1_000_000)  # Hz: a header that claims less would have seconds of sound become hours
LOUDEST = 1e9  # times full scale: squared, a spectrogram stays within fp32


class AudioError(ValueError):
    """A file that is not there or holds no usable audio. Its message is one line, without the file's name."""


def load_audio(path: str | os.PathLike[str]) -> np.ndarray:
    """The samples of an audio file, its channels averaged.

    Args:
        path: a file in any format of libsndfile (wav, flac, mp3, ogg, aiff, ...), whatever its extension says.

    Returns:
        (samples,) float32 at 16 kHz, full scale 1; at least one sample.

    Raises:
        AudioError: no such file, not audio, no samples, an impossible rate, or samples NaN, infinite or beyond measure.
    """
    with _open(path) as file:
        parts = list(_resample(_mono_blocks(file), file.samplerate))
    audio = np.concatenate(parts) if parts else np.empty(0, np.float32)
    if audio.size == 0:
        raise AudioError("holds no audio")
    if not np.isfinite(audio).all():
        raise AudioError("holds samples that are NaN or infinite")
    if max(audio.max(), -audio.min()) > LOUDEST:
        raise AudioError(f"holds samples of more than {LOUDEST:.0e} times full scale")
    return audio


def probe_audio(path: str | os.PathLike[str]) -> float:
    """The length of an audio file in seconds as its header gives it: quick, and right for a file that is whole.

    Raises:
        AudioError: as `load_audio`, as far as the header shows.
    """
    with _open(path) as file:
        if file.frames == 0:
            raise AudioError("holds no audio")
        return file.frames / file.samplerate


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[soundfile.SoundFile]:
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise AudioError("is not a regular file")  # a pipe could not be read twice
    try:
        # By descriptor, because given a name soundfile takes its extension's word for some formats.
        with open(path, "rb") as raw:
            if os.fstat(raw.fileno()).st_size == 0:
                raise AudioError("is empty (0 bytes)")
            with soundfile.SoundFile(raw.fileno(), closefd=False) as file:
                if not RATES[0] <= file.samplerate <= RATES[1]:
                    raise AudioError(f"claims a sample rate of {file.samplerate} Hz, which no recording has")
                yield file
    except OSError as error:
        raise AudioError(error.strerror or str(error)) from error
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip(" .")
        known = "wav, flac, mp3 and ogg"
        raise AudioError(f"is not audio that can be read, as {known} can ({reason}); ffmpeg converts others") from error


def _mono_blocks(file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    while (block := file.read(BLOCK, dtype="float32", always_2d=True)).size:
        with np.errstate(over="ignore"):  # what it gives is refused
            yield block.mean(axis=1)


def _resample(blocks: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    if rate == SAMPLE_RATE:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, num_channels=1, dtype="float32")
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.empty(0, np.float32), last=True)
