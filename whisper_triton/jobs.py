"""The work of `whisper-triton transcribe`.

Checks everything that can be checked before a model is loaded, then goes through the files batch by batch, reports the
bad ones and carries on.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
import transformers
from tqdm import tqdm

from whisper_triton import accelerate
from whisper_triton.audio import SAMPLE_RATE, AudioError, load_audio, probe_audio
from whisper_triton.checkpoints import CheckpointError, load_model
from whisper_triton.failure import Failure, check_stdout, complain, make_writable, say, shown
from whisper_triton.output import Transcript, render
from whisper_triton.runtime import choose_device, choose_dtype, default_model, describe_path
from whisper_triton.transcription import Speech, check_request, parse_language, transcribe

CUT_OFF = 0.9  # of the length in a file's header: what ends before is said, since headers estimate
BAR = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}]"


def run(
    audio: Sequence[str],
    *,
    model: str | None,
    device: str | None,
    dtype: str | None,
    language: str | None,
    task: str,
    timestamps: bool,
    batch_size: int,
    output_format: str,
    output_dir: Path | None,
) -> bool:
    """Transcribes the files `audio`, each once; the other arguments are the options of the command.

    Returns:
        Whether every file went well; each one that did not was reported.

    Raises:
        Failure: nothing can be done for any file.
    """
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():  # in a terminal, its bars show what it downloads
        transformers.logging.disable_progress_bar()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal can show every language
    files = list(dict.fromkeys(audio))
    try:
        where = choose_device(device)
        code = parse_language(language)
        targets = _targets(files, output_dir, output_format)
    except ValueError as error:
        raise Failure(str(error), exit_code=2) from error
    lengths = _probe(files)
    if not lengths:
        return False
    if output_dir is not None:
        make_writable(output_dir)
    else:
        check_stdout()
    precision = choose_dtype(dtype, where)

    def emit(transcript: Transcript, file: str) -> bool:
        return _write(render(transcript, output_format, timestamps=timestamps), targets.get(file))

    try:
        speak = _prepare(default_model(where, task) if model is None else model, precision, where, code, task)
        started = time.perf_counter()
        seconds, done = _work(lengths, batch_size, speak, emit)
    except torch.OutOfMemoryError as error:
        raise Failure(f"{where} is out of memory: try a smaller --batch-size or --model") from error
    wall = time.perf_counter() - started
    if seconds:
        facts = [
            f"{seconds:.1f} s of audio in {wall:.2f} s (real-time factor {wall / seconds:.3f})",
            f"{where} {str(precision).removeprefix('torch.')}",
            describe_path(where),
        ]
        click.echo(", ".join(facts), err=True)
    return done == len(files)


def _targets(files: list[str], directory: Path | None, output_format: str) -> dict[str, Path]:
    """The file to write for each input; none without an output directory.

    Raises:
        ValueError: two inputs would be written to one file, or one over an input, or cannot share stdout.
    """
    if directory is None:
        if len(files) > 1 and output_format in ("srt", "vtt"):
            raise ValueError(f"{output_format} of several files cannot share stdout: give --output-dir")
        return {}
    inputs = {Path(file).resolve() for file in files}
    taken: dict[Path, str] = {}
    for file in files:
        target = directory / f"{Path(file).stem}.{output_format}"
        if target in taken:
            raise ValueError(f"{shown(taken[target])} and {shown(file)} would both be written to {shown(target)}")
        if target.resolve() in inputs:
            raise ValueError(f"{shown(target)} is an input and would be overwritten")
        taken[target] = file
    return {file: target for target, file in taken.items()}


def _probe(files: list[str]) -> dict[str, float]:
    """The length in seconds of each file that looks readable; reports the others."""
    lengths = {}
    for file in files:
        try:
            lengths[file] = probe_audio(file)
        except AudioError as error:
            complain(f"{shown(file)}: {error}")
    return lengths


def _prepare(
    name: str, dtype: torch.dtype, device: torch.device, language: str | None, task: str
) -> Callable[..., list[Speech]]:
    """Loads and accelerates the model; returns `transcribe` with all but recordings and progress filled in."""
    try:
        model, processor = load_model(name, dtype, device)
    except CheckpointError as error:
        raise Failure(str(error)) from error
    try:
        check_request(model, language, task)
    except ValueError as error:
        raise Failure(f"{name}: {error}", exit_code=2) from error
    return partial(transcribe, accelerate(model), processor, language=language, task=task)


def _work(
    lengths: dict[str, float],
    batch_size: int,
    speak: Callable[..., list[Speech]],
    emit: Callable[[Transcript, str], bool],
) -> tuple[float, int]:
    """Goes through the files; returns the seconds of audio transcribed and the number of files that went well."""
    seconds, good = 0.0, 0
    files = list(lengths)
    with tqdm(total=sum(lengths.values()), bar_format=BAR, disable=None, leave=False) as bar:
        for start in range(0, len(files), batch_size):
            batch = files[start : start + batch_size]
            before = bar.n
            bar.set_description(f"{start}/{len(files)} files")
            recordings = _load(batch)
            for file, samples in recordings.items():
                _warn_if_cut_off(file, samples.size / SAMPLE_RATE, lengths[file])
            if recordings:
                show = partial(_advance, bar, before)
                speeches = speak(list(recordings.values()), on_progress=show)
                for (file, samples), speech in zip(recordings.items(), speeches, strict=True):
                    duration = samples.size / SAMPLE_RATE
                    good += emit(Transcript(shown(file), duration=duration, **speech._asdict()), file)
                    seconds += duration
            _advance(bar, before, sum(lengths[file] for file in batch))
    return seconds, good


def _advance(bar: tqdm, before: float, done: float) -> None:
    """Puts the bar at `before + done` seconds; the lengths it was given come from headers, so it is kept within them."""
    bar.update(min(before + done, bar.total) - bar.n)


def _load(files: list[str]) -> dict[str, np.ndarray]:
    """The samples of each file that can be decoded; reports the others."""
    recordings = {}
    for file in files:
        try:
            recordings[file] = load_audio(file)
        except AudioError as error:
            with tqdm.external_write_mode():
                complain(f"{shown(file)}: {error}")
    return recordings


def _warn_if_cut_off(file: str, seconds: float, promised: float) -> None:
    """Says so where a file, cut off perhaps, holds less than its header promises; what there is has words all the same."""
    if seconds < CUT_OFF * promised:
        with tqdm.external_write_mode():
            complain(f"{shown(file)}: ends after {seconds:.1f} s, where its header promises {promised:.1f} s")


def _write(text: str, target: Path | None) -> bool:
    """Writes to the file `target`, or to stdout where there is none.

    Returns:
        Whether it was written; reports why not.

    Raises:
        Failure: stdout takes no more.
    """
    if target is None:
        say(text)
        return True
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        with tqdm.external_write_mode():
            complain(f"{shown(target)}: {error.strerror}")
        return False
    return True
