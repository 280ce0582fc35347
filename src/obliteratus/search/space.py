"""Search spaces: ranges for paths into a recipe. The values that a trial draws give an ordinary recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Range, Recipe, Search, Step
from obliteratus.pipeline.recipe import replace_values
from obliteratus.pipeline.values import value_at

Suggest = Callable[[str, BaseDistribution], Any]
"""(path, distribution) → the sampler's value."""

# The search of a recipe without one: factors on attention and MLP, and the first edited layer. The MLP's range goes
# beyond 2, which some small models need; a factor of 0 leaves a part alone.
DEFAULT_STEPS = (Step(use="component", attn=1.0, mlp=1.0), Step(use="middle", low=0.0, high=1.0))
DEFAULT_RANGES = (
    {"attn": Range(low=0.0, high=1.5), "mlp": Range(low=0.0, high=3.0)},
    {"low": Range(low=0.0, high=0.9)},
)
DEFAULT_TRIALS = 60


def add_default_search(recipe: Recipe) -> Recipe:
    """Return the recipe with its own search, or the default one: how hard to edit each part, from which depth."""
    if recipe.search is not None:
        return recipe
    n = len(recipe.weigh)
    space = {f"weigh.{n + i}.{name}": span for i, ranges in enumerate(DEFAULT_RANGES) for name, span in ranges.items()}
    search = Search(trials=DEFAULT_TRIALS, space=space)
    update = {"weigh": (*recipe.weigh, *DEFAULT_STEPS), "passes": 1, "search": search}
    return Recipe(**{**dict(recipe), **update})


def make_distribution(values: Range) -> BaseDistribution:
    """Convert a range for the sampler. Choices that are not plain values are encoded as JSON."""
    if values.choices:
        return CategoricalDistribution([_encode(choice) for choice in values.choices])
    low, high = values.ends
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=values.log)
    return FloatDistribution(low, high, log=values.log)


def sample_values(recipe: Recipe, suggest: Suggest) -> dict[str, Any]:
    """Draw a value for each path of the space. Shorter paths come first, as their choice may remove other paths."""
    assert recipe.search is not None
    current, values = recipe, dict[str, Any]()
    for path in order_paths(recipe.search):
        if _has_path(current, path):
            allowed = recipe.search.space[path]
            values[path] = decode_values(suggest(path, make_distribution(allowed)), allowed)
            current = replace_values(remove_search(current), {path: values[path]}, recipe.name)
    return values


def apply_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a trial: these values filled in, and no search."""
    return replace_values(remove_search(recipe), values, recipe.name)


def start_values(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe's own values, encoded for the sampler, as the first trial.

    Values that the recipe does not set, or that lie outside of their range, are left to the sampler.
    """
    assert recipe.search is not None
    present = [path for path in order_paths(recipe.search) if _has_path(recipe, path)]
    values = {path: _start_value(recipe, path, recipe.search.space[path]) for path in present}
    return {path: _encode(value) for path, value in values.items() if value is not None}


def _start_value(recipe: Recipe, path: str, allowed: Range) -> Any:
    """Return the choice that leaves the recipe as it is, or its own value in a range; None if there is neither."""
    own = remove_search(recipe)
    if allowed.choices:
        return next((c for c in allowed.choices if replace_values(own, {path: c}, recipe.name) == own), None)
    value, (low, high) = value_at(recipe, path), allowed.ends
    return value if value is not None and low <= value <= high else None


def remove_search(recipe: Recipe) -> Recipe:
    """Return the recipe without its search."""
    return recipe.model_copy(update={"search": None})


def order_paths(search: Search) -> list[str]:
    """Return the paths of the space, those that may remove others first."""
    return sorted(search.space, key=lambda path: path.count("."))


def decode_values(value: Any, values: Range) -> Any:
    """Convert a sampler's value back to what stands in a recipe."""
    return next((choice for choice in values.choices if _encode(choice) == value), value)


def _encode(value: Any) -> Any:
    """Encode lists and tables as JSON, since samplers take plain values only."""
    return json.dumps(value, sort_keys=True) if isinstance(value, list | tuple | dict) else value


def _has_path(recipe: Recipe, path: str) -> bool:
    try:
        value_at(recipe, path)
    except UserError:
        return False
    return True
