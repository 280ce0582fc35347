"""Behavior files as tables: the built-in ones by name, users' by path, and what such a file may say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from obliteratus.core.errors import UserError, unknown_name
from obliteratus.core.toml import parse_toml

FOLDER = Path(str(files("obliteratus"))) / "behaviors"
# Scores are called NAME.target, so a name must not be that of another score.
NAME = re.compile(r"[a-z][a-z0-9_-]*")
TAKEN = frozenset(
    {"behavior", "degenerate", "partial", "unknown", "unfinished", "kl", "perplexity", "accuracy", "fluency"}
    | {"length", "hedging", "same_language", "ended", "kept", "relevance", "off_topic"}
)
PROMPT_KEYS = frozenset({"target", "control", "keep"})
"""Keys of a behavior that name prompts."""
Table = Mapping[str, Any]


def list_behaviors() -> list[str]:
    """Return the names of the built-in behaviors."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def find_file(source: str) -> Path:
    """Return the file of a behavior. Raises UserError if there is none."""
    if source.endswith(".toml"):
        if not _is_file(Path(source)):
            raise UserError(f"{source[:80]}: there is no such file; give a behavior's .toml file, or its name")
        return Path(source)
    if source not in list_behaviors():
        known = ", ".join(list_behaviors())
        raise UserError(f"there is no behavior {source[:80]!r}; give one of {known}, or a .toml file")
    return FOLDER / f"{source}.toml"


def read_behavior(source: str | Table) -> dict[str, Any]:
    """Return a behavior's table, with three keys that no file has: ``name``, ``classifier`` and ``also``.

    classifier: the built-in behavior whose classifier it uses, or ''. also: phrases by language that are added to those
    of the behavior that it is `like`. Raises UserError for a file that is missing, empty or called like another score.
    """
    if isinstance(source, Mapping):
        check_name(str(source.get("name", "")), "judge.behavior")
        if not isinstance(source.get("also", {}), Mapping):
            raise UserError("judge.behavior: 'also' must be tables of phrases by language")
        return dict(source)
    path = find_file(source)
    check_name(path.stem, source)
    table = parse_toml(path.read_bytes(), source)
    if not table:
        raise UserError(f"{source}: the file is empty; a behavior needs `about`, and phrases by language, e.g. [en]")
    if reserved := {"name", "classifier", "also", "own"} & table.keys():
        raise UserError(f"{source}: '{min(reserved)}' cannot be set; the file's name is the behavior's")
    prompts = {
        group: _find_prompts(table[group], path.parent)
        for group in table.keys() & PROMPT_KEYS
        if isinstance(table[group], str)
    }
    own = source.endswith(".toml")
    known = {"name": path.stem, "classifier": "" if own else path.stem, "own": own, "also": {}}
    return _fill_in(table | prompts | known, source)


def read_phrases(source: str | Table) -> dict[str, Any]:
    """Return tables of further phrases by language. Raises UserError if there is no such file, or it is not TOML."""
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if not _is_file(path):
        raise UserError(f"{source[:80]}: there is no such file of phrases; give a .toml file with a table [en] or more")
    table = parse_toml(path.read_bytes(), source)
    if not table:
        raise UserError(f"{source}: the file has no phrases; write a table for one language or more, such as [en]")
    return table


def check_name(name: str, where: str) -> None:
    """Raise UserError for a name that scores cannot bear."""
    if not NAME.fullmatch(name) or name in TAKEN:
        raise UserError(
            f"{where}: scores are called after the behavior, and '{name}' will not do; name it with small letters, and "
            f"not {', '.join(sorted(TAKEN))}"
        )


def _fill_in(table: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the table with all that it takes over from the behavior that it is `like`."""
    like = table.pop("like", None)
    if like is None:
        return table
    if like not in list_behaviors():
        raise UserError(f"{where}: like: {unknown_name('behavior', str(like), list_behaviors())}")
    base = read_behavior(str(like))
    languages = {key: part for key, part in table.items() if isinstance(part, dict) and key != "also"}
    own = {key: value for key, value in table.items() if key not in languages}
    kept = {key: value for key, value in base.items() if key not in ("question", "labeled", *PROMPT_KEYS)}
    return kept | own | {"classifier": base["classifier"], "also": languages}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # of a name that no file system takes
        return False


def _find_prompts(source: str, folder: Path) -> str:
    """Return a source of prompts, with the path of a file that lies beside the behavior file."""
    return str(folder / source) if (folder / source).is_file() else source
