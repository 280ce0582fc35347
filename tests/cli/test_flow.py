"""Text that arrives in pieces is broken between words, whatever the pieces are, and cannot steer the terminal."""

from __future__ import annotations

import textwrap

import pytest
from rich.cells import cell_len

from obliteratus.cli.flow import flow, place_side_by_side, show, wrap_lines

PROSE = (
    "A comet is a small icy body. When it passes close to the Sun, it warms and begins to release gases.\n\nIts tail"
)
CODE = "def f(x):\n    return {x:  1}\n"


def pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize("width", [20, 31, 79])
def test_lines_are_those_of_textwrap(size: int, width: int) -> None:
    expected = [line for part in PROSE.split("\n") for line in textwrap.wrap(part, width) or [""]]
    assert list(wrap_lines(pieces(PROSE, size), width)) == expected


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_what_fits_stays_as_it_is(size: int) -> None:
    assert "".join(flow(pieces(CODE, size), 79)) == CODE


def test_a_word_is_shown_once_it_is_whole() -> None:
    given = iter(["A co", "met is", " here"])
    shown = flow(given, 79)
    text = ""
    while "comet" not in text:
        text += next(shown)
    assert text == "A comet"
    assert list(given) == [" here"]


@pytest.mark.parametrize("text", ["x" * 50, "漢字かな交じり文は空白なしで続く。" * 3, "word " + "y" * 45 + " end"])
def test_long_words_and_wide_characters_are_parted(text: str) -> None:
    lines = list(wrap_lines(pieces(text, 4), 20))
    assert max(map(cell_len, lines)) <= 20
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_nothing_steers_the_terminal() -> None:
    assert show("a\x1b[2Jb\x07\tc\r\nd\x9b") == "a\\x1b[2Jb\\x07    c\nd\\x9b"
    assert "\x1b" not in "".join(flow(["\x1b", "]0;title\x07"], 79))


def test_two_texts_stand_side_by_side_and_come_line_by_line() -> None:
    lines = list(place_side_by_side(pieces(PROSE, 3), ["one\ntwo"], 43))
    assert lines[0] == "A comet is a small" + " " * 5 + "one"
    assert lines[1].endswith("two")
    assert [line[:20].rstrip() for line in lines] == list(wrap_lines([PROSE], 20))
    given = iter(["one\ntwo\nthree", " and more"])
    assert next(place_side_by_side(given, ["left"], 43)) == "one" + " " * 20 + "left"
    assert list(given) == [" and more"]
