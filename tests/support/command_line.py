"""The command line, called in this process."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from obliteratus.cli.app import app


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def one_line(result: Result) -> str:
    """The only line of a user error, which must be all that was said."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert result.stdout == ""
    return lines[0]
