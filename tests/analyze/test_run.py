"""`obliteratus analyze`: one probe, one page, the numbers beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.contexts import stars_and_dishes
from tests.support.tiny import tiny, tiny_subject, tiny_tokenizer
from typer.testing import CliRunner

from obliteratus.analyze import analyses
from obliteratus.analyze.run import run_analysis, select_analyses
from obliteratus.cli.app import app
from obliteratus.core.errors import UserError
from obliteratus.report.html import anchor

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
    assert all(f'id="{anchor(name)}"' in page for name in QUICK)
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 2
    assert "in use" in again.output


def test_a_name_that_is_none_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["analyze", "nowhere", *files(tmp_path), "--out", str(tmp_path / "out"), "--only", "geometri"]
    )
    assert done.exit_code == 2
    assert "did you mean 'geometry'" in done.output


# ------------------------------------------------------------------------------------------------ a budget


def test_the_command_with_a_budget(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model = ["analyze", str(tmp_path / "model"), *files(tmp_path), "--out", str(tmp_path / "out"), "--quiet"]
    done = CliRunner().invoke(app, [*model, "--only", "geometry,repair,positions", "--budget", "40"])
    assert done.exit_code == 0, done.output
    saved = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert saved.keys() == {"geometry", "positions", "skipped"}
    assert saved["skipped"].keys() == {"repair"}
    assert "of the budget of 40 are left" in saved["skipped"]["repair"]
    assert "skipped: needs up to" in " ".join(done.stdout.partition("repair")[2].split())
    assert saved["skipped"]["repair"] in (tmp_path / "out" / "index.html").read_text()


def test_a_budget_below_nothing_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["analyze", "nowhere", *files(tmp_path), *out, "--budget", "-1"])
    assert done.exit_code == 2
    assert "budget: -1 is below 0; give 0" in done.output
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="budget: -1"):
        run_analysis(tiny_subject("llama"), stars_and_dishes(), select_analyses(["geometry"]), budget=-1)


# ------------------------------------------------------------------------------------------------ together
def test_all_analyses_share_one_probe() -> None:
    found = run_analysis(
        tiny_subject("llama"), stars_and_dishes(), select_analyses(["geometry", "separability", "positions"])
    ).findings
    assert list(found) == ["geometry", "positions", "separability"]
    with pytest.raises(UserError, match="has no prompt in the"):
        run_analysis(tiny_subject("llama"), stars_and_dishes(2), select_analyses(["geometry"]))


def test_all_analyses_of_plain_prompts_but_those_that_need_more() -> None:
    """Asked for by name, an analysis that cannot work is an error; among all, it is left out and says why."""
    assert [step.use for step in select_analyses([])] == list(analyses)
    report = run_analysis(tiny_subject("llama"), stars_and_dishes(), select_analyses([]), strict=False)
    assert set(report.findings) == set(analyses) - {"cones", "sae"}
    assert "needs at least 2 categories" in report.skipped["cones"]
    assert "too few to train on" in report.skipped["sae"]
    with pytest.raises(UserError, match="needs at least 2 categories"):
        run_analysis(tiny_subject("llama"), stars_and_dishes(), select_analyses(["cones"]))
