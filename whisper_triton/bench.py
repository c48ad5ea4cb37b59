"""The command `whisper-triton bench`: `generate`, `step` and `kernels` measure, each against what stock and PyTorch offer.

Tables go to stdout, progress to stderr. What measures lies in `whisper_triton.benchmarks`, imported when a command runs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from whisper_triton.failure import Failure, Group, make_writable, say

if TYPE_CHECKING:
    from whisper_triton.benchmarks.harness import Place
    from whisper_triton.benchmarks.tasks import Bench

KERNELS = {  # where each is measured: file and function
    "decode_attention": ("decode_attention", "bench"),
    "append_attention": ("append_attention", "bench"),
    "update_kv_cache": ("update_kv_cache", "bench"),
    "cross_attention": ("cross_attention", "bench"),
    "skinny_linear": ("skinny_linear", "bench"),
    "embed_tokens": ("embed_tokens", "bench"),
    "select_token": ("select_token", "bench"),
    "project_cross_kv": ("project_cross_kv", "bench"),
    "add_layer_norm": ("encoder_kernels", "bench_add_layer_norm"),
    "bias_gelu": ("encoder_kernels", "bench_bias_gelu"),
}
TOY = "toy"
PLOT_FORMATS = (".svg", ".png", ".pdf")  # what matplotlib writes by itself: others of its formats want TeX, say
MOST_ROWS = 2**31 - 1  # of a batch: no GPU takes as many, and torch cannot even count many times more
MOST_NEW_TOKENS = 440  # of 448 slots, after a prompt
CPU_NOTE = "On a CPU these are timings of PyTorch references: they prove that the benchmarks run, and say nothing of kernels."
WHERE_TO = ("output", "plot")  # not part of the command that a row names: they change nothing of what is measured


def compare_files(ctx: click.Context, _: click.Parameter, files: tuple[Path, Path] | None) -> None:
    """Prints the comparison and ends the command, where it is asked for."""
    if files is None or ctx.resilient_parsing:
        return
    from whisper_triton.benchmarks.compare import compare

    try:
        compared = compare(*files)
    except (OSError, ValueError) as error:
        raise Failure(str(error)) from error
    say(compared + "\n")
    ctx.exit()


def parse_names(_: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    names = None if value is None else [name.strip() for name in value.split(",")]
    if names is not None and not all(names):
        raise Failure(f"{parameter.opts[0]} takes names separated by commas, got {value!r}", exit_code=2)
    return names


def parse_kernels(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[str]:
    names = parse_names(ctx, parameter, value) or list(KERNELS)
    for name in names:
        if name not in KERNELS:
            raise Failure(f"no kernel {name!r}: there are {', '.join(KERNELS)}", exit_code=2)
    return names


def parse_batches(_: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        return read_numbers(value)
    except ValueError as error:
        raise Failure(f"{parameter.opts[0]} {error}", exit_code=2) from None


def read_numbers(text: str) -> list[int]:
    """Those of "1,2,8"; ValueError, which goes on after the option's name, for what is not all from 1 to MOST_ROWS."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and 0 < int(word) <= MOST_ROWS for word in words):
        raise ValueError(f"takes numbers from 1 to {MOST_ROWS}, separated by commas, got {text!r}")
    return [int(word) for word in words]


compare_option = click.option(
    "--compare",
    nargs=2,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="A B",
    is_eager=True,
    expose_value=False,
    callback=compare_files,
    help="Measure nothing: print the ratio of each row of B to A's, and mark what lies outside the spread.",
)
SHARED = (
    click.option(
        "--model",
        callback=parse_names,
        metavar="NAMES",
        help="Published shapes with random weights (tiny, base, small, medium, large-v3, turbo, distil-large-v3) or real "
        "checkpoints as `transcribe` takes them, separated by commas. [default: large-v3; on a CPU `toy`, a tiny shape]",
    ),
    click.option("--batch", callback=parse_batches, default="1,2,4,8", show_default=True, metavar="NUMBERS"),
    click.option("--dtype", type=click.Choice(["float16", "bfloat16", "float32"]), help="[default: float16, on a CPU float32]"),
    click.option("--device", type=click.Choice(["cuda", "cpu"]), help="[default: the GPU if there is one]"),
    click.option(
        "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="ROWS.jsonl", help="Write the rows here."
    ),
    click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="OUT.png", help="Draw the rows here."),
    compare_option,
)


def shared_options(command: Callable[..., None]) -> Callable[..., None]:
    return functools.reduce(lambda command, option: option(command), reversed(SHARED), command)


@click.group(cls=Group, invoke_without_command=True)
@compare_option
@click.pass_context
def bench(ctx: click.Context) -> None:
    """Measure, against stock transformers and what PyTorch offers; a wrong result is never timed.

    Without a GPU a tiny shape runs through the references, which proves the benchmarks and no speed.
    """
    if ctx.invoked_subcommand is None:
        say(ctx.get_help() + "\n")


