"""Define the command line. Every command parses its options, calls the library, and shows the result."""

from __future__ import annotations

import io
import sys
from typing import cast

import typer

from obliteratus.cli.commands import Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug shows a plain traceback
    rich_markup_mode="rich",
)


@app.callback()
def describe() -> None:
    """Find the directions by which a language model represents a behavior, edit the weights along them, and measure on
    held-out prompts what changed."""


def main() -> None:
    """Run the command line. In a locale that lacks a character, its code is shown."""
    for stream in (sys.stdout, sys.stderr):
        cast(io.TextIOWrapper, stream).reconfigure(errors="backslashreplace")
    app(prog_name="obliteratus")


if __name__ == "__main__":
    main()
