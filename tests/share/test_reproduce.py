"""A run that is done again gives the same; what is missing, changed or different is named and never passed over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.support.command_line import call, one_line
from tests.support.fake_hub import FakeHub, fake_hub
from tests.support.shared_runs import TinyRun, find_private, make_run
from typer.testing import Result

from obliteratus.excise.plan import load_plan, plan_digest
from obliteratus.share.reproduce_file import FILE, parse_reproduce_file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("place"), "--deterministic")


@pytest.fixture
def moved(made: TinyRun, tmp_path: Path) -> TinyRun:
    """A copy of the whole place, to be changed. The record still names the places of old."""
    place = Path(shutil.copytree(made.place, tmp_path / "moved"))
    record = place / "out" / "run.json"
    record.write_text(record.read_text().replace(str(made.place), str(place)))
    return TinyRun(place)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch, tmp_path / "cache") as found:
        yield found


def reproduce(source: object, *options: object) -> Result:
    return call("reproduce", source, "--quiet", *options)


def check(made: TinyRun, *options: object) -> Result:
    return reproduce(made.out, "--check", *options)


def places(made: TinyRun) -> list[object]:
    """Options that say where everything is."""
    groups = [x for group in ("target", "control") for x in (f"--{group}", made.place / f"{group}.txt")]
    return ["--model", made.model, *groups]


def change(made: TinyRun, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the file of a run."""
    data = json.loads((made.out / FILE).read_text())
    edit(data)
    (made.out / FILE).write_text(json.dumps(data))


# ------------------------------------------------------------------------------------------ the file
def test_the_file_holds_what_a_run_depends_on_and_nothing_private(made: TinyRun) -> None:
    text = (made.out / FILE).read_text()
    assert find_private(text.encode(), made) == []
    found = parse_reproduce_file(made.out / FILE, "it")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= found.model.files.keys()
    assert {"python", "torch", "transformers", "obliteratus"} <= found.versions.keys()
    assert found.prompts["target"].source == "…/target.txt"
    assert found.prompts["target"].prompts == 36
    assert found.plan.digest == plan_digest(load_plan(made.out))
    assert found.hardware["processor"]
    assert found.deterministic is not None
    assert found.deterministic.memory > 0
    assert found.recipe["name"] == "basic"
    record = json.loads((made.out / "run.json").read_text())
    assert json.loads(text)["after"] == record["after"]


