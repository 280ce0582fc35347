"""`obliteratus analyze`: one probe, one page, the numbers beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny, tiny_subject, tiny_tokenizer
from typer.testing import CliRunner

from obliteratus.analyze import analyses
from obliteratus.analyze.page import name_of
from obliteratus.analyze.report import analysed, chosen, cost_of
from obliteratus.cli import app
from obliteratus.errors import UserError
from obliteratus.types import Prompt, PromptSet

QUICK = ["geometry", "decomposition", "lens", "certificate"]


def files(folder: Path) -> list[str]:
    """Arguments for two files of prompts."""
    texts = {"target": "Tell me about star {}.", "control": "How do I cook dish {}?"}
    for group, text in texts.items():
        (folder / f"{group}.txt").write_text("\n".join(text.format(i) for i in range(24)))
    return [x for group in texts for x in (f"--{group}", str(folder / f"{group}.txt"))]


def test_the_command_writes_a_page_and_the_numbers(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    asked = ["analyze", str(tmp_path / "model"), *files(tmp_path), "--out", str(tmp_path / "out"), "--quiet"]
    done = CliRunner().invoke(app, [*asked, "--only", ",".join(QUICK), "--json"])
    assert done.exit_code == 0, done.output
    saved = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert saved.keys() == set(QUICK) == json.loads(done.stdout).keys()
    page = (tmp_path / "out" / "index.html").read_text()
    assert all(f'id="{name_of(name)}"' in page for name in QUICK)
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 2
    assert "in use" in again.output


def test_a_name_that_is_none_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["analyze", "nowhere", *files(tmp_path), "--out", str(tmp_path / "out"), "--only", "geometri"]
    )
    assert done.exit_code == 2
    assert "did you mean 'geometry'" in done.output


def test_cost_is_known_before() -> None:
    assert [step.use for step in chosen([])] == list(analyses)
    assert str(cost_of(chosen(["geometry"]))) == str(cost_of(chosen(["geometry", "cones"])))  # tensors ask nothing
    assert str(cost_of(chosen(["repair"]))) != str(cost_of(chosen(["geometry"])))


def test_all_analyses_share_one_probe() -> None:
    groups = {g: tuple(Prompt(f"{t} {i}") for i in range(24)) for g, t in (("target", "stars"), ("control", "food"))}
    found = analysed(tiny_subject("llama"), PromptSet(groups), chosen(["geometry", "separability", "positions"]))
    assert list(found) == ["geometry", "positions", "separability"]
    with pytest.raises(UserError, match="leaves no prompt"):
        analysed(tiny_subject("llama"), PromptSet({g: ps[:2] for g, ps in groups.items()}), chosen(["geometry"]))
