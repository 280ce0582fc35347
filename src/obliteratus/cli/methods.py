"""The command methods: where to start, and all others with what they do and cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from obliteratus.cli.options import Json

if TYPE_CHECKING:
    from obliteratus.forecast.costs import PricedRecipe

START = ("balanced", "informed", "tuned")
"""The methods to try first, in this order: each costs more than the one before it and leaves less."""


def methods(
    name: Annotated[str | None, typer.Argument(help="Method whose recipe to show.")] = None, json: Json = False
) -> None:
    """List the methods with what each does and costs, or show the recipe of one with its memory and citations."""
    from obliteratus.cli.terminal import results, show_json
    from obliteratus.forecast.costs import annotate_recipe, read_method
    from obliteratus.pipeline.presets import list_methods

    chosen = {n: read_method(n) for n in ([name] if name else list_methods())}
    if json:
        show_json({n: {**recipe.model_dump(mode="json"), "cost": cost} for n, (recipe, cost) in chosen.items()})
    elif name:
        results.out(annotate_recipe(chosen[name]), end="")
    else:
        show_methods(list(chosen.values()))


def show_methods(methods: Sequence[PricedRecipe]) -> None:
    """Print the methods to start with, then all others in the order of their names."""
    from obliteratus.cli.terminal import say, show_groups
    from obliteratus.forecast.costs import COLUMNS, table_row

    rows = {name: [name, cost, what] for name, what, cost, *_ in map(table_row, methods)}
    first = [rows.pop(name) for name in START if name in rows]
    name, what, cost = COLUMNS[:3]
    title = "Start with the first method, and go on to the next one if it leaves too much. The others follow by name."
    show_groups(title, [name, cost, what], [first, list(rows.values())])
    say("Cost: low takes at most a quarter longer than measuring alone, and high over four times as long.")
    say("obliteratus run MODEL --method NAME runs one.", "Next")
    say("obliteratus methods NAME prints a recipe, with its cost as a formula and its sources.", indent=True)
