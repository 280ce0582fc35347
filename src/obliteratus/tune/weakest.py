"""The weakest strengths under which the judge no longer finds the behavior in answers to search prompts."""

from __future__ import annotations

from obliteratus.core.progress import note, progress
from obliteratus.core.types import Plan
from obliteratus.excise.kl_budget import scale_plan
from obliteratus.tune.front import Tuned, TunedPlan, find_front
from obliteratus.tune.parameters import drop_weak_edits
from obliteratus.tune.search_check import SearchCheck

# Two neighboring strengths that are tried differ by 1.3 times, the last ones by half of such a step. They reach from
# 0.35 to 2.9 times the first.
FACTOR, MOST_LOOKS = 1.3, 7
# Factor on the weakest strengths that reach the goal. They are chosen on the prompts that say so, and others need more:
# none of 48 there was 2 to 14 % on report prompts in other words. It raises the KL about as much.
MARGIN = FACTOR**0.5
MIN_STRENGTH = 0.02  # an edit weaker than this changes no answer, and is dropped from the plan


def find_weakest(check: SearchCheck, plan: Plan, goal: float) -> Tuned:
    """Return the plan a margin above the weakest strengths that leave the behavior on at most ``goal`` of prompts.

    All strengths are raised together until search prompts reach the goal, or lowered for as long as they do, and then
    one between the last two is tried. If the goal is never reached without more loops, the plan that comes closest is
    returned, and so is the weakest one where the margin brings loops. The front holds the others.
    """
    looks = Looks(check, plan)
    weakest = min(looks.bracket(goal), key=lambda point: (check.excess(point.checked, goal), point.scale))
    best = weakest
    if not check.excess(weakest.checked, goal):
        firmer = looks.at(weakest.scale * MARGIN)
        best = weakest if check.excess(firmer.checked, goal) else firmer
    found = best.checked
    left = f"{check.judge.name} on {found.rate:.1%} of search prompts"
    note("TUNE", f"strengths × {best.scale:.2f} leave {left}, at KL {found.kl:.4f}")
    return Tuned(best.plan, find_front(list(looks.points.values())))


class Looks:
    """What search prompts say of a plan at several strengths. None is looked at twice."""

    def __init__(self, check: SearchCheck, plan: Plan) -> None:
        self.check, self.plan = check, plan
        self.points: dict[float, TunedPlan] = {}

    def at(self, scale: float) -> TunedPlan:
        """Return the plan with all strengths times ``scale``, without its weak edits, with what is left under it."""
        key = round(scale, 3)
        if key not in self.points:
            scaled = drop_weak_edits(scale_plan(self.plan, scale), MIN_STRENGTH)
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