# ------------------------------------------------------------------------------------------ the same again
def test_done_again_every_bit_is_the_same(made: TinyRun, tmp_path: Path) -> None:
    result = reproduce(made.out, "--out", tmp_path / "again", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["met"]
    assert found["plan"]["bitwise"]
    assert found["differences"] == found["conditions"] == []
    assert found["scores"] > 20
    for name in ("plan.safetensors", "plan.json"):
        assert (tmp_path / "again" / name).read_bytes() == (made.out / name).read_bytes()
    assert json.loads((tmp_path / "again" / "reproduction.json").read_text()) == found


def test_done_again_from_a_hub(made: TinyRun, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was pushed with its prompts needs the model alone."""
    monkeypatch.chdir(tmp_path)
    pushed = call("push", made.out, "ann/edited", "--yes", "--with-prompts", "--quiet")
    assert pushed.exit_code == 0, pushed.output
    assert "give it with --model" in one_line(reproduce("hub:ann/edited"))
    result = reproduce("hub:ann/edited", "--model", made.model, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plan"]["bitwise"]
    assert (tmp_path / "edited-again" / "plan.json").is_file()


def test_another_recipe_is_found_out(moved: TinyRun, tmp_path: Path) -> None:
    """Negative control: half the strength is another plan with other scores, and exits with 3."""
    result = reproduce(moved.out, "--set", "excise.strength=0.5", "--out", tmp_path / "again", "--json")
    assert result.exit_code == 3, result.output
    found = json.loads(result.stdout)
    assert not found["met"]
    assert found["plan"]["largest"] == pytest.approx(0.5)
    assert not found["plan"]["within"]


def test_scores_that_differ_beyond_their_tolerance_are_shown(moved: TinyRun, tmp_path: Path) -> None:
    """Without the plan beside the file only its digest and the scores are compared."""

    def edit(data: dict[str, Any]) -> None:
        data["after"]["refusal.target"]["value"] += 0.9 if data["after"]["refusal.target"]["value"] < 0.5 else -0.9
        data["after"]["perplexity.ratio"]["value"] += 0.001
        data["plan"]["digest"] = "0" * 64

    change(moved, edit)
    (moved.out / "plan.safetensors").unlink()
    result = reproduce(moved.out, "--out", tmp_path / "again", *places(moved))
    assert result.exit_code == 3, result.output
    said = " ".join(result.stdout.split())
    assert "only the digest of the earlier plan is known" in said
    assert "1 within tolerance, 1 beyond tolerance" in said
    assert "after refusal.target" in said
    assert "Not reproduced" in said


# ------------------------------------------------------------------------------------------ bad input
def test_all_that_it_takes_is_here(made: TinyRun) -> None:
    """Positive control of the checks below."""
    result = check(made, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"conditions": []}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda text: text[: len(text) // 2], "damaged or not whole"),
        (lambda text: "", "damaged or not whole"),
        (lambda text: "[1]", "no version"),
        (lambda text: '{"version": "1"}', "no version"),
        (
            lambda text: text.replace('"version": 1', '"version": 9', 1),
            "of version 9, and this program reads version 1",
        ),
        (lambda text: text.replace('"seed": 0,\n "request"', '"seed": "x",\n "request"'), "not as a run writes it"),
        (lambda text: text.replace('"recipe": {', '"recipe": {"unknown": 1,'), "unknown"),
        (lambda text: "[" * 10**5, "damaged or not whole"),
    ],
)
def test_a_damaged_file(moved: TinyRun, content: Callable[[str], str], said: str) -> None:
    path = moved.out / FILE
    changed = content(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    assert said in one_line(check(moved))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no reproduce.json" in one_line(reproduce(tmp_path / "x.json"))
    assert "there is no reproduce.json" in one_line(reproduce(tmp_path))


def test_a_model_that_is_gone(moved: TinyRun) -> None:
    shutil.rmtree(moved.model)
    line = one_line(check(moved))
    assert "is not here; give its place with --model" in line


def test_a_model_that_changed(moved: TinyRun) -> None:
    weights = load_file(moved.model / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, moved.model / "model.safetensors", {"format": "pt"})
    assert "not the one that was edited (changed: model.safetensors)" in one_line(check(moved))
    result = check(moved, "--anyway", "--json")
    assert result.exit_code == 0, result.output
    (condition,) = json.loads(result.stdout)["conditions"]
    assert "changed: model.safetensors" in condition


def test_a_file_more_or_less_is_another_model(moved: TinyRun) -> None:
    (moved.model / "generation_config.json").unlink()
    (moved.model / "added_tokens.json").write_text("{}")
    line = one_line(check(moved))
    assert "missing: generation_config.json; new: added_tokens.json" in line


def test_prompts_that_changed_or_are_gone(moved: TinyRun) -> None:
    target = moved.place / "target.txt"
    target.write_text("\n".join([*moved.prompts[:35], "Something # else entirely now?"]))
    line = one_line(check(moved))
    assert str(target) in line
    assert "these are not the prompts of the run" in line
    target.unlink()
    assert "the target prompts" in (line := one_line(check(moved)))
    assert "give them with --target" in line


def test_a_file_alone_says_what_is_missing(made: TinyRun, tmp_path: Path) -> None:
    """The file that is passed on knows no paths: the model and the prompts have to be given."""
    alone = shutil.copy(made.out / FILE, tmp_path / "alone.json")
    assert "give it with --model" in one_line(reproduce(alone, "--check"))
    assert "give them with --target" in one_line(reproduce(alone, "--check", "--model", made.model))
    result = reproduce(alone, "--check", *places(made))
    assert result.exit_code == 0, result.output


def test_the_plan_beside_the_file_is_the_plan_of_the_file(moved: TinyRun) -> None:
    (moved.out / "plan.json").write_text((moved.out / "plan.json").read_text() + "\n")
    assert "not the plan that reproduce.json is about" in one_line(check(moved))


def test_another_release_is_listed(moved: TinyRun) -> None:
    change(moved, lambda data: data["versions"].update(torch="2.9.0"))
    result = check(moved, "--json")
    assert result.exit_code == 0
    (condition,) = json.loads(result.stdout)["conditions"]
    assert condition.startswith("release: torch ")
    assert condition.endswith(", was 2.9.0")


def test_code_and_endpoints_of_others_have_to_be_allowed(moved: TinyRun) -> None:
    """A file from somewhere must neither run code nor send prompts and a key somewhere."""
    change(moved, lambda data: data["request"].update(trust_remote_code=True))
    assert "add --trust-remote-code if you trust it" in one_line(check(moved))
    assert check(moved, "--trust-remote-code").exit_code == 0
    change(moved, lambda data: data["recipe"]["judge"].update(url="https://judge.example/v1"))
    assert "add --judge-url" in one_line(check(moved, "--trust-remote-code"))


def test_a_path_of_another_machine_in_the_recipe(moved: TinyRun) -> None:
    change(moved, lambda data: data["recipe"]["judge"].update(rungs=["classifier", "…/judge"]))
    line = one_line(check(moved))
    assert "judge.rungs.1 of the recipe is a path of another machine, …/judge" in line
    assert check(moved, "--set", 'judge.rungs=["classifier"]').exit_code == 0


@pytest.mark.parametrize("status", [401, 404, 429, 500])
def test_a_hub_that_fails(hub: FakeHub, status: int) -> None:
    hub.fault = lambda method, path: status
    line = one_line(reproduce("hub:ann/edited", "--check"))
    assert line.startswith("error: hub:ann/edited: ")
    assert str(status) in line


def test_a_repository_that_is_not_there_or_no_run(hub: FakeHub, tmp_path: Path) -> None:
    assert "no such repository" in one_line(reproduce("hub:ann/nothing", "--check"))
    assert "owner/name" in one_line(reproduce("hub:a b/c", "--check"))
