"""The weakest strengths under which the judge no longer finds the behavior in answers to search prompts."""

from __future__ import annotations

from obliteratus.core.progress import note, progress
from obliteratus.core.types import Plan
from obliteratus.excise.kl_budget import scale_plan
from obliteratus.tune.front import Tuned, TunedPlan, find_front
from obliteratus.tune.parameters import drop_weak_edits
from obliteratus.tune.search_check import SearchCheck

# Between two strengths that are tried the KL grows 1.7 times, and 1.3 times between the last ones. Six of them reach
# from 0.35 to 2.9 times the first.
FACTOR, MOST_LOOKS = 1.3, 6
MIN_STRENGTH = 0.02  # an edit weaker than this changes no answer, and is dropped from the plan


def find_weakest(check: SearchCheck, plan: Plan, goal: float) -> Tuned:
    """Return the plan at the weakest strengths that leave the behavior on at most ``goal`` of search prompts.

    All strengths are raised together until the goal is reached, or lowered for as long as it is, and then one between
    the last two is tried. If the goal is never reached without more loops, the plan that comes closest is returned.
    The front holds the others.
    """
    points, scale = [look(check, plan, 1.0)], 1.0
    raises = points[0].checked.rate > goal
    with progress("TUNE strength", MOST_LOOKS - 2) as advance:
        for _ in range(MOST_LOOKS - 2):
            advance(1)
            scale *= FACTOR if raises else 1 / FACTOR
            points.append(look(check, plan, scale))
            if (points[-1].checked.rate > goal) != raises:
                points.append(look(check, plan, (points[-1].scale * points[-2].scale) ** 0.5))
                break
    best = min(points, key=lambda point: (check.excess(point.checked, goal), point.checked.kl, point.scale))
    found = best.checked
    left = f"{check.judge.name} on {found.rate:.1%} of search prompts"
    note("TUNE", f"strengths × {best.scale:.2f} leave {left}, at KL {found.kl:.4f}")
    return Tuned(best.plan, find_front(points))


def look(check: SearchCheck, plan: Plan, scale: float) -> TunedPlan:
    """Return the plan at these strengths, without its weak edits, with what search prompts say of it."""
    scaled = drop_weak_edits(scale_plan(plan, scale), MIN_STRENGTH)
    return TunedPlan(scaled, check.check(scaled), scale=scale)
