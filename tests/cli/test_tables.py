"""Tables fit their width, leave nothing out and align numbers, whatever is in them."""

from __future__ import annotations

import random

import pytest
from rich.cells import cell_len

from obliteratus.cli.tables import LEAST, align_values, format_table, wrap, wrap_prose

WORDS = [
    "a",
    "of",
    "the",
    "direction",
    "removal",
    "星空",
    "naïve",
    "attention.output",
    "0.5",
    "(3–9)",
    "[bold]x[/]",
    "don't",
]


def random_table(seed: int) -> tuple[list[str], list[list[str]]]:
    dice = random.Random(seed)
    columns = [" ".join(dice.choices(WORDS, k=dice.randint(1, 3))) for _ in range(dice.randint(2, 7))]
    rows = [[" ".join(dice.choices(WORDS, k=dice.randint(0, 9))) for _ in columns] for _ in range(dice.randint(1, 5))]
    return columns, rows


@pytest.mark.parametrize("width", [20, 40, 80, 120])
@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_cut_and_nothing_is_too_wide(seed: int, width: int) -> None:
    columns, rows = random_table(seed)
    lines = format_table(columns, [rows], width)
    assert max(map(cell_len, lines)) <= width
    shown = "".join(lines).replace(" ", "")
    wanted = sorted("".join([*columns, *(cell for row in rows for cell in row)]).replace(" ", ""))
    left = list(shown)
    for letter in wanted:  # each letter of each cell is there; blocks show headings once for each row
        left.remove(letter)
    assert not any("…" in line for line in lines)


def test_a_letter_that_is_missing_would_be_seen() -> None:
    with pytest.raises(ValueError, match="not in list"):
        list("abc").remove("d")


def test_numbers_are_below_each_other() -> None:
    cells = align_values([("96.9%", "(89.3–99.1%)"), ("1.6%", "(0.3–8.3%)"), ("–", "")])
    head, _, *rows = format_table(["name", "rate"], [[["a", cells[0]], ["long name", cells[1]], ["c", cells[2]]]], 80)
    assert head.endswith("rate")
    assert rows[0].index("%") == rows[1].index("%")
    assert rows[0].rindex(")") == rows[1].rindex(")")
    assert rows[2].index("–") == rows[0].index("%")


def test_text_is_aligned_to_the_left_even_beside_a_number() -> None:
    _, _, one, two = format_table(["name", "value"], [[["a", "1"], ["b", "about 10"]]], 80)
    assert one.index("1") == two.index("about")


def test_a_table_of_words_that_do_not_fit_becomes_blocks() -> None:
    path = "/a/very/long/path/" + "x" * 60
    lines = format_table(["what", "where"], [[["saved", path], ["kept", "here"]]], 40)
    assert lines[0] == "what: saved"
    assert "".join(lines[1:4]).startswith("where:")
    assert lines[-2:] == ["what: kept", "where: here"]
    wide = format_table(["what", "where"], [[["saved", path]]], 120)
    assert wide[0].startswith("what")
    assert ":" not in wide[0]


def test_groups_have_a_line_between_them() -> None:
    lines = format_table(["a", "b"], [[["1", "2"]], [["3", "4"]]], 80)
    assert lines[2:] == ["1  2", "", "3  4"]


def test_wide_characters_count_as_two() -> None:
    assert all(cell_len(line) <= 10 for line in wrap("星" * 30, 10))
    assert wrap("", 10) == [""]
    assert LEAST < 80


def test_only_paths_are_wider_than_a_paragraph() -> None:
    path = f"/tmp/{'a' * 30}/index.html"
    assert wrap_prose(f"See {path} in a browser: {'星' * 7} end", 12) == [
        "See",
        path,
        "in a",
        "browser:",
        "星" * 6,
        "星 end",
    ]
    assert wrap_prose(f"{path} {path}", 12) == [path, path]
    assert wrap_prose("and/or two", 12) == ["and/or two"]
    assert wrap_prose("b" * 14, 12) == ["b" * 12, "bb"]
    assert wrap_prose("", 12) == [""]
