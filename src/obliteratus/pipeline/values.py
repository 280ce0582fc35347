"""Replace values of settings by path, and check recipes as plain data. Nothing here knows the steps, or needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from pydantic import BaseModel, ValidationError

from obliteratus.core.errors import UserError
from obliteratus.core.registry import explain_validation_error
from obliteratus.core.settings import Recipe


def validate_recipe(data: Mapping[str, Any], where: str) -> Recipe:
    """Return plain data as a recipe whose steps are not checked. Raises UserError that names ``where`` it is from."""
    try:
        return Recipe(**data)
    except ValidationError as error:
        raise UserError(f"recipe '{where}': {explain_validation_error(error, Recipe)}") from error


def override_values(settings: BaseModel, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as plain data with values replaced by path. Raises UserError for a path that does not exist."""
    data = settings.model_dump(mode="json")  # includes defaults, so that every one of them has a path
    for path, value in values.items():
        _replace(data, path.split("."), deepcopy(value), path)  # a longer path may change what a shorter one set
    return data


def value_at(recipe: Recipe, path: str) -> Any:
    """Return the value at a path as a JSON type, or None if the path does not exist.

    Raises UserError if the path leads past the end of a list.
    """
    data: Any = recipe.model_dump(mode="json")
    for key in path.split("."):
        data = data[_index(data, key, path)] if isinstance(data, list) else data.get(key)
        if data is None:
            return None
    return data


def _replace(data: Any, keys: list[str], value: Any, path: str) -> None:
    """Set a value inside nested tables and lists. Missing tables are created; an entry of a list must exist."""
    for key in keys[:-1]:
        if isinstance(data, dict) and data.get(key) is None:
            data[key] = {}
        data = data[_index(data, key, path)] if isinstance(data, list) else data[key]
        if not isinstance(data, dict | list):
            raise UserError(f"--set {path}: '{key}' is a single value and has no keys")
    if isinstance(data, list):
        data[_index(data, keys[-1], path)] = value
    else:
        data[keys[-1]] = value


def _index(data: list[Any], key: str, path: str) -> int:
    if not key.isdigit() or int(key) >= len(data):
        raise UserError(f"--set {path}: there is no entry '{key}'; the entries are 0 to {len(data) - 1}")
    return int(key)
