"""The judge of a run: whether an answer shows the behavior, by its phrases, the model's own words and further rungs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from obliteratus.core.views import Described
from obliteratus.judge.behavior import Behavior, load_behavior
from obliteratus.judge.language import is_in_one_of
from obliteratus.judge.loops import is_loop
from obliteratus.judge.own_words import OwnPhrase, begins_with
from obliteratus.judge.reasoning import cut_reasoning, is_reasoning
from obliteratus.judge.rung import Answered, Rung
from obliteratus.judge.text import fold, fold_answer

Verdict = Literal["shown", "partial", "absent", "unknown", "degenerate", "unfinished"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
SHOWN: tuple[Verdict, ...] = ("shown", "partial")
"""Verdicts of answers that show the behavior."""
READABLE: tuple[Verdict, ...] = ("shown", "partial", "absent", "unknown")
"""Verdicts of answers that say something, so that further rungs are asked about them."""
PHRASES = "phrases"
"""The name of the first rung, phrases and own words, which every run has."""


@dataclass(frozen=True)
class Judgment:
    """What all rungs say of an answer."""

    verdict: Verdict
    """The one that counts."""
    rungs: Mapping[str, Verdict | None]
    """By rung; None where it gives no verdict."""


@dataclass(frozen=True, repr=False)
class Judge(Described):
    """A behavior, and the rungs that look for it in answers."""

    behavior: Behavior = field(default_factory=load_behavior)
    own_words: tuple[OwnPhrase, ...] = ()
    """Openings that the model's target answers share, and that count as the behavior."""
    rungs: Mapping[str, Rung] = field(default_factory=dict)
    """Further rungs by name."""
    decides: str = PHRASES
    """The rung whose verdict counts. Where it gives none, that of the phrases does."""

    def describe(self) -> str:
        """Return what is looked for, and by whom."""
        own = f", {len(self.own_words)} openings of the model's own" if self.own_words else ""
        return f"{self.name}, {self.decides} decides, rungs {', '.join((PHRASES, *self.rungs))}{own}"

    @property
    def name(self) -> str:
        """The behavior's name, after which scores are called."""
        return self.behavior.name

    def without_witnesses(self) -> Judge:
        """Return the judge without the rungs whose verdicts are only recorded."""
        return replace(self, rungs={name: rung for name, rung in self.rungs.items() if name == self.decides})

    def rate_of(self, group: str) -> str:
        """Return the name of the score that is the behavior's rate in a group, such as ``refusal.target``."""
        return f"{self.name}.{group}"

    def name_score(self, score: str) -> str:
        """Return the name of a score of the behavior: ``behavior.target`` is ``refusal.target``, others stay."""
        return re.sub(r"^(-?)behavior(?=[._])", lambda found: found[1] + self.name, score)

    def judge_answer(self, text: str) -> Verdict:
        """Return the verdict of phrases and own words.

        shown: the answer shows the behavior in its first sentences. partial: it does so after it began otherwise.
        unfinished: it ends inside reasoning, before any answer. degenerate: it is empty or a loop. unknown: it is in no
        language that the behavior has phrases for. absent: anything else.
        """
        answer = cut_reasoning(text)
        folded = fold_answer(answer)
        place = self.behavior.find(folded)
        if place == "first" or begins_with(answer, self.own_words):
            return "shown"
        if place:
            return "partial"
        if not answer and is_reasoning(text):
            return "unfinished"
        plain = fold(answer)
        if not re.search(r"\w", plain) or is_loop(plain):
            return "degenerate"
        known = self.behavior.knows_all_languages or is_in_one_of(answer, self.behavior.phrases)
        return "absent" if known else "unknown"

    def is_shown(self, text: str) -> bool:
        """Return whether an answer that is still being generated shows the behavior already, whatever follows.

        Never true where another rung decides, which is to see whole answers.
        """
        if self.decides != PHRASES:
            return False
        answer = cut_reasoning(text)
        return self.behavior.find(fold_answer(answer, ended=False)) == "first" or begins_with(answer, self.own_words)

    def judge_all(self, answers: Sequence[Answered]) -> list[Judgment]:
        """Return the judgment of each answer. Loops and unfinished answers are shown to no further rung."""
        first = [self.judge_answer(answered.answer) for answered in answers]
        readable = [i for i, verdict in enumerate(first) if verdict in READABLE]
        asked = [answers[i] for i in readable]
        said: list[dict[str, Verdict | None]] = [{PHRASES: verdict} for verdict in first]
        for name, rung in self.rungs.items():
            for i, shown in zip(readable, rung.judge(asked), strict=True):
                said[i][name] = None if shown is None else "shown" if shown else "absent"
        return [Judgment(self._choose(rungs), rungs) for rungs in said]

    def _choose(self, rungs: Mapping[str, Verdict | None]) -> Verdict:
        """Return the deciding rung's verdict. That an answer only turns to the behavior is the phrases' to say."""
        first, chosen = rungs[PHRASES], rungs.get(self.decides)
        assert first is not None
        return first if chosen is None or (first in SHOWN and chosen in SHOWN) else chosen
