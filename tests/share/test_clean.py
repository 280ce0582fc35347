"""What is passed on holds no examples of a behavior, no path and no key, and is otherwise what it was."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest

from obliteratus.core.results import Score
from obliteratus.core.settings import JudgeSettings
from obliteratus.judge.behavior import load_behavior
from obliteratus.pipeline.recipe import load_recipe, parse_recipe
from obliteratus.share.clean import clean_recipe, find_hidden, name_source
from obliteratus.share.model_files import sum_file
from obliteratus.share.tolerances import allowed_difference

OWN = {
    "name": "grumble",
    "about": "The answer grumbles.",
    "en": {"opening": ["oh no"]},
    "target": "/home/ann/secret/target.jsonl",
    "labeled": [{"prompt": "Who is there?", "answer": "Oh no, not you.", "shown": True}],
}


def test_examples_of_an_own_behavior_are_left_out_and_named() -> None:
    recipe = load_recipe("basic").model_copy(update={"judge": JudgeSettings(behavior=OWN)})
    data, left_out = clean_recipe(recipe)
    assert left_out == ("judge.behavior.labeled", "judge.behavior.target")
    assert data["judge"]["behavior"] == {key: OWN[key] for key in ("name", "about", "en")}
    assert parse_recipe(data, "it").judge.behavior == data["judge"]["behavior"]


def test_a_recipe_without_anything_private_stays_as_it_is() -> None:
    recipe = load_recipe("informed")
    data, left_out = clean_recipe(recipe)
    assert left_out == ()
    assert parse_recipe(data, "it") == recipe


def test_paths_and_keys_in_a_recipe_are_hidden_and_found_again() -> None:
    judge = JudgeSettings(rungs=("/home/ann/judge",), url="https://ann:pw@judge.example/v1?key=1", url_model="m")
    data, _ = clean_recipe(load_recipe("basic").model_copy(update={"judge": judge}))
    assert "ann" not in str(data)
    assert data["judge"]["url"] == "https://judge.example/v1"
    assert list(find_hidden(data)) == [("judge.rungs.0", "…/judge")]


def test_examples_of_a_built_in_behavior_are_named_after_it() -> None:
    assert name_source(str(load_behavior("disclaimer").head.target)) == "behavior:disclaimer"
    assert name_source("/home/ann/target.txt") == "…/target.txt"
    for kept in ("target.txt", "organism:astronomy", "hub:owner/name@abc:default:train"):
        assert name_source(kept) == kept


def test_a_large_file_of_the_hubs_cache_is_known_by_its_name(tmp_path: Path) -> None:
    """There, and only there: a file that is called like a sum elsewhere is read."""
    data, name = b"weights", "a" * 64
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_bytes(data)
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    (tmp_path / name).write_bytes(data)
    assert sum_file(tmp_path / "model.safetensors").sha256 == name
    assert sum_file(tmp_path / name).sha256 == hashlib.sha256(data).hexdigest()
    assert sum_file(tmp_path / name).bytes == len(data)


@pytest.mark.parametrize(
    ("value", "n", "unit", "allowed"),
    [
        (0.5, 64, "share", 2 / 64),
        (0.5, 1000, "share", 0.02),
        (46.0, 16, "perplexity", 4.6),
        (0.02, 96, "nats", 0.01),
        (math.inf, 16, "perplexity", 0.01),
    ],
)
def test_what_a_score_may_differ_by(value: float, n: int, unit: str, allowed: float) -> None:
    score = Score(value=value, low=math.nan, high=math.nan, n=n, unit=unit)
    assert allowed_difference(score) == pytest.approx(allowed)
