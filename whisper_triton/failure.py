"""What the command says: its results on stdout, and why it fails in one line on stderr and with an exit status."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click
from tqdm import tqdm


class Failure(click.ClickException):
    """Ends the command. Exit status 1: something went wrong; 2: the command line was wrong; 130: interrupted."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def show(self, file: IO[Any] | None = None) -> None:
        """Prints the line; click calls this."""
        complain(self.message)


@contextmanager
def writing() -> Iterator[None]:
    """A block that writes to stdout.

    Raises:
        Failure: stdout takes no more.
    """
    try:
        yield
    except BrokenPipeError:  # as with `| head`: click ends the command quietly
        raise
    except OSError as error:
        raise Failure(f"cannot write to stdout: {error.strerror}") from error


def check_stdout() -> None:
    """Raises Failure where the shell has closed stdout, as with `>&-`: click would drop the words in silence."""
    if sys.stdout is None:
        raise Failure("cannot write to stdout: it is closed")


def say(text: str) -> None:
    """Writes to stdout, beside a progress bar if there is one; raises as `check_stdout` and `writing` do."""
    check_stdout()
    with writing(), tqdm.external_write_mode():
        click.echo(text, nl=False)


def make_writable(directory: Path) -> None:
    """Makes the directory if there is none; raises Failure where nothing can be written into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Tried, because permissions do not tell of a read-only file system.
        tempfile.TemporaryFile(dir=directory).close()
    except FileExistsError as error:
        raise Failure(f"{shown(directory)}: cannot write there: it is a file, not a directory") from error
    except OSError as error:
        raise Failure(f"{shown(directory)}: cannot write there: {error.strerror}") from error


def shown(path: str | Path) -> str:
    """A path as it can be printed, whatever bytes it is made of."""
    return click.format_filename(str(path))


class Command(click.Command):
    """One whose help may find stdout full: click prints it while it reads the command line."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with writing():
            return super().make_context(*args, **kwargs)


class Group(Command, click.Group):
    """The same of several."""

    command_class = Command


def complain(message: str) -> None:
    """One line on stderr, in the form shell users know, whatever is in the names that it quotes."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    click.echo(f"whisper-triton: {line}", err=True)
