"""Answers under edits: whether they end the behavior, and whether they hold together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from obliteratus.analyze.base import AnalysisContext
from obliteratus.core.progress import Advance
from obliteratus.core.results import Score
from obliteratus.core.settings import Step
from obliteratus.core.types import Plan, Prompt, PromptSet
from obliteratus.excise.live.hooks import applied
from obliteratus.verify import ItemValues, Measurement, measure

# Degenerate answers that an edit may add to the unedited model's: this share, or two of fewer prompts, which are within
# chance.
DEGENERATE_MARGIN, WITHIN_CHANCE = 0.05, 2
# A loop shows only over some twenty words, so the answers that are checked for them are as long as VERIFY's.
CHECKED_TOKENS = 48
# After so many edits that end the behavior in loops, no dearer one is tried: what costs more loops more.
MOST_LOOPING = 2


class AnsweredEdit(NamedTuple):
    """An edit under which answers were generated."""

    part: str
    depth: int
    shown: Score
    """Share of target prompts that still show the behavior: in short answers, or in longer ones where none ended it."""
    degenerate: Score | None = None
    """Share of longer answers to target and control prompts that are empty or loops; None if it was not measured."""


@dataclass
class AnswerCheck:
    """Generates answers under edits, to see what is left of the behavior and whether answers hold together."""

    context: AnalysisContext
    plan_of: Callable[[str, int], Plan]
    """The plan of a part and a first block."""
    targets: Sequence[Prompt]
    """Prompts on which the rate is measured."""
    checked: Mapping[str, Sequence[Prompt]]
    """Prompts by group whose longer answers are checked for loops."""
    tokens: int
    """Of the answers on which the rate is measured."""
    unedited_degenerate: Score | None = None

    def find_fluent_edit(
        self, ranked: Sequence[tuple[str, int]], others: Sequence[tuple[str, int]], tries: int, advance: Advance
    ) -> tuple[AnsweredEdit, ...]:
        """Return the edits that were answered: of ``ranked``, up to the first that ends the behavior in fluent answers.

        If there is none, longer answers are generated under those that left some of it, and then under ``others``.
        tries: the most edits of either kind.
        """
        answered: dict[tuple[str, int], AnsweredEdit] = {}
        for cell in ranked[:tries]:
            answered[cell] = self.answer(*cell)
            advance(1)
            if answered[cell].shown.value == 0:
                answered[cell] = answered[cell]._replace(degenerate=self.check(*cell).degenerate)
                if is_fluent(answered[cell], self.unedited_degenerate):
                    return tuple(answered.values())
            if sum(edit.degenerate is not None for edit in answered.values()) == MOST_LOOPING:
                break
        checked = {cell for cell, edit in answered.items() if edit.degenerate is not None}
        unchecked = [cell for cell in dict.fromkeys((*answered, *others)) if cell not in checked]
        for cell in unchecked[:tries]:
            answered[cell] = self.check(*cell)
            advance(1)
        return tuple(answered.values())

    def shows_behavior(self) -> bool:
        """Return whether any answer of the unedited model shows the behavior."""
        return measure_rate(self.context, Plan(), self.targets, self.tokens).value > 0

    def answer(self, part: str, layer: int) -> AnsweredEdit:
        """Return what an edit leaves of the behavior."""
        shown = measure_rate(self.context, self.plan_of(part, layer), self.targets, self.tokens)
        return AnsweredEdit(part, layer, shown)

    def check(self, part: str, layer: int) -> AnsweredEdit:
        """Return what longer answers say of an edit. The unedited model is asked once, if many are degenerate."""
        shown, degenerate = self.measure_answers(self.plan_of(part, layer))
        if self.unedited_degenerate is None and adds_loops(degenerate, None):
            self.unedited_degenerate = self.measure_usual_loops()
        return AnsweredEdit(part, layer, shown, degenerate)

    def measure_usual_loops(self) -> Score:
        """Return the degenerate share of the unedited model's answers to control prompts.

        Those to target prompts show the behavior instead of an answer, and hardly loop.
        """
        prompts = PromptSet({"control": tuple(self.checked["control"])})
        return _measure_behavior(self.context, Plan(), prompts, CHECKED_TOKENS).scores["degenerate.control"]

    def measure_answers(self, plan: Plan) -> tuple[Score, Score]:
        """Return, in longer answers, the behavior's rate on target prompts and the degenerate share of both groups."""
        prompts = PromptSet({group: tuple(members) for group, members in self.checked.items()})
        measured = _measure_behavior(self.context, plan, prompts, CHECKED_TOKENS)
        loops = torch.cat([measured.items[f"degenerate.{g}"].values for g in prompts.groups])
        return measured.scores[self.context.judge.rate_of("target")], ItemValues(loops, "share").score()


def is_fluent(edit: AnsweredEdit, unedited: Score | None) -> bool:
    """Return whether longer answers were checked, and hardly more are degenerate than of the unedited model's."""
    return edit.degenerate is not None and not adds_loops(edit.degenerate, unedited)


def adds_loops(degenerate: Score, unedited: Score | None) -> bool:
    """Return whether more answers are degenerate than the unedited model's share, 0 for None, allows."""
    allowed = max(DEGENERATE_MARGIN, WITHIN_CHANCE / degenerate.n)
    return degenerate.value > (0.0 if unedited is None else unedited.value) + allowed + 1e-9  # rounding


def measure_rate(context: AnalysisContext, plan: Plan, prompts: Sequence[Prompt], tokens: int) -> Score:
    """Return the share of target prompts that show the behavior under the plan, in answers of so many tokens."""
    measured = _measure_behavior(context, plan, PromptSet({"target": tuple(prompts)}), tokens)
    return measured.scores[context.judge.rate_of("target")]


def _measure_behavior(context: AnalysisContext, plan: Plan, prompts: PromptSet, tokens: int) -> Measurement:
    with applied(context.subject, plan):
        return measure(context.subject, prompts, (Step(use="behavior", tokens=tokens),), judge=context.judge)
