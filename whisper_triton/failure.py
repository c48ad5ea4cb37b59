"""How the command fails: one line on stderr and an exit status."""

from __future__ import annotations

from typing import IO, Any

import click


class Failure(click.ClickException):
    """Ends the command. Exit status 1: something went wrong; 2: the command line was wrong; 130: interrupted."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def show(self, file: IO[Any] | None = None) -> None:
        """Prints the line; click calls this."""
        complain(self.message)


def complain(message: str) -> None:
    """One line on stderr, in the form shell users know."""
    click.echo(f"whisper-triton: {message}", err=True)
