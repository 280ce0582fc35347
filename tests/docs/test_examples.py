"""The scripts of examples/ are short, use the public names alone, and run from top to bottom."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.refuser import asked, refuser
from tests.support.registries import forget_steps
from tests.support.variants import vary
from typer.testing import CliRunner

from obliteratus.cli.app import app

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
MOST_LINES = 40
ORGANISM = '"organism:astronomy"'
SAID = {
    "cosine_plot": "largest KL between the live and the saved model",
    "own_direction": "control: before",
    "own_extractor": "→",
}
LEFT = {"cosine_plot": ["cosines.png", "edited/model.safetensors"], "own_direction": ["own-direction/plan.json"]}


def public_only(text: str) -> bool:
    """Whether a script imports nothing of ours but the package itself."""
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module or "" for node in imports if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    return "obliteratus" in names and not any(name.startswith("obliteratus.") for name in names)


def test_there_are_scripts() -> None:
    assert [path.stem for path in SCRIPTS] == sorted(SAID)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_short_and_uses_the_public_names(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert public_only(text)


def test_other_names_would_be_noticed() -> None:
    assert not public_only("import obliteratus as ob\nfrom obliteratus.core.types import Plan")
    assert not public_only("import torch")


def write_inputs(folder: Path) -> None:
    """Write the tiny refuser and its prompts into a folder."""
    subject = refuser(word="I cannot help with that.")
    subject.model.save_pretrained(folder / "model")
    subject.tokenizer.save_pretrained(folder / "model")
    for group, prompts in vary(asked(), 3).groups.items():
        (folder / f"{group}.txt").write_text("\n".join(prompt.text for prompt in prompts))


def adapt(text: str) -> str:
    """Let a script open the tiny model and its prompts."""
    for group in ("target", "control"):
        text = text.replace(f"{group}={ORGANISM}", f'{group}="{group}.txt"')
    return text.replace(ORGANISM, '"model"')


@pytest.fixture(autouse=True)
def _forget_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    forget_steps(monkeypatch)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_inputs(tmp_path)
    (tmp_path / path.name).write_text(adapt(path.read_text()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    runpy.run_path(path.name, run_name="__main__")
    assert SAID[path.stem] in capsys.readouterr().out
    assert all((tmp_path / name).is_file() for name in LEFT.get(path.stem, []))


@pytest.mark.organism
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_as_it_is(path: Path, tmp_path: Path) -> None:
    environment = os.environ | {"MPLBACKEND": "agg"}
    found = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert SAID[path.stem] in found.stdout


def test_the_extractor_is_a_plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    verify = '[[verify]]\nuse = "behavior"\ntokens = 4\n'
    Path("mine.toml").write_text(f'about = "mine"\n[[distill]]\nuse = "trimmed_diff"\ntrim = 0.2\n{verify}')
    words = ["run", "model", "--target", "target.txt", "--control", "control.txt", "--method", "mine.toml", "--json"]
    plugin = ["--plugin", str(ROOT / "examples/own_extractor.py"), "--quiet"]
    done = CliRunner().invoke(app, [*words, *plugin])
    assert done.exit_code == 0, done.output
    assert '"trimmed_diff"' in done.stdout
    assert '"plug-in own_extractor.py"' in done.stdout


def test_a_forecast_takes_a_plug_in_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text('about = "mine"\n[[distill]]\nuse = "trimmed_diff"\n')
    words = ["inspect", "model", "--memory", "8GB", "--method", "mine.toml", "--json"]
    sources = ["--target", "target.txt", "--control", "control.txt"]
    refused = CliRunner().invoke(app, [*words, *sources])
    assert refused.exit_code == 2
    assert "'trimmed_diff' does not exist" in refused.stderr
    plugin = ["--plugin", str(ROOT / "examples/own_extractor.py")]
    done = CliRunner().invoke(app, [*words, *sources, *plugin])
    assert done.exit_code == 0, done.output
    assert '"plan"' in done.stdout
    without = CliRunner().invoke(app, ["inspect", "model", *plugin])
    assert "--plugin: only a forecast uses them; add --memory SIZE" in without.stderr
