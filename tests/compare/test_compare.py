"""Runs and models side by side: the same prompts, paired differences, and one line for what cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.support.command_line import one_line
from tests.support.pages import ParsedPage
from tests.support.tiny import tiny, tiny_tokenizer
from typer.testing import CliRunner, Result

from obliteratus.cli.app import app
from obliteratus.compare.differences import compare_sides, describe_comparison
from obliteratus.compare.sides import SideAnswers
from obliteratus.core.results import Run, Score
from obliteratus.pipeline.recipe import load_recipe

PROMPTS = [("target", f"topic {i}") for i in range(20)] + [("control", f"other {i}") for i in range(20)]


def side(name: str, refused: int, behavior: str = "refusal") -> SideAnswers:
    """A side that refuses the first so many prompts of each group."""
    answers = {
        key: {"answer": f"{name} on {key[1]}", "verdict": "shown" if int(key[1].split()[1]) < refused else "absent"}
        for key in PROMPTS
    }
    return SideAnswers(name, answers, dict.fromkeys(PROMPTS, ""), behavior)


def write_run(
    folder: Path, refused: int, prompts: Sequence[tuple[str, str]] = PROMPTS, behavior: str = "refusal"
) -> Path:
    """Folder of a run before which everything was refused, and after it the first so many."""
    folder.mkdir()
    lines = []
    for group, prompt in prompts:
        states = {
            state: {
                "answer": f"{state} {prompt}" if state == "before" else f"{folder.name} {prompt}",
                "verdict": verdict,
                "rungs": {},
            }
            for state, verdict in (
                ("before", "shown"),
                ("after", "shown" if int(prompt.split()[1]) < refused else "absent"),
            )
        }
        lines.append({"prompt": prompt, "group": group, "category": ""} | states)
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Run(recipe=load_recipe("lean"), source={"id": "m"}, prompts={}, judge={"behavior": behavior})
    (folder / "run.json").write_text(run.model_dump_json())
    return folder


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments), "--quiet"])


def test_differences_are_paired() -> None:
    target, *_ = compare_sides([side("A", 20), side("B", 5), side("C", 20)])
    assert target.name == "refusal.target"
    assert [r.value for r in target.rates] == [1, 0.25, 1]
    assert [c.value for c in target.changes] == [-0.75, 0]
    assert target.changes[0].high < 0 < target.changes[1].high


def test_chance_is_no_difference() -> None:
    sides = [side("A", 6), side("B", 5)]
    said = describe_comparison(sides, compare_sides(sides))
    assert "B does not differ beyond chance (−5.0 points" in said
    sides = [side("A", 20), side("B", 5)]
    assert "B differs (−75.0 points" in describe_comparison(sides, compare_sides(sides))


def test_runs_bring_their_answers(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", 2), write_run(tmp_path / "two", 9)
    result = call(one, two, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["sides"] == ["unedited", "one", "two"]
    assert [Score(**r).value for r in document["shares"]["refusal.target"]] == [1, 0.1, 0.45]
    assert len(document["differences"]["refusal.target"]) == 2


def test_the_page_holds_all_answers(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", 2), write_run(tmp_path / "two", 9)
    assert call(one, two, "--out", tmp_path / "page").exit_code == 0
    text = (tmp_path / "page" / "index.html").read_text()
    page = ParsedPage(text)
    assert page.tags.count("article") == len(PROMPTS)
    for name in ("one", "two", "before"):
        assert f"{name} topic 3" in page.text
    assert str(tmp_path) not in text


def test_only_common_prompts_count(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", 2), write_run(tmp_path / "two", 2, PROMPTS[5:])
    result = CliRunner().invoke(app, ["compare", str(one), str(two), "--json"])
    assert "35 of 40 prompts were answered on all sides" in " ".join(result.stderr.split())
    assert json.loads(result.stdout)["shares"]["refusal.target"][0]["n"] == 15


def test_a_model_answers_the_prompts_of_a_run(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    one = write_run(tmp_path / "one", 2)
    result = call(one, tmp_path / "tiny", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["sides"] == ["unedited", "one", "tiny"]
    assert document["shares"]["refusal.target"][2]["n"] == 20


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", 2), write_run(tmp_path / "two", 2)
    other = write_run(tmp_path / "other", 2, [(g, f"{p} 1") for g, p in PROMPTS])
    apology = write_run(tmp_path / "apology", 2, behavior="apology")
    assert "give two to 6" in one_line(call(one))
    assert "given twice" in one_line(call(one, one))
    assert "different behaviors (apology, refusal)" in one_line(call(one, apology))
    assert "0 prompts were answered on all sides" in one_line(call(one, other))
    assert "leave --target" in one_line(call(one, two, "--target", tmp_path / "one" / "answers.jsonl"))
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "x").touch()
    assert "is in use" in one_line(call(one, two, "--out", tmp_path / "page"))
