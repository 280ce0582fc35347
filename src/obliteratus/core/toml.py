"""Read and write TOML, the format of recipes and studies."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import tomli_w
from pydantic import BaseModel

from obliteratus.core.errors import UserError


def parse_toml(text: bytes, source: str) -> dict[str, Any]:
    """Return the content of a TOML file. Raises UserError that names the source if it is not TOML."""
    try:
        return tomllib.loads(text.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: this is not valid TOML ({error})") from error


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """Return ``["excise.strength=0.7"]`` as values by path. A value that is not TOML is taken as text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        path, sign, value = pair.partition("=")
        if not sign or not path:
            raise UserError(f"--set {pair}: give path=value, such as --set excise.strength=0.7")
        try:
            values[path] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            values[path] = value
    return values


def dump_toml(value: BaseModel) -> str:
    """Return a recipe or study as TOML without its defaults. Reading the text back gives the same value."""
    return tomli_w.dumps(_without_none(value.model_dump(exclude_defaults=True)))


def _without_none(value: Any) -> Any:
    """TOML has no null, so a key without a value is left out."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value


def format_toml(value: Any) -> str:
    """Return a single value as TOML on one line, such as ``[0.5, 1.0]`` or ``{ use = "svd" }``."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {format_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(format_toml, value)) + "]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def format_short(value: Any) -> str:
    """Return a drawn value for a table: floats with three digits, lists as JSON, and anything else as text."""
    return f"{value:.3g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, list) else str(value)
