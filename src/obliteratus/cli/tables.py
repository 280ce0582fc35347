"""Lay out tables and paragraphs as plain text that fits a width and leaves nothing out."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

GAP = "  "  # between two columns
LEAST = 12  # columns of text are not made narrower than this, unless their longest word is shorter
NUMBER = re.compile(r"[×≥≤+−-]?\s*(?:\d[\d.,]*(?:e[+-]?\d+)?|∞)\s*(?:%|[A-Za-z]{1,3})?(?:\s+[(\[].*[)\]])?|–|")
"""What a cell of a column of numbers looks like: it may end with a unit and an interval."""
PATH = re.compile(r"\S*/\S*")
_measure = Console(width=80, color_system=None)


def wrap(text: str, width: int) -> list[str]:
    """Return the lines of a text, broken at spaces where it can be. Wide characters count as two."""
    lines = Text(text).wrap(_measure, max(1, width), overflow="fold")
    return [line.plain.rstrip() for line in lines] or [""]


def wrap_prose(text: str, width: int) -> list[str]:
    """Return the lines of a paragraph like `wrap`, with paths whole, to be copied or opened, even if one is wider."""
    lines: list[str] = []
    ends = 0
    for path in PATH.finditer(text):
        if cell_len(path[0]) > width:
            lines += [*_wrap_part(text[ends : path.start()], width), path[0]]
            ends = path.end()
    return [*lines, *_wrap_part(text[ends:], width)] or [""]


def _wrap_part(text: str, width: int) -> list[str]:
    return wrap(text.strip(), width) if text.strip() else []


def format_table(
    columns: Sequence[str], groups: Sequence[Sequence[Sequence[str]]], width: int, rule: str = "─"
) -> list[str]:
    """Return the lines of a table: headings, and groups of rows with an empty line between them.

    Columns of numbers are aligned to the right. Columns of text are wrapped until the table fits; if that is not
    enough, each row becomes a block with a line for each column.
    """
    cells = [row for group in groups for row in group]
    widths = _fit_widths(columns, cells, width)
    if widths is None:
        return _format_blocks(columns, cells, width)
    right = [_is_number([row[i] for row in cells], i) for i in range(len(columns))]
    lines = [*_format_row(columns, widths, right), rule * (sum(widths) + len(GAP) * (len(widths) - 1))]
    for number, group in enumerate(groups):
        lines += [""] if number else []
        lines += [line for row in group for line in _format_row(row, widths, right)]
    return lines


def _is_number(column: Sequence[str], index: int) -> bool:
    """Return whether all cells are numbers; the first column has names, even where they begin with a digit."""
    return index > 0 and any(column) and all(NUMBER.fullmatch(cell.strip()) is not None for cell in column)


def _fit_widths(columns: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Return the width of each column such that the table fits, or None if words would have to be broken for that."""
    by_column = [[head, *(row[i] for row in cells)] for i, head in enumerate(columns)]
    widths = [max(map(cell_len, column)) for column in by_column]
    least = [max(map(_longest_word, column)) for column in by_column]
    numbers = [_is_number(column[1:], i) for i, column in enumerate(by_column)]
    least = [low if n else min(full, max(low, LEAST)) for full, low, n in zip(widths, least, numbers, strict=True)]
    room = width - len(GAP) * (len(columns) - 1)
    if sum(least) > room:
        return None
    while sum(widths) > room:
        widest = max(range(len(widths)), key=lambda i: (widths[i] > least[i], not numbers[i], widths[i]))
        widths[widest] -= 1
    return widths


def _longest_word(text: str) -> int:
    return max((cell_len(word) for word in text.split()), default=0)


def _format_row(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    """Return the lines of one row. A cell that fits keeps its spaces, since they align what is in it."""
    wrapped = [wrap(c, w) if cell_len(c) > w or "\n" in c else [c] for c, w in zip(row, widths, strict=True)]
    lines = []
    for number in range(max(map(len, wrapped))):
        parts = [cell[number] if number < len(cell) else "" for cell in wrapped]
        padded = [_pad(part, wide, end) for part, wide, end in zip(parts, widths, right, strict=True)]
        lines.append(GAP.join(padded).rstrip())
    return lines


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def _format_blocks(columns: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return a line for each cell, behind the heading of its column, and an empty line between rows."""
    lines: list[str] = []
    for row in cells:
        lines += [""] if lines else []
        for head, cell in zip(columns, row, strict=True):
            lines += wrap(f"{head}: {cell}" if head else cell, width)
    return lines


def align_values(values: Sequence[tuple[str, str]]) -> list[str]:
    """Return (number, interval) pairs as cells of one width, with the numbers and the intervals below each other."""
    first, second = (max((cell_len(pair[i]) for pair in values), default=0) for i in (0, 1))
    return [f"{value:>{first}} {interval:>{second}}" if second else value for value, interval in values]
