"""What a plan does to search prompts: the judge's verdicts on target answers, and KL on control prompts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from obliteratus.core.types import Plan, Prompt, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.cached_prompts import CachedPrompts
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.generate import generate
from obliteratus.inference.logits import bounded_kl
from obliteratus.inference.memory import free_memory
from obliteratus.judge.judge import SHOWN, Judge
from obliteratus.prompts import evenly_spaced
from obliteratus.verify.behavior import pair_answers, shows_already

# Search prompts of each group. 1 of 96 is 1 %: with fewer a rate of some percent looks like none. A check answers the
# target prompts and costs about four gradient steps; a mean KL is known well from half as many.
CHECKED_PROMPTS = {"target": 96, "control": 48}
KEEP_PROMPTS = 96  # where there are keep prompts
CACHE_SHARE = 0.125  # of the free memory, for each group's cached prompts
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
        few = {g: [prompts[g][i] for i in evenly_spaced(len(prompts[g]), most)] for g, most in CHECKED_PROMPTS.items()}
        rows = {g: render_prompts(subject, members, reserve=tokens) for g, members in few.items()}
        budget = CACHE_SHARE * free_memory(subject)
        self.subject, self.tokens, self.judge = subject, tokens, judge.without_witnesses()
        self.prompts, self.control_prompts, self.control_rows = few["target"], few["control"], rows["control"]
        self.target = CachedPrompts(subject, rows["target"], budget=budget)
        self.keep = KeptPrompts(self, prompts["keep"], budget) if "keep" in prompts.groups else None
        self.control = CachedPrompts(subject, rows["control"], budget=budget, answers=())
        self.base = self.control.first_token()
        self.unedited = self.check(Plan((), subject.source.digest))

    def check(self, plan: Plan) -> Checked:
        """Answer the target prompts under the plan, and compare the control prompts' first tokens with the base's."""
        with applied(self.subject, plan):
            answers = self.target.generate(self.tokens, done=shows_already(self.subject, self.judge))
            kl = bounded_kl(self.base, self.control.first_token())
            kept = self.keep.share() if self.keep else None
        assert answers is not None, "nothing gives the answers up"
        asked = pair_answers(self.subject, self.prompts, answers)
        verdicts = [judgment.verdict for judgment in self.judge.judge_all(asked)]
        return Checked(_share(verdicts, SHOWN), _share(verdicts, ("degenerate",)), float(kl.mean()), kept)

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
        answers = generate(self.subject, self.control_rows, self.tokens, title="TUNE control answers")
        asked = pair_answers(self.subject, self.control_prompts, answers)
        return _share([judgment.verdict for judgment in self.judge.judge_all(asked)], ("degenerate",))


class KeptPrompts:
    """Search keep prompts on which the unedited model shows the behavior."""

    def __init__(self, check: SearchCheck, prompts: Sequence[Prompt], budget: float) -> None:
        few = [prompts[i] for i in evenly_spaced(len(prompts), KEEP_PROMPTS)]
        self.check = check
        shown = self._shows(CachedPrompts(check.subject, self._render(few), budget=budget), few)
        self.prompts = [prompt for prompt, is_shown in zip(few, shown, strict=True) if is_shown]
        self.cached = CachedPrompts(check.subject, self._render(self.prompts), budget=budget) if self.prompts else None

    def share(self) -> float | None:
        """Return the share on which the model shows the behavior as it is now; None if there are no such prompts."""
        if self.cached is None:
            return None
        shown = self._shows(self.cached, self.prompts)
        return sum(shown) / len(shown)

    def _render(self, prompts: Sequence[Prompt]) -> Ids:
        return render_prompts(self.check.subject, prompts, reserve=self.check.tokens)

    def _shows(self, cached: CachedPrompts, prompts: Sequence[Prompt]) -> list[bool]:
        subject, judge = self.check.subject, self.check.judge
        answers = cached.generate(self.check.tokens, done=shows_already(subject, judge))
        assert answers is not None, "nothing gives the answers up"
        asked = pair_answers(subject, prompts, answers)
        return [judgment.verdict in SHOWN for judgment in judge.judge_all(asked)]


def _share(verdicts: Sequence[str], named: Collection[str]) -> float:
    return sum(verdict in named for verdict in verdicts) / len(verdicts)
