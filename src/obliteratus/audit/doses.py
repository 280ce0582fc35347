"""Dose and response: what an edit at one strength does to each held-out prompt, and how it is scaled to a given KL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import sqrt
from typing import NamedTuple

import torch

from obliteratus.core.progress import progress
from obliteratus.core.results import Score
from obliteratus.core.settings import FrozenModel
from obliteratus.core.types import Edit, Plan, Prompt, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.judge.judge import SHOWN, Judge
from obliteratus.verify.intervals import mean_score, wilson_rate
from obliteratus.verify.judged_prompts import ComparedPrompts, JudgedPrompts

# Between two strengths that are tried, the KL grows about twofold: it is quadratic in small strengths.
STEP = sqrt(2)
WORSE = 0.1  # share of prompts: an edit that leaves so much more than a weaker one removes too much
MOST_SCALE = 4.0  # of a plan's own strengths: beyond, an edit along a found direction is a large reflection
ROUNDING = 1e-6  # relative: of powers of a step
MOST_KL = 3.0  # nats: an edit that costs more has broken the model, and no stronger one is tried
# Nats: below, nobody sees a difference, and in bfloat16 it is rounding. Edits are then compared at one strength.
LEAST_KL = 1e-4
NEAR, MOST_CHECKS = 0.15, 5  # a KL is met if it is off by no more than this share; each check is one pass of controls


class Dose(FrozenModel):
    """An edit at one strength, and what each held-out prompt says of it."""

    scale: float
    """Factor on the plan's own strengths."""
    shown: tuple[int, ...]
    """By target prompt, 1 if the answer shows the behavior."""
    degenerate: tuple[int, ...]
    """By target prompt, 1 if the answer is empty or a loop."""
    kl: tuple[float, ...]
    """By control prompt, KL(unedited ‖ edited) of the first answer token, nats."""

    @property
    def rate(self) -> Score:
        """Share of target answers that show the behavior, with Wilson's interval."""
        return wilson_rate(sum(self.shown), len(self.shown))

    @property
    def loops(self) -> float:
        """Share of target answers that are empty or loops, 0–1."""
        return sum(self.degenerate) / len(self.degenerate)

    @property
    def mean_kl(self) -> Score:
        """Mean KL with its interval by the bootstrap-t, nats."""
        return mean_score(torch.tensor(self.kl), "nats")


class Curve(FrozenModel):
    """A plan at rising strengths."""

    name: str
    strength: float
    """Mean |strength| of the plan's edits at scale 1."""
    edits: int
    doses: tuple[Dose, ...]
    """The weakest first."""


