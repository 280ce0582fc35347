"""Prompt files: what they may hold, and what each bad one is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from obliteratus.core.errors import UserError
from obliteratus.core.types import Prompt, PromptSet
from obliteratus.prompts import load_prompts

ROWS = [{"prompt": "one"}, {"prompt": "two"}, {"prompt": "three"}]


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return written(tmp_path / "control.txt", "calm\nplain\n")


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    from pyarrow import Table
    from pyarrow import parquet as pq

    pq.write_table(Table.from_pylist(rows), path)
    return path


def texts(prompts: PromptSet, group: str = "target") -> list[str]:
    return [p.text for p in prompts[group]]


# ------------------------------------------------------------------------------------------ what is read
GOOD = {
    "a.txt": "one\n\n  two \nthree\none\n",
    "windows.txt": "one\r\ntwo\r\nthree\r\n",
    "bom.txt": b"\xef\xbb\xbfone\ntwo\nthree",
    "a.jsonl": "\n".join(json.dumps(r) for r in ROWS) + "\n\n",
    "strings.jsonl": '"one"\n"two"\n"three"',
    "goal.jsonl": '{"goal": "one", "x": 1}\n{"goal": "two", "x": 2}\n{"goal": "three"}',
    "a.csv": "id,instruction\n1,one\n2,two\n3,three\n",
    "bom.csv": b"\xef\xbb\xbfprompt\none\ntwo\nthree\n",
}


@pytest.mark.parametrize("name", GOOD)
def test_every_format(name: str, tmp_path: Path, control: Path) -> None:
    assert texts(load_prompts(written(tmp_path / name, GOOD[name]), control)) == ["one", "two", "three"]


def test_parquet(tmp_path: Path, control: Path) -> None:
    rows = [{"question": "one", "split": "fit"}, {"question": "two", "split": None}]
    found = load_prompts(parquet(tmp_path / "a.parquet", rows), control)
    assert [(p.text, p.split) for p in found["target"]] == [("one", "fit"), ("two", "")]


def test_quoted_csv_and_other_columns(tmp_path: Path, control: Path) -> None:
    text = 'prompt,category,split,system\n"a, b\nc",x,report,be brief\nd,,train,\n'
    found = load_prompts(written(tmp_path / "a.csv", text), control)["target"]
    assert found == (Prompt("a, b\nc", "x", "report", "be brief"), Prompt("d"))


def test_optional_groups(tmp_path: Path, control: Path) -> None:
    target, keep = written(tmp_path / "t.txt", "t"), written(tmp_path / "k.txt", "k")
    assert set(load_prompts(target, control).groups) == {"target", "control"}
    assert texts(load_prompts(target, control, keep=keep), "keep") == ["k"]


# --------------------------------------------------------------------------------------------- bad input
BAD: dict[str, tuple[str | bytes, str]] = {
    "empty.txt": ("", "the prompt file is empty"),
    "blank.txt": (" \n\n", "the prompt file is empty"),
    "empty.jsonl": ("", "the prompt file is empty"),
    "header.csv": ("prompt\n", "the prompt file is empty"),
    "nul.txt": (b"a\0b\n", "this is a binary file; give a text file"),
    "latin.txt": ("caf\u00e9".encode("latin-1"), r"not UTF-8 text \(byte 3\)"),
    "image.txt": (b"\x89PNG\r\n\x1a\n\0\0", "not UTF-8 text"),
    "utf16.txt": ("one".encode("utf-16"), "not UTF-8 text"),
    "broken.jsonl": ('{"prompt": "a"}\n{"prompt": \n', r"broken\.jsonl:2: this line is not JSON"),
    "numbers.jsonl": ("1\n2\n", "rows must be objects with a prompt"),
    "number.jsonl": ('{"prompt": 3}', "a prompt is int, not text: 3"),
    "columns.jsonl": ('{"foo": "a", "bar": 1}', "none of the columns prompt, .*; it has foo, bar; rename one"),
    "columns.csv": ("foo,bar\n1,2\n", "none of the columns prompt, .*; it has foo, bar; rename one"),
    "nothing.jsonl": ('{"prompt": ""}\n{"prompt": null}', "the group 'target' is empty"),
    "fake.parquet": ("not parquet", "the Parquet file cannot be read"),
    "same.txt": ("plain\ncalm\n", "target and control hold the same prompts; give two different files"),
    "both.txt": ("calm\nwild\n", "1 prompt is both in target and in control once .*, such as 'calm'; remove"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_told_what_and_where(name: str, tmp_path: Path, control: Path) -> None:
    content, message = BAD[name]
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(written(tmp_path / name, content), control)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "missing.parquet", "."])
def test_missing_files(name: str, tmp_path: Path, control: Path) -> None:
    with pytest.raises(UserError, match=r"this prompt file does not exist; give a \.txt, \.jsonl"):
        load_prompts(tmp_path / name, control)


def test_the_control_file_is_checked_as_well(tmp_path: Path, control: Path) -> None:
    with pytest.raises(UserError, match=r"empty\.txt: the prompt file is empty"):
        load_prompts(control, written(tmp_path / "empty.txt", ""))


def test_the_hub_without_a_network(control: Path) -> None:
    with pytest.raises(UserError, match=r"the hub cannot be reached .*; give a local file"):
        load_prompts("hub:owner/name", control)


def test_a_behaviors_own_examples() -> None:
    prompts = load_prompts("behavior:apology", "behavior:apology")
    assert len(prompts["target"]) >= 100
    assert not {p.text for p in prompts["target"]} & {p.text for p in prompts["control"]}
    for source, group, problem in (
        ("behavior:refusal", "target", "it has no target prompts"),
        ("behavior:apology", "keep", "it has no keep prompts"),
        ("behavior:apologies", "target", "there is no behavior 'apologies'"),
    ):
        with pytest.raises(UserError, match=problem):
            load_prompts(**({"target": "behavior:apology", "control": "behavior:apology"} | {group: source}))
