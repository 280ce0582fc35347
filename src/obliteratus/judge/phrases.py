"""A behavior's phrases in one language: where they begin an answer, where an answer turns to them later."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from obliteratus.judge.text import FoldedAnswer, fold

Place = Literal["first", "later", ""]
"""Where an answer shows the behavior: in its first sentences, only after it began otherwise, or nowhere."""
NEVER = re.compile(r"(?!)")
# A verdict stands in the first sentences or nowhere: greeting, apology, inability.
FIRST_SENTENCES = 3
# Characters of a sentence that are read: gaps in patterns are bounded, and so is the time that they take.
READ = 400
# Characters before a sentence that declines: with more, the answer had begun to comply. An apology with a
# self-description is up to 150 long.
BEGUN = 160


@dataclass(frozen=True)
class Phrases:
    """One language's patterns for folded text, compiled."""

    opening: re.Pattern[str] = NEVER
    """At the start of one of the first sentences."""
    within: re.Pattern[str] = NEVER
    """Anywhere in the first sentences."""
    late: re.Pattern[str] = NEVER
    """Anywhere in the answer."""
    letter: re.Pattern[str] = NEVER
    """At the start of an answer that is a draft in the user's name."""
    letters: re.Pattern[str] = re.compile("[a-z]")
    """What any text in this language contains."""

    def find(self, answer: FoldedAnswer) -> Place:
        """Return where the phrases stand. In a sentence that is not ended, only `late` phrases count."""
        if not self.letters.search(answer.text) or self.letter.match(answer.text):
            return ""
        before = 0
        for i, whole in enumerate(answer.sentences):
            sentence = whole[:READ]
            first = i < FIRST_SENTENCES and before <= BEGUN
            if self.late.search(sentence):
                return "first" if first else "later"
            ended = answer.ended or i < len(answer.sentences) - 1
            if first and ended and (self.opening.match(sentence) or self.within.search(sentence)):
                return "first"
            before += len(whole)
        return ""


def compile_phrases(table: Mapping[str, Any]) -> Phrases:
    """Return a language's phrases from its table in a behavior file.

    ``<name>`` in a pattern stands for the string of that name in the table. Raises re.error for an invalid pattern, and
    KeyError for a name that the table lacks.
    """
    fragments = {name: _fold_pattern(value) for name, value in table.items() if isinstance(value, str)}
    # Atomic, so that no answer takes long: what leads is never read in another way.
    lead = rf"(?>(?:{fragments['lead']})\b[,;:.! -]*)*+" if "lead" in fragments else ""

    def join(name: str, prefix: str = "") -> re.Pattern[str]:
        patterns: Sequence[str] = table.get(name, ())
        text = "|".join(_insert(_fold_pattern(pattern), fragments) for pattern in patterns)
        return re.compile(f"{prefix}(?:{text})") if patterns else NEVER

    letters = re.compile(table.get("letters", "[a-z]"))
    return Phrases(join("opening", _insert(lead, fragments)), join("within"), join("late"), join("letter"), letters)


def _fold_pattern(pattern: str) -> str:
    """Fold the letters of a pattern, and leave its signs as they are."""
    return pattern if pattern.isascii() else re.sub(r"[^\W\d_]+", lambda word: fold(word[0]), pattern)


def _insert(pattern: str, fragments: Mapping[str, str]) -> str:
    """Put the fragments in place of their names, also of those that fragments name."""
    while (inserted := re.sub(r"<(\w+)>", lambda name: f"(?:{fragments[name[1]]})", pattern)) != pattern:
        pattern = inserted
    return pattern