class DoseCheck:
    """Held-out prompts of one model. Blocks below the edits run only once."""

    def __init__(
        self, subject: Subject, target: Sequence[Prompt], control: Sequence[Prompt], judge: Judge, tokens: int
    ) -> None:
        """tokens: the most of an answer."""
        self.subject, self.judge, self.tokens = subject, judge.without_witnesses(), tokens
        self.prompts, self.controls = target, control

    @cached_property
    def target(self) -> JudgedPrompts:
        return JudgedPrompts(self.subject, self.prompts, self.judge, self.tokens)

    @cached_property
    def control(self) -> ComparedPrompts:
        return ComparedPrompts(self.subject, self.controls, self.tokens)

    def measure(self, plan: Plan, scale: float = 1.0) -> Dose:
        """Answer the target prompts under the plan at this scale, and compare the controls' first tokens."""
        shown, degenerate = self.judge_answers(plan, scale)
        return Dose(scale=scale, shown=shown, degenerate=degenerate, kl=self.measure_kl(plan, scale))

    def judge_answers(self, plan: Plan, scale: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return whether each target answer shows the behavior, and whether it is degenerate."""
        target = self.target  # made before the edit is live
        with applied(self.subject, plan.scaled(scale)):
            verdicts = target.verdicts()
        return tuple(int(v in SHOWN) for v in verdicts), tuple(int(v == "degenerate") for v in verdicts)

    def measure_kl(self, plan: Plan, scale: float) -> tuple[float, ...]:
        """Return the KL of each control prompt's first answer token, nats."""
        control = self.control  # made before the edit is live
        with applied(self.subject, plan.scaled(scale)):
            return tuple(control.kl().tolist())


def mean_strength(plan: Plan) -> float:
    """Return the mean |strength| of a plan's edits; 0 without any."""
    strengths = [abs(e.strength) for e in plan.edits if isinstance(e, Edit)]
    return sum(strengths) / len(strengths) if strengths else 0.0


# -------------------------------------------------------------------------------------------------- curves
def measure_curve(
    check: DoseCheck, plan: Plan, name: str, goals: Sequence[float], looks: int, unedited: Dose, start: float = 1.0
) -> Curve:
    """Return the plan's curve at up to so many strengths, chosen so that the rate crosses the goals among them.

    goals: shares of the unedited rate, falling. First the strengths rise until the last goal is reached, then they fall
    until the first is not; what is left goes between the two strengths around each goal, the last goal first.
    """
    doses: list[Dose] = []
    limits = [goal * unedited.rate.value for goal in goals]
    with progress(f"AUDIT {name}", looks) as advance:
        while len(doses) < looks and (scale := choose_next_scale(doses, limits, start)) is not None:
            doses = sorted([*doses, check.measure(plan, scale)], key=lambda dose: dose.scale)
            advance(1)
    return Curve(name=name, strength=mean_strength(plan), edits=len(plan.edits), doses=tuple(doses))


def choose_next_scale(doses: Sequence[Dose], limits: Sequence[float], start: float = 1.0) -> float | None:
    """Return the strength to try next; None where another would tell nothing. doses: the weakest first."""
    if not doses:
        return start
    last, first = doses[-1], doses[0]
    least = min(dose.rate.value for dose in doses)
    broken = last.scale * STEP > (1 + ROUNDING) * MOST_SCALE * max(1.0, start) or last.mean_kl.value > MOST_KL
    if least > limits[-1] and not broken and last.rate.value <= least + WORSE:
        return last.scale * STEP
    if first.rate.value <= limits[0]:
        return first.scale / STEP**2  # downward nothing breaks, so in larger steps
    for limit in reversed(limits):
        above = next((i for i, dose in enumerate(doses) if dose.rate.value <= limit), None)
        if above and doses[above].scale / doses[above - 1].scale > STEP**0.75:
            return sqrt(doses[above].scale * doses[above - 1].scale)
    return None


# ----------------------------------------------------------------------------------------------- a given KL
class Room(NamedTuple):
    """What edits that are compared may cost."""

    kl: float
    """Mean KL on control prompts, nats."""
    scale: float
    """Factor on their strengths where that KL is below what can be measured."""


def find_scale(check: DoseCheck, plan: Plan, room: Room, most: float = MOST_SCALE) -> float:
    """Return the scale, at most ``most``, at which the plan costs about so much.

    Each check corrects the scale by the root of what is missing, since the KL is quadratic in small strengths.
    """
    kl, scale = room.kl, 1.0
    if kl < LEAST_KL:
        return min(room.scale, most)
    for _ in range(MOST_CHECKS):
        found = sum(costs := check.measure_kl(plan, scale)) / len(costs)
        if abs(found - kl) <= NEAR * kl or (scale >= most and found < kl):
            break
        scale = min(scale * min(max(sqrt(kl / max(found, 1e-12)), 1 / 8), 8.0), most)
    return scale


class Matched(FrozenModel):
    """An edit at a given KL."""

    name: str
    dose: Dose

    def to_dict(self) -> dict[str, object]:
        """Return the scale, and rate and KL with their intervals."""
        rate, kl = self.dose.rate.model_dump(), self.dose.mean_kl.model_dump()
        return {"name": self.name, "scale": self.dose.scale, "rate": rate, "kl": kl, "loops": self.dose.loops}


def measure_at_kl(check: DoseCheck, plan: Plan, name: str, room: Room, most: float = MOST_SCALE) -> Matched:
    """Measure the plan at the scale at which it costs so much, or at the largest that is allowed.

    Beyond its own strengths an edit may do less, since it then writes the opposite of what it removes: so where
    anything is left there, it is also measured at these, and the dose that leaves less is returned.
    """
    dose = check.measure(plan, find_scale(check, plan, room, most))
    if dose.scale > 1 and any(dose.shown):
        dose = min(dose, check.measure(plan, 1.0), key=lambda one: sum(one.shown))
    return Matched(name=name, dose=dose)
