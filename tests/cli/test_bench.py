"""`obliteratus bench`: a table of 80 columns, one JSON document, every item in a folder, one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.harness import CHOICES, write_task
from tests.support.plans import random_plan
from tests.support.tiny import save_tiny, tiny_subject
from typer.testing import CliRunner, Result

from obliteratus.cli.app import app
from obliteratus.excise.plan import save_plan
from obliteratus.summon.load import open_subject


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, ``plan`` for it, ``other`` for another model, and the task ``small.yaml``."""
    folder = tmp_path_factory.mktemp("bench")
    subject = open_subject(save_tiny(folder / "model"))
    save_plan(random_plan(subject, strength=1.5), folder / "plan")
    save_plan(random_plan(tiny_subject("qwen2")), folder / "other")
    write_task(folder, "choices", name="small")
    return folder


def bench(folders: Path, *options: str, task: str = "small.yaml") -> Result:
    known = {name: str(folders / name) for name in ("plan", "other", "out")}
    tasks = str(folders / task) if task.endswith(".yaml") else task
    arguments = ["bench", str(folders / "model"), "--tasks", tasks, "--quiet", *(known.get(o, o) for o in options)]
    return CliRunner().invoke(app, arguments)


def test_base_and_edit_stand_side_by_side(folders: Path) -> None:
    result = bench(folders, "--plan", "plan")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "small, acc (5)" in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines() if line.startswith(" ")][:1] == ["plan"]
    assert "items: small, acc" in " ".join(result.stdout.split())


def test_json_and_the_folder_say_the_same(folders: Path, tmp_path: Path) -> None:
    result = bench(folders, "--plan", "plan", "--json", "--out", str(tmp_path / "out"))
    data = json.loads(result.stdout)
    assert data == json.loads((tmp_path / "out" / "bench.json").read_text())
    name = "benchmark.small.acc"
    lines = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert len(lines) == len(CHOICES)
    for side in ("base", "plan"):
        hits = [line["sides"][side]["acc"] for line in lines]
        assert data["scores"][side][name]["value"] == pytest.approx(sum(hits) / len(hits))
    difference = data["scores"]["plan"][name]["value"] - data["scores"]["base"][name]["value"]
    assert data["changes"]["plan"][name]["value"] == pytest.approx(difference)
    assert lines[0]["prompt"] == CHOICES[0]["question"]


def test_at_strength_zero_nothing_changes(folders: Path) -> None:
    data = json.loads(bench(folders, "--plan", "plan", "--strength", "0", "--json").stdout)
    assert data["scores"]["plan"] == data["scores"]["base"]


def test_without_a_plan_there_is_the_model_alone(folders: Path) -> None:
    result = bench(folders)
    assert result.exit_code == 0
    assert "to base" not in result.stdout
    assert "--plan FOLDER" in result.stdout


@pytest.mark.parametrize(
    ("options", "task", "said"),
    [
        ((), "smal", "task 'smal' does not exist"),
        ((), "hellaswag", "could not be fetched"),
        (("--plan", "other"), "small.yaml", "other: the plan was made for another model"),
        (("--strength", "0.5"), "small.yaml", "there is no plan whose strength could be set"),
        (("--strength", "9", "--plan", "plan"), "small.yaml", "give a number from -1 to 2"),
        (("--include", "/nowhere"), "reading", "/nowhere: no such folder"),
        (("--memory", "much"), "small.yaml", "--memory much: give a size"),
    ],
)
def test_bad_input_is_one_line(folders: Path, options: tuple[str, ...], task: str, said: str) -> None:
    result = bench(folders, *options, task=task)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (folders / "out").exists()
