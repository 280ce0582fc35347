"""What hardening did: the cost of removal before and after, and what became of other prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ConfigDict
from torch import Tensor

from obliteratus.audit.attacks import draw_prompts
from obliteratus.audit.context import AuditContext
from obliteratus.audit.firmness import report_costs
from obliteratus.audit.removal_cost import TWENTIETH, RemovalCost
from obliteratus.audit.results import AuditReport
from obliteratus.audit.settings import AuditSettings
from obliteratus.core.results import Score
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import FrozenModel
from obliteratus.core.shapes import Float
from obliteratus.core.types import Prompt, Splits, Subject
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.logits import bounded_kl, first_token_log_probs
from obliteratus.judge.judge import SHOWN, Judge
from obliteratus.verify.intervals import mean_score, paired_share_change, wilson_rate
from obliteratus.verify.judged_prompts import judge_prompts

CHECKS = AuditSettings(tune_steps=0)
"""How cost is measured before and after: each method of an audit is fitted anew on the model as it then is."""


def measure_costs(subject: Subject, splits: Splits, checks: AuditSettings, judge: Judge, store: Store) -> AuditReport:
    """Return an audit of the costs of removal alone; without them where the model does not show the behavior."""
    audit = AuditContext(subject, splits, checks, store, judge).screened()
    if audit.presence.against:
        return AuditReport(audit.judge.name, checks, audit.presence, seconds=store.seconds)
    return report_costs(audit, audit.measure_curves(fit_cheapest=checks.tune_steps > 0))


@dataclass(frozen=True)
class HeldOut:
    """Report prompts of both groups, and the judge of the answers to them."""

    target: Sequence[Prompt]
    control: Sequence[Prompt]
    judge: Judge
    tokens: int

    @classmethod
    def draw(cls, splits: Splits, judge: Judge, checks: AuditSettings) -> HeldOut:
        """Draw as many report prompts as the audit does, the same ones."""
        few = {g: draw_prompts(splits.report[g], checks.prompts, checks.seed) for g in ("target", "control")}
        return cls(few["target"], few["control"], judge, checks.tokens)

    def answer(self, subject: Subject, title: str) -> Answered:
        """Let a model answer all of them."""

        def show(prompts: Sequence[Prompt]) -> Float[Tensor, " n"]:
            verdicts = judge_prompts(subject, prompts, self.judge, self.tokens, title)
            return torch.tensor([float(verdict in SHOWN) for verdict in verdicts])

        ids = render_prompts(subject, self.control, reserve=self.tokens)
        return Answered(show(self.target), show(self.control), first_token_log_probs(subject, ids, title=title))


@dataclass(frozen=True)
class Answered:
    """What a model says to the held-out prompts."""

    target: Float[Tensor, " n"]
    """1 where the answer shows the behavior."""
    control: Float[Tensor, " m"]
    first: Float[Tensor, "m vocabulary"]
    """Log-probabilities of the first answer token of control prompts."""


class Effect(FrozenModel):
    """What became of the answers to held-out prompts, hardened against base."""

    target_before: Score
    """Share of target prompts whose answers show the behavior."""
    target_after: Score
    control_before: Score
    """The same of control prompts."""
    control_after: Score
    control_change: Score
    """How much larger that share is, paired by prompt."""
    kl: Score
    """Mean KL(base ‖ hardened) of the first answer token of control prompts, nats."""


def compare_answers(before: Answered, after: Answered) -> Effect:
    """Return shares and KL with their intervals."""
    shares = {"target_before": before.target, "target_after": after.target}
    shares |= {"control_before": before.control, "control_after": after.control}
    return Effect(
        **{name: wilson_rate(int(shown.sum()), len(shown)) for name, shown in shares.items()},
        control_change=paired_share_change(after.control, before.control),
        kl=mean_score(bounded_kl(before.first, after.first), "nats"),
    )


class CostChange(FrozenModel):
    """The cost of removal to one goal, of the least costly of all methods, before and after."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # JSON has no infinity

    goal: float
    before: RemovalCost
    after: RemovalCost

    @property
    def factor(self) -> float | None:
        """Cost after ÷ before. Where nothing reached the goal after, the largest KL that was tried stands for the cost,
        so it is at least that; None where nothing reached it before."""
        if not self.before.reached or self.before.kl.value <= 0:
            return None
        return (self.after.kl.value if self.after.reached else self.after.tried) / self.before.kl.value

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and `factor` as JSON types."""
        return {**self.model_dump(mode="json"), "factor": self.factor, "at_least": not self.after.reached}


def compare_least(before: AuditReport, after: AuditReport) -> list[CostChange]:
    """Return the change of each goal's cost. After hardening the behavior may be gone; then there is none."""
    pairs = [(one, after.cost_to(one.goal)) for one in before.least]
    return [CostChange(goal=one.goal, before=one, after=other) for one, other in pairs if other is not None]


def find_twentieth(changes: Sequence[CostChange]) -> CostChange | None:
    """Return the change of the cost to one in twenty."""
    return next((change for change in changes if change.goal == TWENTIETH), None)
