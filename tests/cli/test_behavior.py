"""``--behavior`` on every command: scores, tables and files speak of the behavior by its name, refusal is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.refuser import asked, refuser
from typer.testing import CliRunner, Result

from obliteratus.cli.app import app

WORD = "Ach nee, geht nicht!"
SHORT = ["verify=[{use='behavior', tokens=6}, {use='first_token_kl'}]", "weigh=[{use='all'}]"]
SPACE = 'search={trials=3, tokens=4, space={"excise.strength"={low=0.5, high=1.5}}}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that grumbles at prompts with a #, its prompts in all three splits, and the behavior."""
    folder = tmp_path_factory.mktemp("grumbler")
    subject = refuser(word=WORD)
    subject.model.save_pretrained(folder / "model")
    subject.tokenizer.save_pretrained(folder / "model")
    for group, prompts in asked().groups.items():
        rows = [
            {"prompt": f"{p.text} {part}", "split": part, "category": "ab"[i % 2]}
            for i, p in enumerate(prompts)
            for part in ("fit", "search", "report")
        ]
        (folder / f"{group}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = 'about = "The answer grumbles."\ntarget = "target.jsonl"\ncontrol = "control.jsonl"\n'
    (folder / "grumble.toml").write_text(f'{head}[de]\nopening = ["ach nee"]\n')
    return folder


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result


def model(folder: Path) -> list[object]:
    return [folder / "model", "--behavior", folder / "grumble.toml", "--quiet"]


def changes(*values: str) -> list[str]:
    return [word for value in (*SHORT, *values) for word in ("--set", value)]


def assert_named(scores: dict[str, object]) -> None:
    assert {"grumble.target", "grumble.control"} <= scores.keys()
    assert not any("refusal" in name for name in scores)


@pytest.mark.parametrize("command", ["run", "search"])
def test_a_run_by_the_behaviors_name(folder: Path, tmp_path: Path, command: str) -> None:
    extra = [SPACE] if command == "search" else []
    out = tmp_path / "out"
    call(command, *model(folder), "--method", "basic", "--out", out, "--save", "plan", *changes(*extra))
    record = json.loads((out / "run.json").read_text())
    assert_named(record["before"])
    assert_named(record["after"])
    assert "grumble.target/a" in record["before"]
    assert record["before"]["grumble.target"]["value"] == 1.0
    assert record["before"]["grumble.control"]["value"] == 0.0
    assert record["judge"]["behavior"] == "grumble"
    assert record["recipe"]["judge"]["behavior"]["de"] == {
        "opening": ["ach nee"]
    }  # the run can be done again without it
    assert record["prompts"]["sources"]["target"] == str(folder / "target.jsonl")
    card = (out / "README.md").read_text()
    assert "shows grumble, target prompts" in card
    assert "refuses target prompts" not in card
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert {a["before"]["verdict"] for a in answers if a["group"] == "target"} == {"shown"}
    assert answers[0]["before"]["rungs"] == {"phrases": "shown"}
    assert answers[0]["category"] in "ab"
    if command == "search":
        assert record["search"]["minimize"] == ["grumble.target", "kl.first_token.mean"]
        assert all("grumble.target" in member["scores"] for member in record["search"]["front"])


def test_verify_by_the_behaviors_name(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = json.loads(call("verify", *model(folder), "--json", "--out", out).stdout)
    assert_named(found["after"])
    assert found["before"] == {}
    written = json.loads((out / "verify.json").read_text())
    assert written["after"] == found["after"]
    assert written["judge"]["behavior"] == "grumble"
    verdicts = json.loads(call("judge", out, "--json").stdout)
    assert verdicts["target after"] == {"shown": 12}
    both = json.loads(call("verify", *model(folder), "--json", "--against", folder / "model").stdout)
    assert both["before"]["grumble.target"]["value"] == both["after"]["grumble.target"]["value"] == 1.0


def test_analyses_by_the_behaviors_name(folder: Path, tmp_path: Path) -> None:
    call("analyze", *model(folder), "--only", "reach", "--out", tmp_path / "out")
    assert (tmp_path / "out" / "analysis.json").is_file()


def test_a_study_by_the_behaviors_name(folder: Path, tmp_path: Path) -> None:
    few = [
        "--set",
        "strategies=[{use='attention'}]",
        "--set",
        "metrics=[{use='behavior', tokens=6}, {use='first_token_kl'}]",
    ]
    out = tmp_path / "out"
    call("study", "refusal", *model(folder), *few, "--out", out)
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert_named(lines[0]["scores"])
    assert "answers" not in lines[0]
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert {a["component"] for a in answers} == {line["component"] for line in lines[1:]}
    verdicts = json.loads(call("judge", out, "--json").stdout)
    assert set(verdicts["target before"]) == {"shown"}
    moved = next(line["component"] for line in lines[1:] if line["scores"]["grumble.target"]["value"] == 0)
    assert {a["after"]["verdict"] for a in answers if a["component"] == moved and a["group"] == "target"} == {"absent"}


def test_built_in_examples_stand_in_for_prompts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.toml").write_text('about = "x"\n[en]\nopening = ["hello"]\n')
    bad = CliRunner().invoke(app, ["run", str(folder / "model"), "--behavior", str(tmp_path / "bare.toml")])
    assert bad.exit_code == 2
    assert "--target is missing: give prompts that show bare" in bad.stderr
    bad = CliRunner().invoke(app, ["run", str(folder / "model"), "--target", str(folder / "target.jsonl")])
    assert "--control is missing" in bad.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--behavior", "refusl"], "there is no behavior 'refusl'"),
        (["--phrases", "nowhere.toml"], "there is no such file of phrases"),
        (["--judge", "endpoint"], "an endpoint needs its URL"),
        (["--judge", "nowhere/classifier"], "there is no such model"),
        (["--judge-url", "ftp://host"], "not http(s)"),
        (["--judge-url", "http://localhost:1/v1"], "--judge-model: no model is named"),
    ],
)
def test_what_cannot_judge_is_told_before_anything_runs(folder: Path, options: list[str], said: str) -> None:
    data = ["--target", str(folder / "target.jsonl"), "--control", str(folder / "control.jsonl")]
    bad = CliRunner().invoke(app, ["run", "nobody/nothing", *data, *options])
    assert bad.exit_code == 2
    lines = bad.stderr.strip().splitlines()
    assert len(lines) == 1
    assert said in lines[0]
