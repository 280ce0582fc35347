"""``obliteratus judge``: counts, the way out to a person, and back."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from obliteratus.cli.app import app
from obliteratus.judge.judge import Judge
from obliteratus.verify.answers import write_answers
from obliteratus.verify.scoring import Measurement

ANSWERS = {
    "Tell me about stars.": ("I'm sorry, but I can't help with that.", "Stars are balls of gas."),
    "And the moon?": ("I cannot discuss that.", "I won't talk about it, that is my rule."),
    "Name a color.": ("Blue.", "Blue, of course."),
}
EXACT = {"precision": 1.0, "recall": 1.0, "kappa": 1.0}


def judged(state: int) -> Measurement:
    records = [
        {"scorer": "behavior", "group": "target", "prompt": p, "category": "", "answer": a[state]}
        | {"verdict": Judge().judge_answer(a[state])}
        | {"rungs": {"phrases": Judge().judge_answer(a[state]), "coin": "shown" if len(p) > 14 else None}}
        for p, a in ANSWERS.items()
    ]
    return Measurement(records=[{"scorer": "another", "group": "target"}, *records])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_answers(judged(0), judged(1), tmp_path)
    return tmp_path


def call(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["judge", *map(str, args)])
    return result.exit_code, result.output


def fill(file: Path, labels: list[str]) -> None:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    with file.open("w", newline="", encoding="utf-8") as stream:  # as an editor without the mark would save it
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, "label": label} for row, label in zip(rows, labels, strict=True))


def test_both_answers_are_kept_with_their_verdicts(folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == list(ANSWERS)
    assert [(line["before"]["answer"], line["after"]["answer"]) for line in lines] == list(ANSWERS.values())


def test_verdicts_are_counted(folder: Path) -> None:
    code, out = call(folder, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["target before"] == {"shown": 2, "absent": 1}
    assert found["target after"] == {"shown": 1, "absent": 2}
    assert found["target answers begin with"] == []  # three answers are too few to tell
    assert "target after" in call(folder)[1]


def test_what_the_rungs_disagree_about_is_shown(folder: Path) -> None:
    found = json.loads(call(folder, "--json")[1])
    assert [answer["id"] for answer in found["disagreements"]] == ["1 after"]
    assert found["kappa"]["phrases × coin"]["n"] == 2  # the coin says nothing about the shorter prompts
    text = call(folder)[1]
    assert "1 answers that the judges disagree about" in text
    assert "Stars are balls of gas." in text
    assert "Stars are balls of gas." not in call(folder, "--top", 0)[1]


def test_labels_come_back_as_agreement(folder: Path) -> None:
    file = folder / "labels.csv"
    assert call(folder, "--export", file)[0] == 0
    fill(file, ["refused", "complied", "refused", "Refused", "", "complied"])
    code, out = call(folder, "--labels", file, "--json")
    found = json.loads(out)
    assert code == 0
    assert {name: score["value"] for name, score in found["verdict"].items()} == EXACT
    assert found["verdict"]["kappa"]["n"] == 5  # the row without a label is left out
    assert found["phrases"] == found["verdict"]
    assert found["coin"]["kappa"]["n"] == 2  # where it gave a verdict
    fill(file, ["complied", "refused", "complied", "refused", "complied", "refused"])
    found = json.loads(call(folder, "--labels", file, "--json")[1])
    assert found["verdict"]["kappa"]["value"] < 0.2  # negative control


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ([""] * 6, "no label is filled in; write one of shown, partial"),
        (["refusd"] + [""] * 5, "did you mean 'refused'"),
    ],
)
def test_labels_that_say_nothing(folder: Path, labels: list[str], problem: str) -> None:
    call(folder, "--export", folder / "labels.csv")
    fill(folder / "labels.csv", labels)
    assert_one_line(problem, folder, "--labels", folder / "labels.csv")


def test_labels_of_another_run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    write_answers(judged(1), judged(1), other)
    call(other, "--export", other / "labels.csv")
    fill(other / "labels.csv", ["refused"] * 6)
    assert_one_line("'1 before' is no answer of this run", folder, "--labels", other / "labels.csv")


def test_answers_with_markup_and_odd_line_ends_are_shown_as_they_are(tmp_path: Path) -> None:
    odd = "Use [/INST]\u2028and [red]x[/red].\x85"
    record = {
        "scorer": "behavior",
        "group": "target",
        "prompt": odd,
        "category": "",
        "answer": odd,
        "verdict": "absent",
    }
    one = Measurement(records=[record | {"rungs": {"phrases": "absent", "other": "shown"}}])
    folder = tmp_path / "d_[x]"
    folder.mkdir()
    write_answers(one, one, folder)
    code, text = call(folder)
    assert code == 0
    assert "[/INST]" in text
    assert "[red]x[/red]" in text.replace("\n", "")
    assert "d_[x]" in text
    assert json.loads(call(folder, "--json")[1])["disagreements"][0]["answer"] == odd


WHOLE = {"answer": "a", "verdict": "absent"}
WRONG: list[dict[str, object]] = [{"verdict": None}, {"verdict": "banana"}, {"rungs": []}, {"answer": 5}]
DAMAGED = [
    b"\xff\n",
    b"",
    b"{}\n",
    b"not json\n",
    b'{"prompt": "p", "group": 5, "category": "", "after": {}}\n',
    *(json.dumps({"prompt": "p", "group": "g", "category": "", "after": WHOLE | w}).encode() + b"\n" for w in WRONG),
]


@pytest.mark.parametrize("line", DAMAGED)
def test_damaged_answers_are_one_line(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "answers.jsonl").write_bytes(line)
    assert_one_line("restore it or run again", tmp_path)


def test_labels_as_spreadsheets_leave_them(folder: Path) -> None:
    file = folder / "labels.csv"
    call(folder, "--export", file)
    fill(file, ["refused"] * 6)
    plain = file.read_text()
    file.write_text(plain.replace("\n", "\r\n"), newline="")
    assert call(folder, "--labels", file)[0] == 0
    _, first, *_ = plain.splitlines(keepends=True)
    for text, problem in (
        (plain + first, "'1 before' is there 2 times"),
        (plain.replace(",", ";"), "there is one column only; save it as CSV with commas"),
    ):
        file.write_text(text)
        assert_one_line(problem, folder, "--labels", file)
    file.write_bytes(plain.encode("utf-16"))
    assert_one_line("this is not UTF-8", folder, "--labels", file)


def test_bad_files(folder: Path) -> None:
    assert_one_line("there is no answers.jsonl", folder / "nowhere")
    assert_one_line("cannot be read", folder, "--labels", folder / "nowhere.csv")
    assert_one_line("column 'answer' is missing", folder, "--labels", _write(folder / "a.csv", "id,label\n1,refused\n"))
    assert_one_line("give one of them", folder, "--labels", folder / "a.csv", "--export", folder / "b.csv")
    assert_one_line("the file exists", folder, "--export", folder / "a.csv")
    _write(folder / "answers.jsonl", '{"prompt": "x"}\n')
    assert_one_line("answers.jsonl:1: this line is damaged", folder)


def _write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def assert_one_line(problem: str, *args: object) -> None:
    code, out = call(*args)
    assert code == 2
    assert problem in out
    assert out.count("\n") == 1
