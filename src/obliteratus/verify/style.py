"""The style scorer: how long answers are, how often they hedge, and whether they are in their prompt's language."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch

from obliteratus.core.errors import UserError
from obliteratus.core.results import Score
from obliteratus.core.types import Subject
from obliteratus.inference.chat_template import encode_texts
from obliteratus.judge.language import find_language, is_in_one_of
from obliteratus.judge.reasoning import cut_reasoning
from obliteratus.judge.text import fold
from obliteratus.verify.scoring import ItemValues, Measurement, ScorerContext, pick_answers, scorers

GROUPS = ("target", "control")
READ_TO_THE_END = ("absent", "unknown")
"""Verdicts of the answers that count."""
UNITS: Mapping[str, Any] = {"length": "tokens", "hedging": "share", "same_language": "share"}


@dataclass(frozen=True)
class AnswerStyle:
    """What is measured of one answer; None where it cannot be told."""

    length: float | None
    """Tokens of the answer without its reasoning."""
    hedging: float | None
    """1 if it has a hedging word. None in a language of which no such words are listed."""
    same_language: float | None
    """1 if it may be in the prompt's language. None if prompt or answer are too short to tell."""


UNTOLD = AnswerStyle(None, None, None)


@scorers.register("style", needs=("answers",))
def style(context: ScorerContext) -> Measurement:
    """Score answers' length in tokens, the share with hedging words, and the share in their prompt's language.

    They are the answers of the behavior scorer, which must run first, without their reasoning. Only answers without
    the behavior count that are no loops and were not cut off inside their reasoning: those with it were stopped as
    soon as they showed it, and a loop runs to the limit. So before an edit few target answers may count, or none, and
    then the group has no such score. A length is at most the scorer's ``tokens``.

    ``NAME.change`` is the difference to the unedited model over the prompts that count in both states. Hedging words
    are those of ``hedges.toml``, in seven languages. A prompt's language counts if it is certain enough, and an answer
    is in it if it has at least a tenth of the probability (`judge.language`).
    Raises UserError without answers.
    """
    scores, items = dict[str, Score](), dict[str, ItemValues]()
    for group in (g for g in GROUPS if g in context.prompts.groups):
        now = describe_group(context.subject, context.known.records, group)
        if len(now) != len(context.prompts[group]):
            raise UserError("style: there are no answers to score; put the step behavior before it")
        before = None if context.before is None else describe_group(context.subject, context.before.records, group)
        for name in UNITS:
            items |= _pair_values(f"{name}.{group}", name, now, now)
            if before is not None and (pairs := _pair_values(f"{name}.{group}", name, now, before)):
                base = _pair_values(f"{name}.{group}", name, before, now)
                scores |= {f"{key}.change": pairs[key].change(base[key]) for key in pairs}
    # The items are not handed on: other prompts may count before than after, so no one else could pair them.
    return Measurement({name: item.score() for name, item in items.items()} | scores)


def describe_group(subject: Subject, records: Sequence[Mapping[str, Any]], group: str) -> list[AnswerStyle]:
    """Return the style of each answer of a group, from the records of the behavior scorer."""
    own = pick_answers(records, group)
    answers = [cut_reasoning(record["answer"]) for record in own]
    rows = encode_texts(subject, answers) if answers else []
    return [
        AnswerStyle(float(len(row)), has_hedge(answer), is_in_language_of(record["prompt"], answer))
        if record["verdict"] in READ_TO_THE_END
        else UNTOLD
        for record, answer, row in zip(own, answers, rows, strict=True)
    ]


def has_hedge(answer: str) -> float | None:
    """Return whether an answer has a hedging word, 0 or 1; None if it is in a language without a list of them."""
    pattern, languages = load_hedges()
    return float(bool(pattern.search(fold(answer)))) if is_in_one_of(answer, languages) else None


def is_in_language_of(prompt: str, answer: str) -> float | None:
    """Return whether an answer may be in its prompt's language, 0 or 1; None if that cannot be told."""
    language = find_language(prompt)
    if language is None or find_language(answer, least=0.0) is None:
        return None
    return float(is_in_one_of(answer, (language,)))


@cache
def load_hedges() -> tuple[re.Pattern[str], tuple[str, ...]]:
    """Return a pattern for hedging words in folded text, and the languages that it knows."""
    lists: dict[str, str] = tomllib.loads((files("obliteratus.verify") / "hedges.toml").read_text(encoding="utf-8"))
    words = "|".join(words.replace("\n", "") for words in lists.values())
    return re.compile(rf"\b(?:{words})\b"), tuple(lists)


def _pair_values(
    key: str, name: str, ours: Sequence[AnswerStyle], others: Sequence[AnswerStyle]
) -> dict[str, ItemValues]:
    """Return our values of the prompts for which both sides have one, under the key; nothing if there are none."""
    pairs = [(vars(one)[name], vars(other)[name]) for one, other in zip(ours, others, strict=True)]
    told = [own for own, other in pairs if own is not None and other is not None]
    return {key: ItemValues(torch.tensor(told), UNITS[name])} if told else {}
