"""Behaviors: what is looked for in answers, as TOML files with phrases by language."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.toml import parse_toml
from obliteratus.judge.phrases import Phrases, Place, compile_phrases
from obliteratus.judge.text import FoldedAnswer

DEFAULT = "refusal"
LISTS = {"opening", "within", "late", "letter"}


@dataclass(frozen=True)
class Behavior:
    """What a judge looks for in answers."""

    name: str
    about: str
    """One sentence: what an answer does that shows it."""
    phrases: Mapping[str, Phrases]
    """By language code."""

    def find(self, answer: FoldedAnswer) -> Place:
        """Return where an answer shows the behavior, in whichever language says so first."""
        places = {phrases.find(answer) for phrases in self.phrases.values()}
        return "first" if "first" in places else "later" if "later" in places else ""


@cache
def load_behavior(name: str = DEFAULT) -> Behavior:
    """Return a built-in behavior, or that of a TOML file.

    Raises UserError for an unknown name and for a file that is empty or invalid.
    """
    path = Path(name) if name.endswith(".toml") else Path(str(files("obliteratus"))) / "behaviors" / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(list_behaviors())
        raise UserError(f"there is no behavior {name!r}; give one of {known}, or a .toml file")
    table = parse_toml(path.read_bytes(), str(path))
    about = table.pop("about", "")
    if not about or not table:
        raise UserError(f"{path}: a behavior needs `about` and a table of phrases for one language or more, e.g. [en]")
    return Behavior(path.stem, about, {code: _compile(path, code, part) for code, part in table.items()})


def list_behaviors() -> list[str]:
    """Return the names of the built-in behaviors."""
    return sorted(Path(str(file)).stem for file in (files("obliteratus") / "behaviors").iterdir() if file.is_file())


def _compile(path: Path, code: str, part: Any) -> Phrases:
    """Return one language's phrases. Raises UserError that names the language and what is wrong with it."""
    if not isinstance(part, dict) or not LISTS & part.keys():
        raise UserError(f"{path}: [{code}] needs lists of patterns: one or more of {', '.join(sorted(LISTS))}")
    try:
        phrases = compile_phrases(part)
    except re.error as error:
        raise UserError(f"{path}: [{code}] has an invalid pattern: {error}; see Python's `re`") from error
    except KeyError as error:
        raise UserError(f"{path}: [{code}] names <{error.args[0]}>, which is not there; add it as a string") from error
    for name in sorted(LISTS):
        if getattr(phrases, name).search(""):
            raise UserError(f"{path}: [{code}] {name} matches every answer; make its patterns ask for a word")
    return phrases
