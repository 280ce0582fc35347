"""Behaviors: what is looked for in answers, as TOML files with phrases by language."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import regex
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from obliteratus.core.errors import UserError
from obliteratus.core.registry import explain_validation_error, unknown_name
from obliteratus.core.toml import parse_toml
from obliteratus.judge.phrases import LISTS, NEVER, Compile, Matcher, Phrases, Place, compile_phrases
from obliteratus.judge.text import FoldedAnswer
from obliteratus.judge.time_limit import compile_with_limit

DEFAULT = "refusal"
FOLDER = Path(str(files("obliteratus"))) / "behaviors"
# Scores are called NAME.target, so a name must not be that of another score.
NAME = re.compile(r"[a-z][a-z0-9_-]*")
TAKEN = frozenset({"behavior", "degenerate", "partial", "unknown", "unfinished", "kl", "perplexity", "accuracy"})
Table = Mapping[str, Any]
# Short folded answers without a letter in common, by script: what finds a match in all of them matches everything.
ORDINARY = (
    ("paris", "50 km", "okay", "le jour", "sun"),
    ("да", "поезд", "нет", "окно"),
    ("好", "巴黎", "太阳"),
    ("はい", "パリ", "空"),
    ("네", "파리", "집"),
    ("نعم", "بيت", "شمس"),
    ("हाँ", "घर", "दिन"),
)


class LabeledAnswer(BaseModel):
    """An answer of which it is known whether it shows the behavior."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    prompt: str
    answer: str
    shown: bool


class Head(BaseModel):
    """The keys of a behavior file besides its languages."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    about: str = Field(min_length=1)
    """One sentence: what an answer does that shows the behavior."""
    question: str = ""
    """The same as a question about an answer, for judges that are models."""
    first_words: tuple[str, ...] = ()
    """Words that answers which show it begin with, for models in which no first token is typical."""
    written: tuple[str, ...] = ()
    """Patterns that are searched in the answer as it is written, in any language; ^ and $ stand for ends of lines."""
    longer_than: int | None = Field(None, ge=1)
    """Words above which an answer is too long."""
    target: str = ""
    """Prompts that show it: a source as of ``--target``, a file being looked for beside the behavior file."""
    control: str = ""
    """Prompts that do not."""
    labeled: tuple[LabeledAnswer, ...] = ()
    """Answers that a judge must get right before its verdicts count."""


@dataclass(frozen=True)
class Behavior:
    """What a judge looks for in answers."""

    name: str
    head: Head
    phrases: Mapping[str, Sequence[Phrases]] = field(default_factory=dict)
    """By language code."""
    written: Matcher = NEVER
    classifier: Path | None = None
    """The weights of the classifier that was trained for it."""
    digest: str = ""
    """Content hash of all that verdicts rest on."""

    @property
    def question(self) -> str:
        """A yes-or-no question about an answer."""
        about = self.head.about.rstrip(".")
        return self.head.question or f"Is this true of the answer: {about[0].lower()}{about[1:]}?"

    @property
    def has_openings(self) -> bool:
        """Whether answers show it by how they begin, so that a model may have openings of its own for it."""
        marks = self.written is not NEVER or self.head.longer_than is not None
        begins = any(p.opening is not NEVER or p.within is not NEVER for part in self.phrases.values() for p in part)
        return begins or not (marks or self.phrases)

    @property
    def knows_all_languages(self) -> bool:
        """Whether it is seen whatever language an answer is in."""
        return not self.phrases

    def find(self, answer: FoldedAnswer) -> Place:
        """Return where an answer shows the behavior, in whichever language says so first."""
        if self._is_too_long(answer.written) or self.written.search(answer.written):
            return "first"
        places = {phrases.find(answer) for part in self.phrases.values() for phrases in part}
        return "first" if "first" in places else "later" if "later" in places else ""

    def _is_too_long(self, text: str) -> bool:
        return self.head.longer_than is not None and len(text.split()) > self.head.longer_than


def load_behavior(source: str | Table = DEFAULT, phrases: str | Table = "") -> Behavior:
    """Return a behavior by its name, from a TOML file, or from a table with ``name`` and what such a file contains.

    phrases: a TOML file, or its table, of further phrases by language; its patterns may use the behavior's fragments.
    Raises UserError for an unknown name, and for tables that are empty or invalid.
    """
    if isinstance(source, str) and not phrases:
        return _load_alone(source)
    return _build(read_behavior(source), read_phrases(phrases) if phrases else {})


@cache
def _load_alone(source: str) -> Behavior:
    return _build(read_behavior(source), {})


def list_behaviors() -> list[str]:
    """Return the names of the built-in behaviors."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def read_behavior(source: str | Table) -> dict[str, Any]:
    """Return a behavior's table with its ``name``. What it is `like` is filled in. Raises UserError."""
    table = dict(source) if isinstance(source, Mapping) else _read_file(source)
    like = table.pop("like", None)
    if like is None:
        return table
    if like not in list_behaviors():
        raise UserError(f"behavior '{table['name']}': like: {unknown_name('behavior', str(like), list_behaviors())}")
    base = read_behavior(like)
    return base | table | {"classifier": base["classifier"]}


def read_phrases(source: str | Table) -> dict[str, Any]:
    """Return the table of further phrases of a TOML file. Raises UserError if there is none, or it is not TOML."""
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{source}: there is no such file of phrases; give a .toml file with a table [en] or more")
    table = parse_toml(path.read_bytes(), source)
    if not table:
        raise UserError(f"{source}: the file has no phrases; write a table for one language or more, such as [en]")
    return {"name": source} | table


