"""Text that arrives in pieces, broken into lines between words, in one column or in two."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import zip_longest

from rich.cells import cell_len

from obliteratus.core.errors import UNSHOWN

# A space, a word, or one wide character: those of Chinese and Japanese may be parted anywhere.
TOKEN = re.compile(r"\n|[^\S\n]|[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\uff00-\uff60]|\S")
GAP = 3  # columns between two texts side by side


def flow(pieces: Iterable[str], width: int) -> Iterator[str]:
    """Yield the text with line feeds where a word would pass ``width`` columns. A word is yielded once it is whole.

    Characters that would steer the terminal are shown as escapes, and tabs as four spaces.
    """
    column, spaces, word = 0, "", ""
    for piece in pieces:
        for token in TOKEN.findall(show(piece)):
            if not token.isspace() and cell_len(token) < 2:
                word += token
                continue
            text, column = _place(spaces, word, column, width)
            yield text
            spaces, word = ("" if word else spaces), ""
            if token == "\n":
                yield token
                column, spaces = 0, ""
            elif token.isspace():
                spaces += token
            else:
                text, column = _place(spaces, token, column, width)
                yield text
                spaces = ""
    yield _place(spaces, word, column, width)[0]


def _place(spaces: str, word: str, column: int, width: int) -> tuple[str, int]:
    """Return a word behind its spaces, or in a new line if it does not fit, and the column after it."""
    if not word:
        return "", column
    if column + len(spaces) + cell_len(word) <= width:
        return spaces + word, column + len(spaces) + cell_len(word)
    text, column = ("\n", 0) if column else (spaces, len(spaces))
    for start in range(0, len(word), width):  # a word longer than a line is parted
        text += ("\n" if start else "") + word[start : start + width]
    return text, cell_len(text.rpartition("\n")[2])


def show(text: str) -> str:
    """Return text without anything that would steer a terminal."""
    text = text.replace("\t", "    ").replace("\r\n", "\n")
    return UNSHOWN.sub(lambda found: found[0] if found[0] == "\n" else repr(found[0])[1:-1], text)


def wrap_lines(pieces: Iterable[str], width: int) -> Iterator[str]:
    """Yield the lines of `flow`, each once it is whole."""
    line = ""
    for text in flow(pieces, width):
        *whole, line = (line + text).split("\n")
        yield from whole
    yield line


def place_side_by_side(left: Iterable[str], right: Iterable[str], width: int) -> Iterator[str]:
    """Yield lines with two texts beside each other, each line once both texts have come so far."""
    half = max(1, (width - GAP) // 2)
    for a, b in zip_longest(wrap_lines(left, half), wrap_lines(right, half), fillvalue=""):
        yield f"{a}{' ' * (half - cell_len(a) + GAP)}{b}".rstrip()
