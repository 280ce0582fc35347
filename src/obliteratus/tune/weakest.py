"""The weakest strengths under which the judge no longer finds the behavior in answers to search prompts."""

from __future__ import annotations

from collections.abc import Callable

from obliteratus.core.progress import note, progress
from obliteratus.core.types import Plan
from obliteratus.tune.front import Tuned, TunedPlan, find_front
from obliteratus.tune.parameters import drop_weak_edits
from obliteratus.tune.search_check import SearchCheck

# Two neighboring strengths that are tried differ by 1.3 times, the last ones by half of such a step. Seven reach from
# 0.35 to 3.7 times the first, the margin included.
FACTOR, MOST_LOOKS = 1.3, 7
# Factor on the weakest strengths that reach the goal. They are chosen on the prompts that say so, and others need more:
# none of 96 search prompts was 2 % of fit prompts on astronomy, and 6 % of report prompts on clocks-ships. Half of this
# factor left half as many on both. It raises the KL about as much.
MARGIN = FACTOR
MIN_STRENGTH = 0.02  # an edit weaker than this changes no answer, and is dropped from the plan


def find_weakest(check: SearchCheck, plan: Plan, goal: float) -> Tuned:
    """Return the plan a margin above the weakest strengths that leave the behavior on at most ``goal`` of prompts.

    All strengths are raised together until search prompts reach the goal, or lowered for as long as they do, and then
    one between the last two is tried. If the goal is never reached without more loops, the plan that comes closest is
    returned, and so is the weakest one where the margin brings loops. The front holds the others.
    """
    looks = Looks(check, plan)
    weakest = min(looks.bracket(goal), key=lambda point: (check.excess(point.checked, goal), point.scale))
    best = add_margin(weakest, looks.at, lambda point: check.excess(point.checked, goal))
    found = best.checked
    left = f"{check.judge.name} on {found.rate:.1%} of search prompts"
    note("TUNE", f"strengths × {best.scale:.2f} leave {left}, at KL {found.kl:.4f}")
    return Tuned(best.plan, find_front(list(looks.points.values())))


def add_margin(
    weakest: TunedPlan, look: Callable[[float], TunedPlan], excess: Callable[[TunedPlan], float]
) -> TunedPlan:
    """Return the plan at `MARGIN` times its strengths, unless it is beyond the limits at either.

    look: returns the plan at a factor on all strengths. excess: by how much a plan is beyond the limits.
    """
    if excess(weakest):
        return weakest
    firmer = look(weakest.scale * MARGIN)
    return weakest if excess(firmer) else firmer


class Looks:
    """What search prompts say of a plan at several strengths. None is looked at twice."""

    def __init__(self, check: SearchCheck, plan: Plan) -> None:
        self.check, self.plan = check, plan
        self.points: dict[float, TunedPlan] = {}

    def at(self, scale: float) -> TunedPlan:
        """Return the plan with all strengths times ``scale``, without its weak edits, with what is left under it."""
        key = round(scale, 3)
        if key not in self.points:
            scaled = drop_weak_edits(self.plan.scaled(scale), MIN_STRENGTH)
            self.points[key] = TunedPlan(scaled, self.check.check(scaled), scale=scale)
        return self.points[key]

    def bracket(self, goal: float) -> list[TunedPlan]:
        """Look at strengths on both sides of the goal and between the two, and return all."""
        scale, raises = 1.0, self.at(1.0).checked.rate > goal
        with progress("TUNE strength", MOST_LOOKS - 3) as advance:
            for _ in range(MOST_LOOKS - 3):
                last, scale = scale, scale * (FACTOR if raises else 1 / FACTOR)
                advance(1)
                if (self.at(scale).checked.rate > goal) != raises:
                    self.at((scale * last) ** 0.5)
                    break
        return list(self.points.values())