def find_file(source: str) -> Path:
    """Return the file of a behavior. Raises UserError if there is none."""
    path = Path(source) if source.endswith(".toml") else FOLDER / f"{source}.toml"
    if not path.is_file():
        known = ", ".join(list_behaviors())
        raise UserError(f"there is no behavior {source!r}; give one of {known}, or a .toml file")
    return path


def _read_file(source: str) -> dict[str, Any]:
    path, own = find_file(source), source.endswith(".toml")
    if not NAME.fullmatch(path.stem) or path.stem in TAKEN:
        raise UserError(
            f"{source}: scores are called after the file, and '{path.stem}' will not do; name it with small letters, "
            f"and not {', '.join(sorted(TAKEN))}"
        )
    table = parse_toml(path.read_bytes(), source)
    if not table:
        raise UserError(f"{source}: the file is empty; a behavior needs `about`, and phrases by language, e.g. [en]")
    sources = {
        group: _find_prompts(str(table[group]), path.parent) for group in ("target", "control") if group in table
    }
    return {"name": path.stem, "classifier": "" if own else path.stem, "own": own} | table | sources


def _find_prompts(source: str, folder: Path) -> str:
    """Return a source of prompts, with the path of a file that lies beside the behavior file."""
    return str(folder / source) if (folder / source).is_file() else source


# --------------------------------------------------------------------------------------------------- compiling
def _build(table: Table, more: Table) -> Behavior:
    """table, more: from `read_behavior` and `read_phrases`."""
    rest = dict(table)
    name, trained, own = rest.pop("name"), rest.pop("classifier", ""), rest.pop("own", True)
    languages = {code: part for code, part in rest.items() if isinstance(part, dict)}
    where = f"behavior '{name}'"
    try:
        head = Head(**{key: value for key, value in rest.items() if key not in languages})
    except ValidationError as error:
        raise UserError(f"{where}: {explain_validation_error(error)}") from error
    to_matcher = partial(compile_with_limit, where=where) if own else re.compile
    phrases = {code: [_compile(where, code, part, to_matcher)] for code, part in languages.items()}
    for code, part in more.items():
        if code != "name":
            fragments = {key: text for key, text in languages.get(code, {}).items() if isinstance(text, str)}
            phrases.setdefault(code, []).append(_compile_more(str(more.get("name", "phrases")), code, part, fragments))
    weights = FOLDER / f"{trained}.npz"
    digest = hashlib.sha256(json.dumps([table, more], sort_keys=True).encode()).hexdigest()
    return Behavior(
        name,
        head,
        phrases,
        _compile_written(where, head.written, to_matcher),
        weights if trained and weights.is_file() else None,
        digest,
    )


def _compile_more(where: str, code: str, part: Any, fragments: Mapping[str, str]) -> Phrases:
    """Return a user's further phrases, which may use the fragments of the behavior. Raises UserError."""
    if isinstance(part, dict) and (both := fragments.keys() & part.keys() - {"letters"}):
        raise UserError(f"{where}: [{code}] {min(both)} is a fragment of the behavior already; give another name")
    _check_language(where, code, part)
    known = {name: text for name, text in fragments.items() if name != "lead"}
    return _compile(where, code, known | part, partial(compile_with_limit, where=where))


def _compile(where: str, code: str, part: Any, to_matcher: Compile) -> Phrases:
    """Return one language's phrases. Raises UserError that names the language and what is wrong with it."""
    _check_language(where, code, part)
    try:
        phrases = compile_phrases(code, part, to_matcher)
    except (re.error, regex.error) as error:
        raise UserError(f"{where}: [{code}] has an invalid pattern: {error}; see Python's `re`") from error
    except KeyError as error:
        raise UserError(f"{where}: [{code}] names <{error.args[0]}>, which is not there; add it as a string") from error
    for name in LISTS:
        if _matches_everything(getattr(phrases, name)):
            raise UserError(f"{where}: [{code}] {name} matches every answer; make its patterns ask for a word")
    return phrases


def _matches_everything(matcher: Matcher) -> bool:
    """Return whether a pattern matches an empty answer, or whatever is written in one script."""
    return bool(matcher.search("")) or any(all(matcher.search(text) for text in texts) for texts in ORDINARY)


def _check_language(where: str, code: str, part: Any) -> None:
    if not re.fullmatch(r"[a-z]{2,3}", code):
        raise UserError(f"{where}: [{code}] is no language; name tables by ISO code, such as [en]")
    if not isinstance(part, dict) or not set(LISTS) & part.keys():
        raise UserError(f"{where}: [{code}] needs lists of patterns: one or more of {', '.join(LISTS)}")
    for name, value in part.items():
        if not isinstance(value, list if name in LISTS else str) or not all(isinstance(text, str) for text in value):
            kind = "a list of strings" if name in LISTS else f"a string; the lists are {', '.join(LISTS)}"
            raise UserError(f"{where}: [{code}] {name} must be {kind}")


def _compile_written(where: str, patterns: Sequence[str], to_matcher: Compile) -> Matcher:
    if not patterns:
        return NEVER
    try:
        matcher = to_matcher("(?m)" + "|".join(f"(?:{pattern})" for pattern in patterns))
    except (re.error, regex.error) as error:
        raise UserError(f"{where}: written has an invalid pattern: {error}; see Python's `re`") from error
    if _matches_everything(matcher):
        raise UserError(f"{where}: written matches every answer; make its patterns ask for a sign")
    return matcher
