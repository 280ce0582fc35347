"""What analyses will ask of a model, in forward passes of one prompt, and which of them a budget has room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from obliteratus.analyze.base import analyses
from obliteratus.core.cost import Values, n_of
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet


@dataclass(frozen=True)
class PassEstimate:
    """Forward passes, at most: one is one prompt passed through the model once. A prefix that prompts share is not
    counted: it is passed by itself, once for all of them."""

    probe: int
    """Of the activations that all analyses share."""
    each: Mapping[str, int]
    """By analysis, in the order in which they run."""

    @property
    def total(self) -> int:
        """The probe's and all analyses'."""
        return self.probe + sum(self.each.values())

    def lines(self) -> list[str]:
        """For people: one line for the probe, one for each analysis that asks, one for those that do not, the total."""
        asking = [f"{name}: at most {passes:,}" for name, passes in self.each.items() if passes]
        free = ", ".join(name for name, passes in self.each.items() if not passes)
        last = f"together at most {self.total:,} forward passes of one prompt each"
        return [f"probe: {self.probe:,} forward passes", *asking, *[f"none more for {free}"] * bool(free), last]

    def within(self, budget: int) -> PassEstimate:
        """What the budget, which the probe does not count against, has room for: the cheapest first.

        As many analyses run as can; of equals, the first in order. They keep their order.
        """
        left, kept = budget, set()
        for name in sorted(self.each, key=lambda name: self.each[name]):
            if self.each[name] <= left:
                left -= self.each[name]
                kept.add(name)
        return PassEstimate(self.probe, {name: passes for name, passes in self.each.items() if name in kept})

    def skipped(self, budget: int) -> dict[str, str]:
        """By analysis that the budget has no room for: why."""
        kept = self.within(budget)
        left = budget - (kept.total - kept.probe)
        return {
            name: f"needs up to {passes:,} forward passes, and {left:,} of the budget of {budget:,} are left"
            for name, passes in self.each.items()
            if name not in kept.each
        }


def formula_values(fit: PromptSet, held: PromptSet, layers: int) -> Values:
    """What the names in a cost's formula stand for here: N_fit, N_search, each by group too, and L."""
    values = {"L": layers}
    for part, prompts in (("fit", fit), ("search", held)):
        counts = {f"N_{part},{group}": len(members) for group, members in prompts.groups.items()}
        values |= {f"N_{part}": sum(counts.values()), **counts}
    return values


def estimate_passes(steps: Sequence[Step], values: Values) -> PassEstimate:
    """Of the probe and these analyses, with as many prompts and layers as there are."""
    each = {s.use: analyses[s.use].cost(analyses.check(s.use, s.options)).passes(values) for s in steps}
    return PassEstimate(int(n_of("fit").of(values)), each)


def check_budget(budget: int | None) -> None:
    """UserError for a budget below 0."""
    if budget is not None and budget < 0:
        raise UserError(f"budget: {budget} forward passes cannot be; give 0 (only what costs none) or more")


def select_affordable(steps: Sequence[Step], values: Values, budget: int | None) -> tuple[list[Step], dict[str, str]]:
    """The analyses that the budget has room for, in their order, and why not the others; says what each costs.

    None: there is room for all. UserError for a budget below 0.
    """
    check_budget(budget)
    whole = estimate_passes(steps, values)
    kept, skipped = (whole, {}) if budget is None else (whole.within(budget), whole.skipped(budget))
    for line in kept.lines():
        note("cost", line)
    for name, why in skipped.items():
        note("skipped", f"{name}: {why}")
    return [step for step in steps if step.use in kept.each], skipped
