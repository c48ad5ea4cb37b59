"""What the command says: its results on stdout, and why it fails in one line on stderr and with an exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


class Command(click.Command):
    """One whose help may find stdout full: click prints it while it reads the command line."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with writing():
            return super().make_context(*args, **kwargs)


class Group(Command, click.Group):
    """The same of several."""

    command_class = Command


def complain(message: str) -> None:
    """One line on stderr, in the form shell users know."""
    click.echo(f"whisper-triton: {message}", err=True)