@bench.command()
@shared_options
@click.option("--new-tokens", type=click.IntRange(1, MOST_NEW_TOKENS), help="Tokens a call. [default: 64, on a CPU 8]")
@click.option("--calls", type=click.IntRange(min=1), help="Timed calls a variant, in turns. [default: 10, on a CPU 2]")
@click.pass_context
def generate(ctx: click.Context, new_tokens: int | None, calls: int | None, **shared: Any) -> None:
    """Whole calls: stock dynamic, stock static with torch.compile, that with our attention, and all of `accelerate`."""

    def prepare(place: Place) -> tuple[dict[str, Bench], Callable[[str], Any]]:
        from whisper_triton.benchmarks import generate

        chosen = functools.partial(generate.bench, new_tokens=new_tokens, calls=calls)
        return {"generate": chosen}, functools.partial(generate.Models, place=place)

    measure(ctx, prepare, **shared)


@bench.command()
@shared_options
@click.option(
    "--compile",
    "mode",
    type=click.Choice(["reduce-overhead", "max-autotune", "none"]),
    default="reduce-overhead",
    show_default=True,
    help="How stock's step beside ours is compiled.",
)
@click.pass_context
def step(ctx: click.Context, mode: str, **shared: Any) -> None:
    """One decoding step: time, bytes, share of the bandwidth, what each link costs, and stock's compiled step."""

    def prepare(place: Place) -> tuple[dict[str, Bench], Callable[[str], Any]]:
        from whisper_triton.benchmarks import decoder_step, models

        load = functools.partial(models.get_model, dtype=place.dtype, device=place.device)
        return {"step": functools.partial(decoder_step.bench, mode=mode)}, load

    measure(ctx, prepare, **shared)


@bench.command()
@shared_options
@click.option("--only", callback=parse_kernels, metavar="KERNELS", help=f"Of {', '.join(KERNELS)}; separated by commas.")
@click.pass_context
def kernels(ctx: click.Context, only: list[str], **shared: Any) -> None:
    """Each kernel against its alternatives: SDPA's backends, FlexAttention, cuBLAS, torch.compile, stock's own launches."""

    def prepare(place: Place) -> tuple[dict[str, Bench], Callable[[str], Any]]:
        from whisper_triton.benchmarks import models

        benches = {}
        for name in only:
            file, function = KERNELS[name]
            benches[name] = getattr(importlib.import_module(f"whisper_triton.benchmarks.{file}"), function)
        return benches, models.get_shape

    measure(ctx, prepare, **shared)


def measure(
    ctx: click.Context,
    prepare: Callable[[Place], tuple[dict[str, Bench], Callable[[str], Any]]],
    *,
    model: list[str] | None,
    batch: list[int],
    dtype: str | None,
    device: str | None,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Runs the benches that `prepare` returns, with what loads their subjects by name; the rest are options.

    Raises:
        Failure: a result was wrong, a model cannot be had, there is not enough memory, or no place for what is to be written.
    """
    if plot is not None:
        check_format(plot)
    for path in (output, plot):
        if path is not None:
            make_writable(path.parent)
    import torch
    import transformers

    from whisper_triton.benchmarks.harness import Place, environment
    from whisper_triton.benchmarks.tasks import run, sweep
    from whisper_triton.checkpoints import CheckpointError
    from whisper_triton.runtime import choose_device, choose_dtype

    transformers.logging.set_verbosity_error()
    try:
        where = choose_device(device)
    except ValueError as error:
        raise Failure(str(error), exit_code=2) from error
    if where.type == "cpu":
        click.echo(CPU_NOTE)
        torch.set_num_threads(1)  # the tensors are small, and where the cores are busy more threads wait for each other
    torch.manual_seed(0)
    try:
        place = Place.on(where, choose_dtype(dtype, where))
        benches, load = prepare(place)
        names = model or ["large-v3" if place.is_gpu else TOY]
        rows = run(sweep(benches, place, load, names, batch), output, command_of(ctx), where.type)
    except SystemExit as refusal:  # of a benchmark that would have timed a wrong result
        raise Failure(str(refusal)) from refusal
    except (CheckpointError, OSError) as error:
        raise Failure(str(error)) from error
    except RuntimeError as error:
        # Of a CPU's memory torch raises what it raises for anything.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise Failure(f"{where} is out of memory: try a smaller --batch or --model") from error
    except KeyboardInterrupt:
        raise Failure("interrupted", exit_code=130) from None
    if plot is not None:
        from whisper_triton.benchmarks.plots import plot as draw

        try:
            draw([row | environment(where.type) for row in rows], plot)
        except OSError as error:
            raise Failure(str(error)) from error


def check_format(path: Path) -> None:
    """Raises Failure where no plot can be written in the format that the file's name ends in."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Failure("--plot needs matplotlib: pip install matplotlib")
    if path.suffix.lower() not in PLOT_FORMATS:
        raise Failure(
            f"--plot takes a file whose name ends in one of {', '.join(PLOT_FORMATS)}, got {str(path)!r}", exit_code=2
        )


def command_of(ctx: click.Context) -> str:
    """What a user types to measure the same again."""
    words = ["whisper-triton", "bench", ctx.info_name]
    for parameter in ctx.command.params:
        given = ctx.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE
        if given and parameter.name not in WHERE_TO:
            value = ctx.params[parameter.name]
            words += [parameter.opts[0], ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(words)
