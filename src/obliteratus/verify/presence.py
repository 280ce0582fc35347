"""Whether a model shows the behavior before it is edited: on enough target prompts, and more often than on controls.

Directions are then fitted on the target prompts that show it and the control prompts that do not, as Arditi et al.
(arXiv:2406.11717) do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.results import Score
from obliteratus.core.types import PromptSet, Subject
from obliteratus.judge.judge import SHOWN, Judge
from obliteratus.judge.own_words import OwnPhrase, fisher_chance
from obliteratus.judge.rung import Answered
from obliteratus.prompts import evenly_spaced, pick_evenly
from obliteratus.verify.intervals import wilson_rate
from obliteratus.verify.own_words import GROUPS, answer_prompts, choose_own_words, note_own_words
from obliteratus.verify.scoring import Measurement

# Fit prompts of each group that are answered. Arditi et al. fit on 128 of each. Where nearly all of the first 32 are as
# they should be, the others are not answered: 31 of 32 say that it is at least 84 % of all, and it saves up to 192 of
# the 416 answers of a run with 64 + 96 report prompts.
FIRST_ANSWERED, MOST_ANSWERED = 32, 128
# Directions from fewer prompts that show the behavior are mostly about those prompts.
LEAST_SHOWN = 8
# One-sided, so that a difference in the wrong direction is none.
LEVEL = 0.025
# If so many of a group's answered prompts are as they should be, those that were not answered are taken to be so too.
CLEAR = 0.95

Answers = Mapping[str, Mapping[int, Answered]]
"""By group and index."""


@dataclass(frozen=True)
class Presence:
    """How many fit prompts of each group show the behavior."""

    rates: Mapping[str, Score]
    """Share of each group's answered prompts that show it."""
    chance: float
    """Probability of such a difference between the groups if there were none (Fisher's exact test, one-sided)."""
    left_out: Mapping[str, int]
    """Fit prompts of each group that are not fitted on."""
    against: str = ""
    """Why there is nothing to edit. The edit is then by force."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data for JSON."""
        return {**vars(self), "rates": {group: rate.model_dump() for group, rate in self.rates.items()}}


@dataclass(frozen=True)
class Screening:
    """What the unedited model's answers to the fit prompts say."""

    own_words: tuple[OwnPhrase, ...]
    """Openings that count as the behavior besides the judge's phrases."""
    kept: Mapping[str, Sequence[int]]
    """By group, the indices of the prompts to fit on."""
    presence: Presence

    def choose(self, prompts: PromptSet) -> PromptSet:
        """Return the prompts to fit on."""
        kept = {group: tuple(prompts[group][i] for i in indices) for group, indices in self.kept.items()}
        return PromptSet({**prompts.groups, **kept})


def screen_prompts(
    subject: Subject, prompts: PromptSet, judge: Judge, tokens: int, hears: bool, strengthens: bool = False
) -> Screening:
    """Answer 32 prompts of each group, and up to 128 unless nearly all are clear. Return which show the behavior.

    tokens: the most of an answer. hears: whether the model's own words count. strengthens: whether the behavior is to
    become stronger: that takes a difference between the groups, but no number of prompts that show it.
    """
    most = {group: evenly_spaced(len(prompts[group]), MOST_ANSWERED) for group in GROUPS}
    first = {group: pick_evenly(rows, FIRST_ANSWERED) for group, rows in most.items()}
    answers = _answer(subject, prompts, first, judge, tokens)
    words, shown = _judge(answers, judge, hears)
    rest = {group: [i for i in rows if i not in answers[group]] for group, rows in most.items()}
    if any(rest.values()) and not all(is_clear(shown[group], group == "target") for group in GROUPS):
        more = _answer(subject, prompts, rest, judge, tokens)
        answers = {group: dict(sorted({**answers[group], **more[group]}.items())) for group in GROUPS}
        words, shown = _judge(answers, judge, hears)
    note_own_words(words, len(answers["target"]), judge.name)
    sizes = {group: len(prompts[group]) for group in GROUPS}
    kept = {group: choose_prompts(sizes[group], shown[group], group == "target") for group in GROUPS}
    if strengthens:
        kept["target"] = range(sizes["target"])  # those that do not show it yet are what the edit is for
    left_out = {group: sizes[group] - len(kept[group]) for group in GROUPS}
    return Screening(words, kept, measure_presence(shown, left_out, judge.name, strengthens))


def _answer(
    subject: Subject, prompts: PromptSet, rows: Mapping[str, Sequence[int]], judge: Judge, tokens: int
) -> Answers:
    """Return the answers to these prompts of each group, by index."""
    asked = [(group, i) for group in GROUPS for i in rows[group]]  # together, as large batches cost less
    answered = answer_prompts(subject, [prompts[group][i] for group, i in asked], judge, tokens, "ANSWERS")
    answers: dict[str, dict[int, Answered]] = {group: {} for group in GROUPS}
    for (group, i), answer in zip(asked, answered, strict=True):
        answers[group][i] = answer
    return answers


