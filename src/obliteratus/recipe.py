"""Recipes: TOML files, overrides by path, and validation against everything that is registered."""

from __future__ import annotations

import json
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from obliteratus.errors import UserError
from obliteratus.registry import explain, unknown
from obliteratus.tune import extractors
from obliteratus.types import Recipe
from obliteratus.verify import scorers
from obliteratus.weigh import weighers

FOLDER = files("obliteratus") / "recipes"


def names() -> list[str]:
    """All shipped methods."""
    return sorted(f.name.removesuffix(".toml") for f in FOLDER.iterdir() if f.name.endswith(".toml"))


def recipe(source: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """A shipped method by name, or a TOML file by path, with values replaced by path (``weigh.0.floor``).

    Raises UserError for a method, step or option that does not exist, and for a value out of its range.
    """
    data, where = _data(str(source))
    made = parsed(data, where)
    if not overrides:
        return made
    whole = made.model_dump(mode="json")  # defaults too, so that each of them can be replaced by its path
    for path, value in overrides.items():
        _replace(whole, path.split("."), value, path)
    return parsed(whole, where)


def parsed(data: dict[str, Any], where: str) -> Recipe:
    """A validated recipe from plain data."""
    try:
        made = Recipe(**data)
    except ValidationError as error:
        raise UserError(f"recipe '{where}': {explain(error)}") from error
    for registry, steps in ((extractors, made.distill), (weighers, made.weigh), (scorers, made.verify)):
        for step in steps:
            registry.check(step.use, step.options)
    return made


def _data(source: str) -> tuple[dict[str, Any], str]:
    path = Path(source)
    if path.suffix == ".toml":
        if not path.is_file():
            raise UserError(f"{path}: no such recipe file")
        return _toml(path.read_bytes(), path.stem, source), source
    if source not in names():
        raise UserError(unknown("method", source, names()) + "; see 'obliteratus methods'")
    return _toml((FOLDER / f"{source}.toml").read_bytes(), source, source), source


def _toml(text: bytes, name: str, where: str) -> dict[str, Any]:
    try:
        return {"name": name, **tomllib.loads(text.decode())}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not TOML ({error})") from error


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """``["excise.strength=0.7"]`` → values: TOML where it parses, text where it does not."""
    result: dict[str, Any] = {}
    for pair in pairs:
        path, sign, value = pair.partition("=")
        if not sign or not path:
            raise UserError(f"--set {pair}: give path=value, e.g. --set excise.strength=0.7")
        try:
            result[path] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            result[path] = value
    return result


def _replace(data: Any, path: list[str], value: Any, whole: str) -> None:
    """Replace inside nested dicts and lists. Lists must have the place; dicts get the key (validated later)."""
    for key in path[:-1]:
        data = data[_index(data, key, whole)] if isinstance(data, list) else data.setdefault(key, {})
        if not isinstance(data, dict | list):
            raise UserError(f"--set {whole}: '{key}' is a value, nothing lies below it")
    if isinstance(data, list):
        data[_index(data, path[-1], whole)] = value
    else:
        data[path[-1]] = value


def _index(data: list[Any], key: str, whole: str) -> int:
    if not key.isdigit() or int(key) >= len(data):
        raise UserError(f"--set {whole}: there is no entry '{key}'; entries are 0 to {len(data) - 1}")
    return int(key)


# ------------------------------------------------------------------------------------------ writing
def dump(made: Recipe) -> str:
    """The recipe as TOML, defaults left out; reading it back gives the same recipe."""
    data = made.model_dump(exclude_defaults=True)
    plain = {k: v for k, v in data.items() if not _is_table(v)}
    lines = [f"{k} = {_value(v)}" for k, v in plain.items()]
    for key, value in data.items():
        if key in plain:
            continue
        for table in value if isinstance(value, list | tuple) else [value]:
            head = f"[[{key}]]" if isinstance(value, list | tuple) else f"[{key}]"
            lines += ["", head, *(f"{k} = {_value(v)}" for k, v in table.items())]
    return "\n".join(lines) + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list | tuple) and any(isinstance(x, dict) for x in value))


def _value(value: Any) -> str:
    """TOML and JSON write numbers, booleans, strings and lists of them in the same way."""
    if isinstance(value, dict):  # a step that is another's option
        return "{ " + ", ".join(f"{k} = {_value(v)}" for k, v in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)
