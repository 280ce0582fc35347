"""The plans of a fit, from gentle to thorough, and the files that they are kept in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from obliteratus.core.pareto import pareto_front
from obliteratus.core.types import Plan
from obliteratus.excise.plan import load_plan, save_plan
from obliteratus.tune.objective import ZERO_LOSS, LossTerms
from obliteratus.tune.search_check import Checked

FRONT = "front"
"""Name of the folder with a folder for each plan, and of the JSON file that describes them."""


@dataclass(frozen=True, eq=False)
class TunedPlan:
    """A plan on the way from gentle to thorough, and what search prompts say of it."""

    plan: Plan
    checked: Checked
    loss: LossTerms = ZERO_LOSS
    """On search prompts' answers; 0 where no gradient step is taken."""
    steps: int = 0
    """Gradient steps taken."""
    scale: float = 1.0
    """Factor on all strengths after the last step."""

    def describe(self) -> dict[str, float]:
        """Return what search prompts say, as plain numbers. ``kl`` is that of `Checked`, not the loss of this name."""
        loss = {name: float(value) for name, value in vars(self.loss).items()}
        checked = {name: value for name, value in vars(self.checked).items() if value is not None}
        return {**loss, **checked, "steps": self.steps, "scale": self.scale, "edits": len(self.plan.edits)}


@dataclass(frozen=True)
class Tuned:
    """The result of a fit."""

    plan: Plan
    front: Sequence[TunedPlan] = ()
    """The gentlest plan first. Empty if the result was loaded from disk."""


def find_front(points: Sequence[TunedPlan]) -> list[TunedPlan]:
    """Return the plans for which no other leaves as little at as small a KL and keeps as much, the gentlest first."""
    found = [p.checked for p in points]
    front = [points[i] for i in pareto_front([(c.rate, c.kl, -(c.kept or 0.0)) for c in found])]
    return sorted(front, key=lambda point: point.checked.kl)


def save_tuned(tuned: Tuned, folder: Path) -> None:
    """Write the plan, ``front/N`` with each plan of the front, and ``front/front.json`` with what is known of them."""
    save_plan(tuned.plan, folder)
    for number, point in enumerate(tuned.front, 1):
        save_plan(point.plan, folder / FRONT / str(number))
    described = [{"number": number, **point.describe()} for number, point in enumerate(tuned.front, 1)]
    (folder / FRONT).mkdir(exist_ok=True)
    (folder / FRONT / f"{FRONT}.json").write_text(json.dumps(described, indent=1), encoding="utf-8")


def load_tuned(folder: Path) -> Tuned:
    """Load the plan that `save_tuned` wrote. The front is not loaded."""
    return Tuned(load_plan(folder))
