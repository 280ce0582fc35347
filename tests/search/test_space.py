"""Spaces: paths that a choice removes, the recipe as the first trial, and spaces that are refused."""

from __future__ import annotations

from typing import Any

import pytest
from tests.support.searches import search_recipe

from obliteratus.core.errors import UserError
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.search.space import apply_values, decode_values, remove_search, sample_values, start_values


def test_paths_that_a_choice_removes_are_left_out() -> None:
    recipe = load_recipe("heretic")
    assert recipe.search is not None
    short = recipe.search.space["distill"].choices[0]

    def first(path: str, values: Any) -> Any:
        return values.choices[0] if path == "distill" else values.low

    def second(path: str, values: Any) -> Any:
        return values.choices[1] if path == "distill" else values.low

    assert "distill.2.at" not in sample_values(recipe, first)
    assert sample_values(recipe, second)["distill.2.at"] == 0.4
    assert [s.use for s in apply_values(recipe, sample_values(recipe, first)).distill] == [s["use"] for s in short]
    assert apply_values(recipe, sample_values(recipe, second)).distill[2].options["at"] == 0.4


def test_values_of_a_choice_are_drawn_without_changing_the_choice() -> None:
    recipe = load_recipe("heretic")
    assert recipe.search is not None
    before = recipe.model_dump_json()
    longer = recipe.search.space["distill"].choices[1]
    for at in (0.4, 0.9):
        assert apply_values(recipe, {"distill": longer, "distill.2.at": at}).distill[2].options["at"] == at
    assert recipe.model_dump_json() == before


def test_the_first_trial_has_the_choices_that_the_recipe_stands_for() -> None:
    recipe = load_recipe("heretic")
    assert recipe.search is not None
    start = start_values(recipe)
    assert start.keys() == recipe.search.space.keys()
    values = {path: decode_values(start[path], span) for path, span in recipe.search.space.items()}
    assert apply_values(recipe, values) == remove_search(recipe)


def test_a_search_begins_where_the_recipe_stands() -> None:
    recipe = search_recipe()
    assert start_values(recipe) == {"excise.strength": 1.0, "weigh.0.low": 0.0}
    far = search_recipe(space={"excise.strength": {"low": 2.0, "high": 3.0}})
    assert start_values(far) == {}  # 1 is out of range: left to the sampler


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "at least 1 item"),
        ({"excise.strength": {"low": 2.0, "high": 1.0}}, "low below high"),
        ({"probe.position": {"low": -2, "high": -1}}, "only paths in distill, weigh and excise can be searched"),
        ({"excise.strenth": {"low": 0.0, "high": 1.0}}, "strenth"),
    ],
)
def test_spaces_that_cannot_be(space: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("basic", {"search": {"trials": 3, "space": space}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "nsga2", "startup_trials": 5}, "startup_trials is for the samplers tpe and gp"),
        ({"sampler": "gp", "candidates": 5}, "candidates is for the sampler tpe"),
        ({"minimize": ["behavior.target"], "kl_target": 0.01}, r"kl_target is about kl\.first_token\.mean"),
        ({"kl_target": -0.01}, "kl_target"),
        ({"startup_trials": 0}, "startup_trials"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any], message: str) -> None:
    space = {"excise.strength": {"low": 0.0, "high": 1.0}}
    with pytest.raises(UserError, match=message):
        load_recipe("basic", {"search": {"trials": 3, "space": space, **settings}})