def _judge(answers: Answers, judge: Judge, hears: bool) -> tuple[tuple[OwnPhrase, ...], dict[str, dict[int, bool]]]:
    """Return the model's own words, and whether each answer shows the behavior, in these or the judge's phrases."""
    target, control = (list(answers[group].values()) for group in GROUPS)
    words = choose_own_words(target, control, judge) if hears else ()
    judge = replace(judge.without_witnesses(), own_words=words)
    shown = {}
    for group in GROUPS:
        verdicts = [judgment.verdict in SHOWN for judgment in judge.judge_all(list(answers[group].values()))]
        shown[group] = dict(zip(answers[group], verdicts, strict=True))
    return words, shown


def is_clear(shown: Mapping[int, bool], wanted: bool) -> bool:
    """Return whether nearly all answers are as wanted. Those that were not given are then taken to be so too."""
    return sum(found == wanted for found in shown.values()) >= CLEAR * len(shown)


def choose_prompts(n: int, shown: Mapping[int, bool], wanted: bool) -> Sequence[int]:
    """Return which of n prompts to fit on: those that were answered as wanted, and others if nearly all were.

    shown: by index, whether the answer shows the behavior. If fewer than eight were answered as wanted, all n stay.
    """
    right = [i for i, found in shown.items() if found == wanted]
    if len(right) < LEAST_SHOWN:
        return range(n)
    if not is_clear(shown, wanted):
        return right
    return [i for i in range(n) if shown.get(i, wanted) == wanted]


def measure_presence(
    shown: Mapping[str, Mapping[int, bool]], left_out: Mapping[str, int], name: str, strengthens: bool = False
) -> Presence:
    """Return the rates of both groups, and why there is nothing to edit if that is so."""
    hits, sizes = ({group: f(shown[group].values()) for group in GROUPS} for f in (sum, len))
    chance = fisher_chance(hits["target"], sizes["target"], hits["control"], sizes["control"])
    target, control = (f"{hits[group]} of {sizes[group]} {group}" for group in GROUPS)
    against = ""
    if chance > LEVEL:
        against = f"{target} and {control} answers show {name}: no difference beyond chance (p = {chance:.2g})"
    if hits["target"] < LEAST_SHOWN and not strengthens:
        against = f"{target} and {control} answers show {name}; it takes {LEAST_SHOWN} target answers that do"
    rates = {group: wilson_rate(hits[group], sizes[group]) for group in GROUPS}
    return Presence(rates, chance, left_out, against)


def presence_of_first_tokens(before: Measurement, name: str, strengthens: bool = False) -> Presence:
    """Return the presence by the scorer `behavior_score`, of a model whose weights stay on disk.

    There a prompt shows the behavior if its answer more likely than not begins as the behavior does.
    """
    shown = {group: dict(enumerate(map(bool, before.items[f"opens.{group}"].values.tolist()))) for group in GROUPS}
    return measure_presence(shown, dict.fromkeys(GROUPS, 0), name, strengthens)


def check_presence(presence: Presence, name: str, force: bool) -> None:
    """Raise UserError if there is nothing to edit and the edit is not forced. Say in notes what is left out."""
    if presence.against and not force:
        raise UserError(f"{presence.against}. Give prompts on which the model shows it, another --behavior, or --force")
    if presence.against:
        note("forced", f"warning: {presence.against}; the edit goes on by force")


def describe_left_out(left: Mapping[str, int], name: str) -> str:
    """Return how many prompts of each group are not fitted on, and why."""
    return (
        f"directions are fitted without {left['target']} target prompts that do not show {name} and "
        f"{left['control']} control prompts that do, or were not answered"
    )


# ------------------------------------------------------------------------------------------------------ on disk
def save_screening(screening: Screening, folder: Path) -> None:
    """Write screening.json."""
    plain = {
        "own_words": [vars(phrase) for phrase in screening.own_words],
        "kept": {group: list(indices) for group, indices in screening.kept.items()},
        "presence": screening.presence.to_dict(),
    }
    (folder / "screening.json").write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")


def load_screening(folder: Path) -> Screening:
    """Read what `save_screening` wrote."""
    plain = json.loads((folder / "screening.json").read_text(encoding="utf-8"))
    words = tuple(OwnPhrase(**phrase) for phrase in plain["own_words"])
    rates = {group: Score(**rate) for group, rate in plain["presence"].pop("rates").items()}
    return Screening(words, plain["kept"], Presence(rates=rates, **plain["presence"]))
