"""A search space: paths into a recipe with ranges. What a trial draws from it becomes an ordinary recipe."""

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
from obliteratus.pipeline.recipe import replace_values, value_at

Suggest = Callable[[str, BaseDistribution], Any]
"""(path, distribution) → the value that the sampler gives."""

# For a recipe that says nothing of a search: attention and MLP by themselves, and where the layers begin. The MLP's
# range reaches past 2, which some small models need; 0 leaves a part alone.
ADDED = (Step(use="component", attn=1.0, mlp=1.0), Step(use="middle", low=0.0, high=1.0))
RANGES = ({"attn": Range(low=0.0, high=1.5), "mlp": Range(low=0.0, high=3.0)}, {"low": Range(low=0.0, high=0.9)})
TRIALS = 60


def searchable(made: Recipe) -> Recipe:
    """The recipe with its own search, or with one over how hard each part is edited and from which depth on."""
    if made.search is not None:
        return made
    n = len(made.weigh)
    space = {f"weigh.{n + i}.{name}": span for i, ranges in enumerate(RANGES) for name, span in ranges.items()}
    update = {"weigh": (*made.weigh, *ADDED), "passes": 1, "search": Search(trials=TRIALS, space=space)}
    return Recipe(**{**dict(made), **update})


def distribution(values: Range) -> BaseDistribution:
    """A range as the sampler's; choices that are no plain values as JSON."""
    if values.choices:
        return CategoricalDistribution([_encoded(choice) for choice in values.choices])
    low, high = values.ends
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=values.log)
    return FloatDistribution(low, high, log=values.log)


def sample_values(made: Recipe, suggest: Suggest) -> dict[str, Any]:
    """One value for each path of the space, shorter paths first: what they choose may leave out others."""
    assert made.search is not None
    so_far, values = made, dict[str, Any]()
    for path in order_paths(made.search):
        if _there(so_far, path):
            values[path] = decode_values(suggest(path, distribution(made.search.space[path])), made.search.space[path])
            so_far = replace_values(without_search(so_far), {path: values[path]}, made.name)
    return values


def trial_recipe(made: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe that a trial stands for: no search in it any more."""
    return replace_values(without_search(made), values, made.name)


def start_values(made: Recipe) -> dict[str, Any]:
    """The values as they stand in the recipe, encoded for the sampler: where a search begins.

    Values that are not written, or lie outside of their range, are left to the sampler.
    """
    assert made.search is not None
    found: dict[str, Any] = {}
    for path in order_paths(made.search):
        value = value_at(made, path) if _there(made, path) else None
        if value is not None and _within(value, made.search.space[path]):
            found[path] = _encoded(value)
    return found


def _within(value: Any, values: Range) -> bool:
    if values.choices:
        return _encoded(value) in [_encoded(choice) for choice in values.choices]
    low, high = values.ends
    return bool(low <= value <= high)


def without_search(made: Recipe) -> Recipe:
    """Without the search."""
    return made.model_copy(update={"search": None})


def order_paths(search: Search) -> list[str]:
    """Paths, those first that may remove others."""
    return sorted(search.space, key=lambda path: path.count("."))


def decode_values(value: Any, values: Range) -> Any:
    """What the sampler gave, as it stands in a recipe."""
    return next((choice for choice in values.choices if _encoded(choice) == value), value)


def _encoded(value: Any) -> Any:
    """Samplers take plain values; a list of steps is one as JSON."""
    return json.dumps(value, sort_keys=True) if isinstance(value, list | tuple | dict) else value


def _there(made: Recipe, path: str) -> bool:
    try:
        value_at(made, path)
    except UserError:
        return False
    return True
