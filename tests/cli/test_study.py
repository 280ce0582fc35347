"""The commands of studies that need no model: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.studies import OLD_STUDY, make_refusal_results, make_results, write_yaml
from typer.testing import CliRunner, Result

from obliteratus.cli import terminal
from obliteratus.cli.app import app
from obliteratus.study.base import KnockoutResult as Knocked
from obliteratus.study.files import load_study

WIDE = {"COLUMNS": "200", "NO_COLOR": "1"}


def call(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words], env=WIDE)


def folder(path: Path, results: tuple[Knocked, ...]) -> Path:
    path.mkdir()
    (path / "results.jsonl").write_text("".join(r.model_dump_json() + "\n" for r in results))
    return path


# --------------------------------------------------------------------------------------------- report
def test_a_report_is_made_again(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", make_results(infinite=True))
    done = call("report", one, "--top", "3")
    assert done.exit_code == 0, done.output
    assert "block 0" in done.stdout
    assert "×∞" in done.stdout
    assert "perplexity of plain text: block 0 matters most" in done.stdout
    assert "The 3 most damaging of 48 parts" in done.stdout
    assert f"{one}/index.html" in done.stdout
    assert (one / "index.html").is_file()


def test_its_json_is_one_document(tmp_path: Path) -> None:
    done = call("report", folder(tmp_path / "one", make_results(infinite=True)), "--json", "--quiet")
    data = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert data["results"][0]["change"]["perplexity"]["value"] == "Infinity"
    assert len(data["results"]) == len(make_results()) - 1


def test_a_report_is_ordered_by_a_metric(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", make_refusal_results())

    def first_part(by: str) -> str:
        return call("report", one, "--by", by).stdout.partition("whole model")[2].splitlines()[1]

    assert "block 2" in first_part("refusal.target")
    assert "block 5" in first_part("kl.first_token")


def test_a_narrow_terminal_still_tells_of_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = folder(tmp_path / "one", make_refusal_results())
    monkeypatch.setattr(terminal.results, "width", 80)
    done = call("report", one)
    head = done.stdout.partition("──")[0]
    assert "refuses target prompts, %" in " ".join(head.split())
    assert "perplexity" not in head
    monkeypatch.setattr(terminal.results, "width", 200)
    assert "perplexity" in call("report", one).stdout.partition("──")[0]
    assert "perplexity of plain text: block 0 matters most" in done.stdout
    assert "perplexity" in (one / "table.md").read_text()


def test_studies_side_by_side(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one", make_results()), folder(tmp_path / "two", make_refusal_results())
    done = call("report", one, two, "--out", tmp_path / "both")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "both" / "index.html").is_file()
    assert not (one / "index.html").exists()
    again = call("report", one, two, "--out", tmp_path / "both")
    assert again.exit_code == 2
    assert "in use" in again.stderr
    shown = call("report", one, two, "--json")
    assert set(json.loads(shown.stdout)) == {"one", "two"}


def test_studies_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        folder(tmp_path / name / "same", make_results(2, 2))
    data = json.loads(call("report", tmp_path / "a" / "same", tmp_path / "b" / "same", "--json").stdout)
    assert set(data) == {str(tmp_path / n / "same") for n in ("a", "b")}


def test_what_a_report_cannot_be_made_of(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one", make_results(2, 2)), folder(tmp_path / "two", make_refusal_results())
    wrong = {
        ("report", tmp_path): "there is no results.jsonl",
        ("report", one, "--by", "accuracy"): "metric 'accuracy' does not exist",
        ("report", one, two, "--by", "kl.first_token"): "study 'one': metric",
        ("report", one, one): "named twice",
    }
    for words, message in wrong.items():
        done = call(*words)
        assert done.exit_code == 2, done.output
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (one / "index.html").exists()


# ------------------------------------------------------------------------------------ study --from-yaml
def test_a_yaml_study_becomes_a_study_file(tmp_path: Path) -> None:
    old = write_yaml({**OLD_STUDY, "remote": {"host": "h"}}, tmp_path)
    done = call("study", "--from-yaml", old, "--out", tmp_path / "new.toml")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert "differs: remote: host" in done.stderr
    assert load_study(tmp_path / "new.toml").model == "gpt2"
    again = call("study", "--from-yaml", old, "--out", tmp_path / "new.toml")
    assert again.exit_code == 2
    assert "does not exist yet" in again.stderr


def test_a_yaml_study_on_stdout(tmp_path: Path) -> None:
    old = write_yaml(OLD_STUDY, tmp_path)
    text = call("study", "--from-yaml", old).stdout
    (tmp_path / "new.toml").write_text(text)
    assert load_study(tmp_path / "new.toml").data.samples == 50
    data = json.loads(call("study", "--from-yaml", old, "--json").stdout)
    assert data["study"]["model"] == "gpt2"
    assert data["notes"] == []
    assert call("study", "--from-yaml", tmp_path / "none.yaml").exit_code == 2


# ---------------------------------------------------------------------------------------------- study
WRONG: dict[str, tuple[list[str], str]] = {
    "preset": (["quik", "m"], "did you mean 'quick'"),
    "file": (["none.toml", "m"], "this study file does not exist"),
    "yaml": (["old.yaml", "m"], "study --from-yaml old.yaml"),
    "no study": ([], "name a study file or one of quick"),
    "a study and a file to convert": (["quick", "--from-yaml", "old.yaml"], "leave 'quick' out"),
    "no model": (["quick"], "names no model"),
    "dtype": (["quick", "m", "--dtype", "float3"], "dtype 'float3' does not exist"),
    "set": (["quick", "m", "--set", "data.samples=0"], "data.samples"),
    "no prompts": (["refusal", "m"], "target"),
    "resume": (["quick", "m", "--resume"], "give --out"),
    "in use": (["quick", "m", "--out", "used"], "in use"),
    "unknown strategy": (["quick", "m", "--set", "strategies.0.use=layer"], "did you mean 'layers'"),
    "unknown option": (["quick", "m", "--set", "strategies.0.sizes=2"], "sizes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_study_cannot_be_run_with(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    done = call("study", *words)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["used"]
