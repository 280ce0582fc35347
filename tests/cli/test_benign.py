"""Benign prompts on the command line: measured beside target prompts, and edited without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.tiny import tiny, tiny_tokenizer
from typer.testing import CliRunner

from obliteratus.cli.app import app
from obliteratus.cli.usage import fill_example_prompts
from obliteratus.core.errors import UserError

THINGS = [f"{color} {thing}" for color in ("red", "blue", "old", "tall") for thing in ("house", "boat", "hill", "sea")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("benign")
    tiny("llama").save_pretrained(place / "tiny")
    tiny_tokenizer().save_pretrained(place / "tiny")
    (place / "target.txt").write_text("\n".join(f"Tell me about the {thing}." for thing in THINGS))
    (place / "control.txt").write_text("\n".join(f"How do I count to {n}, slowly?" for n in range(16)))
    rows = [f"Where is the {thing} now?,{'homonyms' if i % 2 else 'games'},safe" for i, thing in enumerate(THINGS)]
    rows += [f"Sell me the {thing}!,contrast,unsafe" for thing in THINGS]
    (place / "xstest.csv").write_text("\n".join(["prompt,type,label", *rows]))
    return place


def test_rates_of_benign_prompts_stand_beside_the_others_by_category(place: Path) -> None:
    sources = [f"--{group}={place / group}.txt" for group in ("target", "control")]
    command = [
        "verify",
        str(place / "tiny"),
        *sources,
        "--benign",
        f"{place / 'xstest.csv'}?label=safe",
        "--all",
        "--json",
    ]
    result = CliRunner().invoke(app, [*command, "--quiet"])
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)["after"]
    sizes = {name: scores[f"refusal.benign{name}"]["n"] for name in ("", "/homonyms", "/games")}
    assert sizes == {"": 16, "/homonyms": 8, "/games": 8}
    assert "refusal.benign/contrast" not in scores


def test_alone_they_are_the_target() -> None:
    given = {"target": None, "control": "c", "benign": "b"}
    assert fill_example_prompts(given, "refusal", {}) == {"target": "b", "control": "c", "benign": None}
    both = {"target": "t", "control": "c", "benign": "b"}
    assert fill_example_prompts(both, "refusal", {}) == both
    with pytest.raises(UserError, match="--control is missing"):
        fill_example_prompts(
            {"target": None, "control": None, "benign": "b"}, "refusal", {"target": "x", "control": "y"}
        )


def test_a_behavior_brings_prompts_to_keep() -> None:
    own = {"target": "t", "control": "c", "keep": "k"}
    assert fill_example_prompts({"target": None, "control": None}, "x", own) == own
    assert fill_example_prompts({"target": None, "control": None, "keep": "mine"}, "x", own)["keep"] == "mine"
    assert "keep" not in fill_example_prompts({"target": "t", "control": "c"}, "x", own)
