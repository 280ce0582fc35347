"""List the methods for people: where to start, and all others with what they do and cost."""

from __future__ import annotations

from collections.abc import Sequence

from obliteratus.cli.terminal import say, show_groups
from obliteratus.core.settings import Recipe
from obliteratus.forecast.formula import COLUMNS, table_row

START = ("least_change", "informed", "tuned")
"""The methods to try first, in this order: each costs more than the one before it and leaves less."""


def show_methods(recipes: Sequence[Recipe]) -> None:
    """Print the methods to start with, then all others in the order of their names."""
    rows = {recipe.name: _row(recipe) for recipe in recipes}
    first = [rows.pop(name) for name in START if name in rows]
    name, what, cost = COLUMNS[:3]
    title = "Start with the first method, and go on to the next one if it leaves too much. The others follow by name."
    show_groups(title, [name, cost, what], [first, list(rows.values())])
    say("Cost: low takes at most a quarter longer than measuring alone, and high over four times as long.")
    say("obliteratus run MODEL --method NAME runs one.", "Next")
    say("obliteratus methods NAME prints a recipe, with its cost as a formula and its sources.", indent=True)


def _row(recipe: Recipe) -> list[str]:
    name, what, cost = table_row(recipe)[:3]
    return [name, cost, what]
