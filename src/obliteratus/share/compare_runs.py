"""Whether a repeated run gave the same: its plan and its scores, each within a stated tolerance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

from obliteratus.core.results import Score
from obliteratus.core.run_folder import write_atomic
from obliteratus.share.compare_plans import PlanComparison
from obliteratus.share.reproduce_file import ReproduceFile

REPRODUCTION = "reproduction.json"


@dataclass(frozen=True)
class ScoreDifference:
    """One score that is not what it was."""

    name: str
    """Key of the score, behind ``before`` or ``after``."""
    then: float | None
    now: float | None
    """None where it was not measured."""
    allowed: float

    @property
    def is_within(self) -> bool:
        """Return whether the two count as the same."""
        return self.then is not None and self.now is not None and abs(self.now - self.then) <= self.allowed


@dataclass(frozen=True)
class Reproduction:
    """What came out when a run was done again."""

    conditions: tuple[str, ...]
    """What was not as it was when the run was made, such as a release or the processor."""
    plan: PlanComparison | None
    """None if only the digest of the earlier plan is known, and it differs."""
    tolerance: float
    """Of the plan."""
    scores: int
    """How many were compared."""
    differences: tuple[ScoreDifference, ...]
    """Scores that are not bit by bit what they were."""

    @property
    def beyond(self) -> tuple[ScoreDifference, ...]:
        """Scores that differ by more than is allowed."""
        return tuple(found for found in self.differences if not found.is_within)

    @property
    def is_met(self) -> bool:
        """Return whether the plan, where it can be compared, and all scores are within their tolerances."""
        return not self.beyond and (self.plan is None or self.plan.is_within(self.tolerance))

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        scores = [asdict(found) | {"within": found.is_within} for found in self.differences]
        plan = None if self.plan is None else asdict(self.plan) | {"within": self.plan.is_within(self.tolerance)}
        return {
            "met": self.is_met,
            "conditions": list(self.conditions),
            "plan": plan,
            "plan_tolerance": self.tolerance,
            "scores": self.scores,
            "differences": scores,
        }


def write_reproduction(found: Reproduction, folder: Path) -> None:
    """Write `REPRODUCTION` into the folder of the repeated run."""
    write_atomic(folder / REPRODUCTION, json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n")


def compare_scores(
    then: ReproduceFile, before: Mapping[str, Score], after: Mapping[str, Score]
) -> list[ScoreDifference]:
    """Return the scores that differ. before, after: of the repeated run."""
    states = {"before": (then.before, before), "after": (then.after, after)}
    found = [
        ScoreDifference(f"{state} {name}", _value(old.get(name)), _value(new.get(name)), then.allowed.get(name, 0.0))
        for state, (old, new) in states.items()
        for name in dict.fromkeys([*old, *new])
    ]
    return [one for one in found if not _is_same(one.then, one.now)]


def _value(score: Score | None) -> float | None:
    return None if score is None else score.value


def _is_same(then: float | None, now: float | None) -> bool:
    if then is None or now is None:
        return then is now
    return then == now or (isnan(then) and isnan(now))
