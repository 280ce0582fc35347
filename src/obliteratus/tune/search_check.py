"""What a plan does to search prompts: the judge's verdicts on target answers, and KL on control prompts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from obliteratus.core.types import Plan, Prompt, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.judge.judge import SHOWN, Judge
from obliteratus.prompts import pick_evenly
from obliteratus.verify.judged_prompts import ComparedPrompts, JudgedPrompts, judge_prompts

# Search prompts of each group. 1 of 96 is 1 %: with fewer a rate of some percent looks like none. A check answers the
# target prompts and costs about four gradient steps; a mean KL is known well from half as many.
CHECKED_PROMPTS = {"target": 96, "control": 48}
KEEP_PROMPTS = 96  # where there are keep prompts
# Share of the keep answers that must stay, 0–1: one of twenty is within chance; the promise is nine in ten elsewhere.
LEAST_KEPT = 0.95
# Degenerate answers that may be added: two of 48 are within chance, as in a search (Search.degenerate_margin).
DEGENERATE_MARGIN = 0.05


@dataclass(frozen=True)
class Checked:
    """What search prompts say of a plan."""

    rate: float
    """Share of target answers that show the behavior, 0–1."""
    degenerate: float
    """Share of target answers that are empty or loops, 0–1."""
    kl: float
    """Mean KL(base ‖ edited) of control prompts' first answer token, nats."""
    kept: float | None = None
    """Share of the keep answers which showed the behavior before that still do, 0–1; None without such prompts."""


class SearchCheck:
    """Search prompts whose blocks below the edits run only once."""

    def __init__(self, subject: Subject, prompts: PromptSet, judge: Judge, tokens: int) -> None:
        """tokens: the most of an answer."""
        few = {g: pick_evenly(prompts[g], most) for g, most in CHECKED_PROMPTS.items()}
        self.subject, self.tokens, self.judge = subject, tokens, judge.without_witnesses()
        self.target = JudgedPrompts(subject, few["target"], self.judge, tokens)
        self.keep = self._find_kept(prompts["keep"]) if "keep" in prompts.groups else None
        self.controls, self.control = few["control"], ComparedPrompts(subject, few["control"], tokens)
        self.unedited = self.check(Plan((), subject.source.digest))

    def check(self, plan: Plan) -> Checked:
        """Answer the target prompts under the plan, and compare the control prompts' first tokens with the base's."""
        with applied(self.subject, plan):
            verdicts = self.target.verdicts()
            kl = float(self.control.kl().mean())
            kept = _share(self.keep.verdicts(), SHOWN) if self.keep else None
        return Checked(_share(verdicts, SHOWN), _share(verdicts, ("degenerate",)), kl, kept)

    def excess(self, checked: Checked, goal: float) -> float:
        """Return by how much a plan leaves more of the behavior than the goal, adds loops, or keeps less than it may.

        0 means that all limits hold.
        """
        added = checked.degenerate - self.unedited.degenerate - DEGENERATE_MARGIN
        if added > 0:
            added = checked.degenerate - max(self.unedited.degenerate, self.usual_loops) - DEGENERATE_MARGIN
        lost = 0.0 if checked.kept is None else max(0.0, LEAST_KEPT - checked.kept)
        return max(0.0, checked.rate - goal) + max(0.0, added) + lost

    @cached_property
    def usual_loops(self) -> float:
        """Share of the unedited model's answers to control prompts that are empty or loops, 0–1.

        A model that shows the behavior on all target prompts does not loop there, and an edit cannot make it answer
        them better than it answers others.
        """
        return _share(self._judge_once(self.controls, "TUNE control answers"), ("degenerate",))

    def _find_kept(self, prompts: Sequence[Prompt]) -> JudgedPrompts | None:
        """Return the keep prompts on which the unedited model shows the behavior; None if there are none."""
        few = pick_evenly(prompts, KEEP_PROMPTS)
        verdicts = self._judge_once(few, "TUNE keep answers")
        shown = [prompt for prompt, verdict in zip(few, verdicts, strict=True) if verdict in SHOWN]
        return JudgedPrompts(self.subject, shown, self.judge, self.tokens) if shown else None

    def _judge_once(self, prompts: Sequence[Prompt], title: str) -> list[str]:
        return judge_prompts(self.subject, prompts, self.judge, self.tokens, title)


def _share(verdicts: Sequence[str], named: Collection[str]) -> float:
    return sum(verdict in named for verdict in verdicts) / len(verdicts)
