"""What the command says: its results on stdout, and why it fails in one line on stderr and with an exit status."""

from __future__ import annotations

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


def say(text: str) -> None:
    """Writes to stdout, beside a progress bar if there is one.

    Raises:
        Failure: stdout takes no more.
    """
    try:
        with tqdm.external_write_mode():
            click.echo(text, nl=False)
    except BrokenPipeError:  # as with `| head`: click ends the command quietly
        raise
    except OSError as error:
        raise Failure(f"cannot write to stdout: {error.strerror}") from error


def complain(message: str) -> None:
    """One line on stderr, in the form shell users know."""
    click.echo(f"whisper-triton: {message}", err=True)
