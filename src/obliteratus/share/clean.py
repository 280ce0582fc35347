"""Copies of what a run recorded, without what others must not see: absolute paths, keys, prompts and answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from obliteratus.core.results import Run
from obliteratus.core.settings import Recipe
from obliteratus.judge.behavior_file import FOLDER, list_behaviors, read_behavior
from obliteratus.report.hide import HIDDEN, hide_private

EXAMPLES = ("labeled", "target", "control")
"""Entries of a behavior's table that hold prompts and answers, or say where they are."""


def hide_data(value: Any) -> Any:
    """Return plain data with absolute paths cut to their last part, and keys left out, in every text."""
    if isinstance(value, str):
        return hide_private(value)
    if isinstance(value, Mapping):
        return {hide_private(str(key)): hide_data(item) for key, item in value.items()}
    return [hide_data(item) for item in value] if isinstance(value, list | tuple) else value


def is_hidden(text: str) -> bool:
    """Return whether the text is a path or key that was hidden, so that it names nothing any more."""
    return text == HIDDEN or text.startswith((f"{HIDDEN}/", f"{HIDDEN}\\"))


def find_hidden(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and text of everything in plain data that was hidden."""
    if isinstance(value, str) and is_hidden(value):
        yield path, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from find_hidden(item, f"{path}.{key}" if path else str(key))


def clean_recipe(recipe: Recipe) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a recipe as plain data, and the paths of what it does not hold any more.

    The examples in the table of a user's own behavior are prompts and answers; they are left out.
    """
    data = recipe.model_dump(mode="json")
    behavior = data["judge"]["behavior"]
    found = tuple(name for name in EXAMPLES if isinstance(behavior, dict) and behavior.get(name))
    if found:
        data["judge"]["behavior"] = {key: value for key, value in behavior.items() if key not in EXAMPLES}
    return hide_data(data), tuple(f"judge.behavior.{name}" for name in found)


def clean_run(run: Run) -> Run:
    """Return the record of a run without absolute paths, keys, and words of prompts and answers."""
    data = run.model_dump(mode="json")
    data["recipe"] = clean_recipe(run.recipe)[0]
    if data["judge"].get("own_words"):
        data["judge"]["own_words"] = []  # openings of answers, which the model writes again when it is asked again
    data["prompts"]["sources"] = {group: name_source(s) for group, s in data["prompts"].get("sources", {}).items()}
    return Run.model_validate(hide_data(data))


def name_source(source: str) -> str:
    """Return how a source of prompts is named elsewhere: a behavior's own examples by its name, a file by its last part
    if its path is absolute."""
    if source.startswith(str(FOLDER)):
        tables = {name: read_behavior(name) for name in list_behaviors()}
        owners = (name for name, table in tables.items() if source in (table.get("target"), table.get("control")))
        return next((f"behavior:{name}" for name in owners), hide_private(source))
    return hide_private(source)
