"""A plan that no run has made is saved like any other, and its card claims nothing that was not measured."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.plans import random_plan
from tests.support.tiny import run_of, tiny_subject

import obliteratus as ob
from obliteratus.rebirth.own_plan import describe_own_plan
from obliteratus.rebirth.run_page import read_run, write_run_page


def test_it_is_saved_and_comes_back(tmp_path: Path) -> None:
    subject = tiny_subject("llama")
    saved = ob.save(subject, random_plan(subject), out=tmp_path / "out")
    assert saved.status == "done"
    assert saved.saved["rescore"]["max_kl"] < 1e-5
    assert read_run(tmp_path / "out").recipe.name == "own plan"
    assert ob.load_plan(tmp_path / "out").edits[0].site == random_plan(subject).edits[0].site
    write_run_page(tmp_path / "out")  # as `report` does


def test_the_card_claims_no_measurement(tmp_path: Path) -> None:
    subject = tiny_subject("llama")
    ob.save(subject, random_plan(subject), out=tmp_path / "out", form="plan")
    card = (tmp_path / "out/README.md").read_text()
    assert "A plan made by hand: 6 changes in blocks 0 to 2 (attn.out, mlp.out), strength 1." in card
    assert "Nothing was measured" in card
    for claim in ("two groups of prompts", "## Recipe", "digest ``", "| seed |"):
        assert claim not in card
    ob.save(subject, random_plan(subject), run_of(subject), tmp_path / "run", form="plan")
    assert "two groups of prompts" in (tmp_path / "run/README.md").read_text()  # of a run it says so


def test_a_folder_is_needed() -> None:
    subject = tiny_subject("llama")
    for run in (None, describe_own_plan(subject, random_plan(subject))):
        with pytest.raises(ob.UserError, match="save: name the output folder"):
            ob.save(subject, random_plan(subject), run)
