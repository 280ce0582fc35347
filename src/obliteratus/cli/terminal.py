"""Print results on stdout: tables and paragraphs that fit the terminal and leave nothing out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from obliteratus.cli.tables import format_table, wrap, wrap_prose

notes = Console(stderr=True, highlight=False)
results = Console(highlight=False)
LABEL = 8  # characters of a label and the space behind it: `Edited  `


def show_json(data: Any) -> None:
    """Print one JSON document on stdout."""
    shows_all = "utf" in (sys.stdout.encoding or "").lower()
    results.out(json.dumps(data, indent=1, ensure_ascii=not shows_all), highlight=False)


def say(text: str, label: str = "", indent: bool = False) -> None:
    """Print a paragraph, with a label in front of its first line and the others below it.

    indent: leaves the room of a label where there is none.
    """
    width = LABEL if label or indent else 0
    for number, line in enumerate(wrap_prose(text, results.width - width)):
        results.out(f"{label if not number else '':<{width}}", style="bold", end="")
        results.out(line)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of one group of rows."""
    show_groups(title, columns, [rows])


def show_groups(title: str, columns: Sequence[str], groups: Sequence[Sequence[Sequence[str]]]) -> None:
    """Print a table, with an empty line between groups of rows and behind the table."""
    shows_all = "utf" in (sys.stdout.encoding or "").lower()
    for line in wrap(title, results.width):
        results.out(line, style="bold")
    for line in format_table(columns, groups, results.width, "─" if shows_all else "-"):
        results.out(line)
    results.out("")


def format_bytes(n: float | int) -> str:
    """Return a number of bytes with its unit, such as ``538 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit in ("B", "kB", "MB") else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
