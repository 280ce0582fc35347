"""A run goes on only with what it began with: the identity of a run is its content, not the name of a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.support.tiny import TEMPLATE, tiny, tiny_tokenizer
from typer.testing import CliRunner, Result

from obliteratus.cli.app import app
from obliteratus.core.run_folder import keep_time
from obliteratus.summon.fingerprint import fingerprint_files

CLOCK = "{{ strftime_now('%H:%M:%S') }}\n"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    tiny("llama").save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CLOCK + TEMPLATE, "short": "{% if enable_thinking %}x{% endif %}" + TEMPLATE}
    tokenizer.save_pretrained(folder)
    return folder


def change_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3  # one value, which no edit writes
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_json(name: str, key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(data | {key: value}), encoding="utf-8")

    return change


def change_template(folder: Path) -> None:
    (file,) = folder.glob("*.jinja")
    file.write_text(file.read_text(encoding="utf-8") + "!", encoding="utf-8")


def nothing(folder: Path) -> None:
    pass


CHANGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "weights": (change_weights, (), "weights"),
    "configuration": (change_json("config.json", "rms_norm_eps", 1e-3), (), "configuration"),
    "end token": (change_json("generation_config.json", "eos_token_id", 3), (), "configuration"),
    "tokenizer": (change_json("tokenizer.json", "note", 1), (), "tokenizer"),
    "chat template": (change_template, (), "chat template"),
    "another template": (nothing, ("--template", "short"), "chat template"),
    "thinking": (nothing, ("--template", "short", "--thinking"), "chat template, thinking mode"),
    "dtype": (nothing, ("--dtype", "bfloat16"), "dtype"),
    "form": (nothing, ("--save", "plan"), "form"),
    "recipe": (nothing, ("--seed", "1"), "recipe"),
}


@pytest.fixture
def interrupted(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """A run that was interrupted when all but the last stage was done; call it to go on."""
    for group, start in (("target", "Tell me about"), ("control", "How do I count")):
        lines = (f"{start} {what}." for what in ["the sea", "two old boats", "my hill", "a red door", "her tall house"])
        more = (f"{start} number {n} and {n + 7} slowly?" for n in range(12))
        (tmp_path / f"{group}.txt").write_text("\n".join((*lines, *more)), encoding="utf-8")

    def go(*options: str) -> Result:
        prompts = ("--target", tmp_path / "target.txt", "--control", tmp_path / "control.txt")
        return call("run", model, *prompts, "--out", tmp_path / "out", "--quiet", "--force", *options)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("obliteratus.cli.jobs.write_output", stop)
    first = go()
    assert first.exit_code == 130, first.output
    assert f"the finished stages are kept in {tmp_path / 'out.partial'}, for --resume" in first.stderr
    monkeypatch.undo()
    return go


@pytest.mark.parametrize("changed", CHANGES)
def test_something_else_is_named_and_nothing_is_mixed(
    changed: str, model: Path, tmp_path: Path, interrupted: Callable[..., Result]
) -> None:
    change, options, name = CHANGES[changed]
    change(model)
    result = interrupted("--resume", *options)
    assert result.exit_code == 2, result.output
    assert f"the interrupted run had another {name}; resume with the same, or remove it" in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_same_goes_on_at_the_same_time_of_day(
    model: Path, tmp_path: Path, interrupted: Callable[..., Result]
) -> None:
    """A copy of the model's files is the same model, and the template's clock still shows when the run began."""
    began = (tmp_path / "out.partial" / "began").read_text(encoding="utf-8")
    shutil.copytree(model, tmp_path / "copy")
    shutil.rmtree(model)
    (tmp_path / "copy").rename(model)
    result = interrupted("--resume")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert record["prompts"]["chat"]["now"] == began[:19]


def test_the_time_is_kept(tmp_path: Path) -> None:
    noon, later = datetime(2026, 1, 1, 12), datetime(2026, 1, 1, 13)
    assert keep_time(tmp_path, noon) == keep_time(tmp_path, later) == noon


def test_every_value_counts(model: Path) -> None:
    before = fingerprint_files(model)
    change_weights(model)
    after = fingerprint_files(model)
    assert {kind for kind in before if before[kind] != after[kind]} == {"weights"}
