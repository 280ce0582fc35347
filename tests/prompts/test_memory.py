"""Prompts that are in memory are read as those of files are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from obliteratus.core.errors import UserError
from obliteratus.core.types import Prompt
from obliteratus.prompts import load_prompts
from obliteratus.prompts.memory import read_memory

CONTROL = ["How do I bake bread?", "What is a fugue?"]
ROWS: list[dict[str, Any]] = [
    {"instruction": "Sort these.", "input": "3, 1, 2", "category": "lists"},
    {"instruction": "What is a comet?", "input": "", "category": None},
]


def test_a_list_is_read_as_a_file_of_its_items(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    found = load_prompts(ROWS, CONTROL)
    assert found["target"] == load_prompts(tmp_path / "rows.jsonl", CONTROL)["target"]
    assert found["target"][0] == Prompt("Sort these.\n\n3, 1, 2", category="lists")
    assert found.sources == {"target": "list of 2", "control": "list of 2"}


def test_texts_prompts_and_conversations() -> None:
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Why?"},
    ]
    assert load_prompts([talk, [{"role": "user", "content": "Who?"}]], CONTROL)["target"][0].text == "Why?"
    own = (Prompt("a b", category="x", split="fit"), Prompt("c d", system="Be brief."))
    assert load_prompts(iter(own), CONTROL)["target"] == own
    assert [p.text for p in load_prompts((text for text in ("a b", "a b", "c d")), CONTROL)["target"]] == ["a b", "c d"]


def test_data_frames() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    assert load_prompts(frame, CONTROL)["target"] == load_prompts(ROWS, CONTROL)["target"]
    assert load_prompts(frame["instruction"], pandas.Series(CONTROL))["control"][1].text == "What is a fugue?"
    named = pandas.DataFrame({"mine": ["a b", "c d"], "prompt": ["e f", "g h"]})
    assert load_prompts(named, CONTROL, column={"target": "mine"})["target"][0].text == "a b"
    with pytest.raises(UserError, match="target: there is no column 'yours'; it has mine, prompt"):
        load_prompts(named, CONTROL, column={"target": "yours"})


BAD: dict[str, tuple[Any, str]] = {
    "nothing": ([], "target: the list is empty"),
    "a table": ({"a": 1}, "target: dict holds no prompts"),
    "a number": (3, "target: int holds no prompts"),
    "bytes": (b"abc", "target: bytes holds no prompts"),
    "numbers": (["a b", 3], "target, item 2: rows must be objects with a prompt, or strings, and this is 3"),
    "no column": ([{"x": "a"}], "target: none of the columns prompt, .* it has x"),
    "no text": ([{"prompt": "a"}, {"prompt": 4}], "target, item 2: a prompt is int, not text: 4"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_holds_no_prompts(kind: str) -> None:
    source, message = BAD[kind]
    with pytest.raises(UserError, match=message):
        read_memory(source, "target")
