"""Behaviors: what is looked for in answers, compiled from TOML files with phrases by language."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from obliteratus.core.errors import UserError
from obliteratus.core.registry import explain_validation_error
from obliteratus.judge.behavior_file import FOLDER, Table, read_behavior, read_phrases
from obliteratus.judge.compile import choose_compiler, compile_language, compile_more, compile_written
from obliteratus.judge.phrases import NEVER, Matcher, Phrases, Place
from obliteratus.judge.text import FoldedAnswer

DEFAULT = "refusal"


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
    longer_than: int | None = Field(None, ge=1, strict=True)
    """Words above which an answer is too long."""
    target: str = ""
    """Prompts that show it: a source as of ``--target``, a file being looked for beside the behavior file."""
    control: str = ""
    """Prompts that do not."""
    keep: str = ""
    """Prompts that show it rightly, so that it must stay there."""
    labeled: tuple[LabeledAnswer, ...] = ()
    """Answers that a judge must get right before its verdicts count: some that show it, and some that do not."""

    @model_validator(mode="after")
    def _labels_differ(self) -> Head:
        if self.labeled and len({one.shown for one in self.labeled}) == 1:
            raise ValueError("labeled needs answers with shown = true and with shown = false")
        return self


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
        begins = any(p.table.keys() & {"opening", "within"} for part in self.phrases.values() for p in part)
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
    if isinstance(source, str) and not source.endswith(".toml") and not phrases:
        return _load_built_in(source)
    return _build(read_behavior(source), read_phrases(phrases) if phrases else {})


@cache
def _load_built_in(name: str) -> Behavior:
    return _build(read_behavior(name), {})


def _build(table: Table, more: Table) -> Behavior:
    """table, more: from `read_behavior` and `read_phrases`."""
    rest = dict(table)
    name, trained, own, also = (rest.pop(key, "") for key in ("name", "classifier", "own", "also"))
    where, languages = f"behavior '{name}'", {code: part for code, part in rest.items() if isinstance(part, dict)}
    head = _parse_head(where, {key: value for key, value in rest.items() if key not in languages})
    to_matcher, weights = choose_compiler(where, own=own is not False), FOLDER / f"{trained}.npz"
    # Built-in patterns are known to be valid, and those of a language are compiled when an answer may be in it.
    phrases = {
        code: [Phrases(code, part) if own is False else compile_language(where, code, part, to_matcher)]
        for code, part in languages.items()
    }
    for origin, tables in ((where, also or {}), ("phrases", more)):
        for code, part in tables.items():
            phrases.setdefault(code, []).append(compile_more(origin, code, part, languages.get(code, {})))
    return Behavior(
        name=str(name),
        head=head,
        phrases=phrases,
        written=compile_written(where, head.written, to_matcher),
        classifier=weights if trained and weights.is_file() else None,
        digest=hashlib.sha256(json.dumps([table, more], sort_keys=True).encode()).hexdigest(),
    )


def _parse_head(where: str, values: Mapping[str, Any]) -> Head:
    try:
        return Head(**values)
    except ValidationError as error:
        raise UserError(f"{where}: {explain_validation_error(error)}") from error
