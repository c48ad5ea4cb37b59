"""The command `whisper-triton`: `transcribe` prints the words of audio files, `doctor` says what they would
run on, `bench` measures.

Text goes to stdout and everything else to stderr. Exit status: 0 if all went well, 1 if a file, the model or the machine
failed, 2 for a wrong command line, 130 if interrupted. What one command alone needs is imported when that is run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from whisper_triton import __version__
from whisper_triton.bench import bench
from whisper_triton.failure import Failure, Group, say
from whisper_triton.output import FORMATS

DTYPES = ("float16", "float32", "bfloat16", "fp16", "fp32", "bf16")


def named(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """The value of an option that names something; an empty one, as of a shell variable that is not set, is refused."""
    if value == "":
        raise Failure(f"{parameter.opts[0]} is empty", exit_code=2)
    return value


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="whisper-triton")
def main() -> None:
    """Whisper in transformers, its decoder on Triton kernels where there is a GPU."""


main.add_command(bench)


@main.command()
def doctor() -> None:
    """Say what this runs on: GPU, versions, and which path each part takes and why."""
    from whisper_triton.doctor import report

    say(report() + "\n")


@main.command()
@click.argument("audio", nargs=-1, required=True, type=click.Path(), metavar="AUDIO...")
@click.option(
    "--model",
    metavar="NAME_OR_DIR",
    callback=named,
    help="A name on the model hub, a transformers or CTranslate2 directory, or `demo`. "
    "[default: openai/whisper-large-v3-turbo on a GPU (to translate: large-v3), openai/whisper-small on a CPU]",
)
@click.option("--device", metavar="DEVICE", help="cpu, cuda or cuda:1. [default: the GPU if there is one]")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    metavar="DTYPE",
    help="float16, float32 or bfloat16. [default: float16 on a GPU, float32 on a CPU]",
)
@click.option("--language", metavar="LANGUAGE", help="Such as de or german. [default: detected, for each file]")
@click.option(
    "--task",
    type=click.Choice(["transcribe", "translate"]),
    default="transcribe",
    show_default=True,
    help="Write what is said, or its translation into English.",
)
@click.option("--timestamps", is_flag=True, help="In txt: a line a segment, with its times. The other formats have them.")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Files done at a time.")
@click.option("--output-format", type=click.Choice(FORMATS), default="txt", show_default=True)
@click.option(
    "--output-dir",
    type=click.Path(),
    metavar="DIR",
    callback=named,
    help="Write a file for each AUDIO here, named after it, instead of to stdout.",
)
def transcribe(audio: tuple[str, ...], output_dir: str | None, **options: Any) -> None:
    """Print the words of audio files: wav, flac, mp3, ogg, of any length, at any sample rate, mono or stereo.

    Files that cannot be read are reported and skipped. On stdout each file is a line in txt (more with --timestamps) and
    in json; srt and vtt of several files need --output-dir.
    """
    from whisper_triton.jobs import run

    try:
        good = run(audio, output_dir=None if output_dir is None else Path(output_dir), **options)
    except KeyboardInterrupt:
        click.echo(err=True)
        raise Failure("interrupted", exit_code=130) from None
    sys.exit(0 if good else 1)
