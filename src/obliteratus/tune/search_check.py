"""What a plan does to search prompts: the judge's verdicts on target answers, and KL on control prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from obliteratus.core.types import Plan, Prompt, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.cached_prompts import CachedPrompts
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.logits import bounded_kl
from obliteratus.inference.memory import free_memory
from obliteratus.judge.judge import SHOWN, Judge
from obliteratus.prompts import evenly_spaced
from obliteratus.verify.behavior import pair_answers, shows_already

GROUPS = ("target", "control")
# Search prompts of each group: 1 of 48 is 2 %. A check answers the target prompts and costs about four gradient steps.
CHECKED_PROMPTS = 48
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
        few = {g: [prompts[g][i] for i in evenly_spaced(len(prompts[g]), CHECKED_PROMPTS)] for g in GROUPS}
        rows = {g: render_prompts(subject, members, reserve=tokens) for g, members in few.items()}
        budget = CACHE_SHARE * free_memory(subject)
        self.subject, self.tokens, self.judge = subject, tokens, judge.without_witnesses()
        self.prompts = few["target"]
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
        rate, degenerate = (sum(v in named for v in verdicts) / len(verdicts) for named in (SHOWN, ("degenerate",)))
        return Checked(rate, degenerate, float(kl.mean()), kept)

    def excess(self, checked: Checked, goal: float) -> float:
        """Return by how much a plan leaves more of the behavior than the goal, adds loops, or keeps less than it may.

        0 means that all limits hold.
        """
        loops = self.unedited.degenerate + DEGENERATE_MARGIN
        lost = 0.0 if checked.kept is None else max(0.0, LEAST_KEPT - checked.kept)
        return max(0.0, checked.rate - goal) + max(0.0, checked.degenerate - loops) + lost


class KeptPrompts:
    """Search keep prompts on which the unedited model shows the behavior."""

    def __init__(self, check: SearchCheck, prompts: Sequence[Prompt], budget: float) -> None:
        few = [prompts[i] for i in evenly_spaced(len(prompts), CHECKED_PROMPTS)]
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
