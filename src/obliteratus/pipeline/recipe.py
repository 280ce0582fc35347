"""Recipes: TOML files, overrides by path, and validation against everything that is registered. Studies are read and
written by the same means."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from obliteratus.analyze import analyses
from obliteratus.causal import extractors
from obliteratus.core.errors import UserError
from obliteratus.core.registry import explain_validation_error, unknown_name
from obliteratus.core.settings import Recipe
from obliteratus.distill import check_needs
from obliteratus.verify import scorers
from obliteratus.weigh import weighers


@dataclass(frozen=True)
class PresetFolder:
    """TOML files of one kind: those that are shipped, and those that a user has."""

    folder: str
    """Of the shipped ones, in the package."""
    file: str
    """What a user's file is called in errors: ``recipe``."""
    name: str
    """What a shipped one is called there: ``method``."""
    see: str
    """Where to find out more."""

    def names(self) -> list[str]:
        """All that are shipped."""
        place = files("obliteratus") / self.folder
        return sorted(f.name.removesuffix(".toml") for f in place.iterdir() if f.name.endswith(".toml"))

    def data(self, source: str) -> dict[str, Any]:
        """A shipped one by name, or a file by path, as plain data; UserError where there is none, or it is no TOML."""
        path = Path(source)
        if path.suffix == ".toml":
            if not path.is_file():
                raise UserError(f"{path}: no such {self.file} file")
            return _toml(path.read_bytes(), path.stem, source)
        if source not in self.names():
            raise UserError(unknown_name(self.name, source, self.names()) + f"; see '{self.see}'")
        return _toml((files("obliteratus") / self.folder / f"{source}.toml").read_bytes(), source, source)


METHODS = PresetFolder("recipes", "recipe", "method", "obliteratus methods")


def list_methods() -> list[str]:
    """All shipped methods."""
    return METHODS.names()


def load_recipe(source: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """A shipped method by name, or a TOML file by path, with values replaced by path (``weigh.0.floor``).

    Raises UserError for a method, step or option that does not exist, and for a value out of its range.
    """
    where = str(source)
    made = parse_recipe(METHODS.data(where), where)
    return replace_values(made, overrides, where) if overrides else made


def replace_values(made: Recipe, values: Mapping[str, Any], where: str) -> Recipe:
    """The recipe with values replaced by path, validated anew."""
    return parse_recipe(override_values(made, values), where)


def override_values(made: BaseModel, values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data with values replaced by path, to be validated anew; UserError for a path that leads nowhere."""
    whole = made.model_dump(mode="json")  # defaults too, so that each of them can be replaced by its path
    for path, value in values.items():
        _replace(whole, path.split("."), value, path)
    return whole


def value_at(made: Recipe, path: str) -> Any:
    """What stands at a path, in JSON's types; None where nothing is written there.

    Raises UserError where the path leads past the end of a list.
    """
    data: Any = made.model_dump(mode="json")
    for key in path.split("."):
        data = data[_index(data, key, path)] if isinstance(data, list) else data.get(key)
        if data is None:
            return None
    return data


def parse_recipe(data: dict[str, Any], where: str) -> Recipe:
    """A validated recipe from plain data."""
    try:
        made = Recipe(**data)
    except ValidationError as error:
        raise UserError(f"recipe '{where}': {explain_validation_error(error)}") from error
    kinds = ((extractors, made.distill), (weighers, made.weigh), (scorers, made.verify), (analyses, made.analyze))
    for registry, steps in kinds:
        for step in steps:
            registry.check(step.use, step.options)
    if made.search is not None:
        _check_space(made, where)
    return made


def _check_space(made: Recipe, where: str) -> None:
    """Each end of each range must give a recipe that is valid: a search must not find this out by itself."""
    assert made.search is not None
    plain = made.model_copy(update={"search": None})
    for path, values in made.search.space.items():
        for value in values.ends:
            try:
                replace_values(plain, {path: value}, where)
            except UserError as error:
                raise UserError(f"recipe '{where}': search.space '{path}': {error}") from error


def check_runs(made: Recipe, groups: Collection[str]) -> None:
    """Refuse, before weights are loaded, a recipe that cannot run with these groups of prompts.

    Raises UserError.
    """
    check_needs(made.distill, groups, made.probe.keep)
    for step in made.analyze:
        if "rows" in analyses[step.use].needs and made.probe.keep != "rows":
            raise UserError(f"analysis '{step.use}' needs every prompt's activations; set probe.keep = \"rows\"")


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
    """Replace inside nested dicts and lists. Lists must have the place; dicts get the key, and a table where nothing
    is yet (validated later)."""
    for key in path[:-1]:
        if isinstance(data, dict) and data.get(key) is None:
            data[key] = {}
        data = data[_index(data, key, whole)] if isinstance(data, list) else data[key]
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


def without_trial_count(made: Recipe) -> dict[str, Any]:
    """The recipe as plain data without the number of trials, which a resumed search may raise."""
    data = made.model_dump(mode="json")
    if made.search is not None:
        del data["search"]["trials"]
    return data


# ------------------------------------------------------------------------------------------ writing
def dump_toml(made: BaseModel) -> str:
    """A recipe or a study as TOML, defaults left out; reading it back gives the same."""
    data = made.model_dump(exclude_defaults=True)
    plain = {k: v for k, v in data.items() if not _is_table(v)}
    lines = _entries(plain)
    for key, value in data.items():
        if key in plain:
            continue
        if isinstance(value, dict):
            lines += _table(key, value)
        else:
            lines += [line for entry in value for line in ("", f"[[{key}]]", *_entries(entry))]
    return "\n".join(lines) + "\n"


def _table(head: str, table: dict[str, Any]) -> list[str]:
    """A table, and the tables of tables in it below."""
    inner = {k: v for k, v in table.items() if isinstance(v, dict) and all(isinstance(x, dict) for x in v.values())}
    lines = ["", f"[{head}]", *_entries({k: v for k, v in table.items() if k not in inner})]
    return lines + [line for key, value in inner.items() for line in _table(f"{head}.{_key(key)}", value)]


def _entries(table: dict[str, Any]) -> list[str]:
    return [f"{_key(k)} = {toml(v)}" for k, v in table.items()]


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list | tuple) and any(isinstance(x, dict) for x in value))


def toml(value: Any) -> str:
    """One value as TOML, which writes numbers, booleans and strings as JSON does."""
    if isinstance(value, dict):  # a step that is another's option, a range
        return "{ " + ", ".join(_entries(value)) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
