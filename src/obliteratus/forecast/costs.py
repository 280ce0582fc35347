"""What the methods of the package cost, read from a file, so that they are listed without importing a single step.

`make docs` writes the file from the formulas, and a test fails if it is out of date.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from obliteratus.core.settings import Recipe
from obliteratus.core.toml import dump_toml
from obliteratus.pipeline.presets import METHODS

COSTS = Path(__file__).with_name("costs.json")
COLUMNS = ["name", "what it does", "cost", "memory", "source"]


class PricedRecipe(NamedTuple):
    """A recipe and what it costs."""

    recipe: Recipe
    cost: Mapping[str, Any]
    """See `formula.describe_cost`."""


def read_method(source: str) -> PricedRecipe:
    """Return a method by name, with its cost from the file, or a recipe file by path, with its cost computed.

    A method of the package was checked by its tests. Raises UserError as `load_recipe` does.
    """
    data = METHODS.read(source)
    if source in METHODS.list_names():
        return PricedRecipe(Recipe(**data), read_costs()[source])
    from obliteratus.forecast.formula import describe_cost
    from obliteratus.pipeline.recipe import load_recipe

    recipe = load_recipe(source)
    return PricedRecipe(recipe, describe_cost(recipe))


def read_costs() -> dict[str, dict[str, Any]]:
    """Return the cost of each method of the package."""
    costs: dict[str, dict[str, Any]] = json.loads(COSTS.read_text(encoding="utf-8"))
    return costs


def table_row(priced: PricedRecipe) -> list[str]:
    """Return a method's row in the table of methods, whose columns are `COLUMNS`."""
    recipe, cost = priced
    return [recipe.name, recipe.about, cost["class"], cost["memory"]["class"], ", ".join(recipe.cite)]


def annotate_recipe(priced: PricedRecipe) -> str:
    """Return the recipe as TOML with its cost in comments at the top."""
    recipe, cost = priced
    memory = cost["memory"]
    head = [
        f"{recipe.name}: {cost['formula']}",
        f"cost {cost['class']}, memory {memory['class']}: {memory['formula']}",
    ]
    return "".join(f"# {line}\n" for line in head) + dump_toml(recipe)
