"""Prompt files: what they may hold, and what each bad one is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.notes import Notes

from obliteratus.core.chat import Turn
from obliteratus.core.errors import UserError
from obliteratus.core.progress import report_to
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
    "UPPER.JSONL": '{"Goal": "one"}\n{"Goal": "two"}\n{"Goal": "three"}',
    "behavior.csv": "Behavior,Category\none,x\ntwo,x\nthree,y\n",
    "a.tsv": "id\tprompt\n1\tone\n2\ttwo\n3\tthree\n",
    "semicolon.csv": "prompt;category\none;x\ntwo;x\nthree;y\n",
    "tabs.csv": "prompt\tcategory\none\tx\ntwo\tx\nthree\ty\n",
    "mac.csv": "prompt,n\rone,1\rtwo,2\rthree,3\r",
    "array.json": json.dumps(ROWS, indent=1),
    "array.jsonl": json.dumps(ROWS),
    "strings.json": '["one", "two",\n"three"]',
    "lines.json": '{"question": "one"}\n{"question": "two"}\n{"question": "three"}\n',
    "turns.jsonl": "\n".join(json.dumps([{"role": "user", "content": text}]) for text in ("one", "two", "three")),
    "utf16.txt": "one\ntwo\nthree".encode("utf-16"),
    "no_suffix": "one\ntwo\nthree",
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


@pytest.mark.parametrize("sign", ["\u2028", "\u0085", "\f", "\x1c", "\v"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
def test_only_line_feeds_end_a_line(sign: str, name: str, tmp_path: Path, control: Path) -> None:
    text = f"one{sign}two"
    row = json.dumps({"prompt": text}, ensure_ascii=False)
    content = {"a.txt": text, "a.jsonl": row, "a.csv": f"prompt\n{text}", "a.json": f"[{row}]"}[name]
    if name.startswith("a.json") and sign not in "\u2028\u0085":
        content = content.replace(sign, json.dumps(sign)[1:-1])  # JSON escapes control characters
    assert texts(load_prompts(written(tmp_path / name, content), control)) == [text]


def test_a_long_field(tmp_path: Path, control: Path) -> None:
    long = "word " * 40_000
    found = load_prompts(written(tmp_path / "a.csv", f"prompt,n\n{long},1\n"), control)
    assert texts(found) == [long.strip()]


@pytest.mark.parametrize("other", ["input", "context"])
def test_an_instruction_goes_with_its_input(other: str, tmp_path: Path, control: Path) -> None:
    rows = [{"instruction": "Translate.", other: "Guten Tag"}, {"instruction": "Count to three.", other: ""}]
    path = written(tmp_path / "a.json", json.dumps([{**row, "output": "x", "text": "### all"} for row in rows]))
    assert texts(load_prompts(path, control)) == ["Translate.\n\nGuten Tag", "Count to three."]


@pytest.mark.parametrize(
    ("column", "role", "content", "roles"),
    [
        ("messages", "role", "content", ("system", "user", "assistant")),
        ("conversations", "from", "value", ("system", "human", "gpt")),
        ("prompt", "role", "content", ("developer", "user", "assistant")),
    ],
)
def test_conversations(
    column: str, role: str, content: str, roles: tuple[str, str, str], tmp_path: Path, control: Path
) -> None:
    """The last user turn is the prompt, behind all before it; what follows is the answer."""
    system, user, model = roles
    said = [(system, "Be brief."), (user, "One?"), (model, "Yes."), (user, "Two? "), (model, "No.")]
    turns = [{role: who, content: text} for who, text in said]
    found = load_prompts(written(tmp_path / "a.jsonl", json.dumps({column: turns})), control)["target"]
    history = (Turn("user", "One?"), Turn("assistant", "Yes."))
    assert found == (Prompt("Two?", system="Be brief.", history=history),)


def test_the_same_text_after_other_turns_is_another_prompt(tmp_path: Path, control: Path) -> None:
    rows = [[{"role": "user", "content": x}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "more"}]
            for x in "aab"]  # fmt: skip
    found = load_prompts(written(tmp_path / "a.json", json.dumps(rows)), control)
    assert (len(found["target"]), found.dropped) == (2, 1)


def test_the_column_can_be_chosen(tmp_path: Path, control: Path) -> None:
    path = written(tmp_path / "a.csv", "prompt,de,n\none,eins,1\n")
    assert texts(load_prompts(path, control, column={"target": "de"})) == ["eins"]
    with pytest.raises(UserError, match="there is no column 'fr'; it has prompt, de, n"):
        load_prompts(path, control, column={"target": "fr"})


def test_what_is_left_out_or_ambiguous_is_said(tmp_path: Path, control: Path) -> None:
    rows = [{"goal": "a", "behavior": "b", "split": "train"}, {"goal": "", "split": "fit"}]
    notes = Notes()
    with report_to(notes):
        found = load_prompts(written(tmp_path / "a.json", json.dumps(rows)), control)
    assert texts(found) == ["a"]
    for said in ("in 'goal', not in 'behavior'", "1 of 2 rows have no text", "'train' (1) is none of fit"):
        assert any(said in note for note in notes.texts), said


def test_a_category_may_be_a_number(tmp_path: Path, control: Path) -> None:
    found = load_prompts(written(tmp_path / "a.json", '[{"prompt": "a", "category": 0}]'), control)
    assert found["target"][0].category == "0"


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
    "data.xlsx": (b"PK", r"'\.xlsx' files are not read; give a \.txt"),
    "broken.jsonl": ('{"prompt": "a"}\n{"prompt": \n', r"broken\.jsonl:2: this line is not JSON"),
    "numbers.jsonl": ("1\n2\n", r":1: rows must be objects with a prompt, or strings, and this is 1"),
    "number.jsonl": ('"a"\n{"prompt": 3}', r":2: a prompt is int, not text: 3"),
    "columns.jsonl": (
        '{"foo": "a", "bar": 1}',
        "none of the columns prompt, .*; it has foo, bar; choose with --column",
    ),
    "columns.csv": ("foo,bar\n1,2\n", "none of the columns prompt, .*; it has foo, bar; choose with --column"),
    "changes.jsonl": ('{"prompt": "a"}\n{"text": "b"}', r":2: this row has no 'prompt', as the first has; it has text"),
    "comma.csv": ("prompt\na\nb, c\n", r":3: this row has 2 fields and the header 1; put a text with a comma into"),
    "short.csv": ("prompt,category\na\n", r":2: this row has 1 fields and the header 2"),
    "quote.csv": ('prompt\n"a\nb', r":2: this row is not CSV \(unexpected end of data\)"),
    "twice.csv": ("prompt,prompt\na,b\n", r":1: two columns are called 'prompt'"),
    "object.json": ('{\n"prompt": "a"\n}', r":1: this line is not JSON .*; write an array of rows"),
    "cut.json": ('[{"prompt": "a"},\n{"prompt": ', r"cut\.json:2: this line is not JSON"),
    "deep.json": ("[" * 100_000, "this JSON cannot be read"),
    "digits.json": (f"[{'1' * 5000}]", "this JSON cannot be read"),
    "none.json": ("[]", "the prompt file is empty"),
    "surrogate.json": (r'["\ud800"]', r"item 1: half of a surrogate pair \(U\+D800\) is no character"),
    "system.json": ('[{"prompt": "a", "system": 1}]', "'system' is int, not text"),
    "tool.json": ('[[{"role": "tool", "content": "a"}]]', "item 1: a turn has the role 'tool'; only user, human"),
    "image.json": ('[[{"role": "user", "content": [{"type": "image"}]}]]', r"a part that is no text \(image\)"),
    "answer.json": ('[[{"role": "assistant", "content": "a"}]]', "the conversation has no user turn"),
    "turns.json": ('[[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]]', "two user turns follow"),
    "words.json": ('[["a"]]', "a turn is no object with a role and a content: a"),
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


# ------------------------------------------------------------------------------------------ a part of a source
XSTEST = "prompt,type,label\none,homonyms,safe\ntwo,contrast_homonyms,unsafe\nthree,homonyms,Safe\n"


def test_rows_with_a_value_are_taken_alone(tmp_path: Path, control: Path) -> None:
    source = f"{written(tmp_path / 'x.csv', XSTEST)}?label=safe"
    found = load_prompts(source, control)
    assert texts(found) == ["one", "three"]
    assert {p.category for p in found["target"]} == {"homonyms"}
    assert found.sources["target"] == source
    assert texts(load_prompts(tmp_path / "x.csv", control)) == ["one", "two", "three"]


def test_a_file_with_the_sign_in_its_name_is_whole(tmp_path: Path, control: Path) -> None:
    assert texts(load_prompts(written(tmp_path / "x?label=safe.txt", "one\ntwo"), control)) == ["one", "two"]


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("label", "behind the sign \\? goes COLUMN=VALUE"),
        ("labels=safe", "there is no column 'labels'; it has prompt, type, label"),
        ("label=good", "no row has this value; label is safe, unsafe, Safe"),
    ],
)
def test_a_condition_that_takes_nothing(condition: str, said: str, tmp_path: Path, control: Path) -> None:
    with pytest.raises(UserError, match=said):
        load_prompts(f"{written(tmp_path / 'x.csv', XSTEST)}?{condition}", control)


def test_that_categories_are_of_another_column_is_said(tmp_path: Path, control: Path) -> None:
    notes = Notes()
    with report_to(notes):
        load_prompts(written(tmp_path / "x.csv", XSTEST), control, benign=written(tmp_path / "b.txt", "four"))
    assert any("categories are in 'type'" in text for text in notes.texts)
