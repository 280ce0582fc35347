"""How many forward passes the analyses will make, and which of them a budget has room for.

A pass is one prompt passed through the model once. A prefix that prompts share is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from obliteratus.analyze.base import analyses
from obliteratus.core.cost import Values, prompt_count
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet


def formula_values(fit: PromptSet, search: PromptSet, layers: int) -> Values:
    """Return the values of a cost formula's variables: N_fit, N_search, each by group too, and L."""
    values = {"L": layers}
    for split, prompts in (("fit", fit), ("search", search)):
        counts = {f"N_{split},{group}": len(members) for group, members in prompts.groups.items()}
        values |= {f"N_{split}": sum(counts.values()), **counts}
    return values


def estimate_passes(steps: Sequence[Step], values: Values) -> dict[str, int]:
    """Return the most passes of each analysis by name, without the activations that all of them share."""
    return {s.use: analyses[s.use].cost(analyses.check(s.use, s.options)).count_passes(values) for s in steps}


def split_by_budget(passes: Mapping[str, int], budget: int | float) -> tuple[list[str], dict[str, str]]:
    """Return the analyses that the budget has room for, in their order, and by name why the others are left out.

    Analyses are taken from the cheapest on, so that as many run as can; of equals, the first.
    """
    left, chosen = budget, set()
    for name in sorted(passes, key=lambda name: passes[name]):
        if passes[name] <= left:
            left -= passes[name]
            chosen.add(name)
    skipped = {
        name: f"needs up to {count:,} forward passes, and {left:,} of the budget of {budget:,} are left"
        for name, count in passes.items()
        if name not in chosen
    }
    return [name for name in passes if name in chosen], skipped


def check_budget(budget: int | None) -> None:
    """Raise UserError if the budget is below 0."""
    if budget is not None and budget < 0:
        raise UserError(f"budget: {budget} is below 0; give 0 (only analyses that need no forward pass) or more")


def select_affordable(steps: Sequence[Step], values: Values, budget: int | None) -> tuple[list[Step], dict[str, str]]:
    """Return the steps that the budget has room for, and by name why the others are skipped; note what each costs.

    budget: the most forward passes, not counting those for the shared activations; None for no limit.
    Raises UserError for a budget below 0.
    """
    check_budget(budget)
    passes = estimate_passes(steps, values)
    names, skipped = split_by_budget(passes, math.inf if budget is None else budget)
    probe = int(prompt_count("fit").evaluate(values))
    free = ", ".join(name for name in names if not passes[name])
    note("cost", f"probe: {probe:,} forward passes")
    for name in names:
        if passes[name]:
            note("cost", f"{name}: at most {passes[name]:,}")
    if free:
        note("cost", f"none more for {free}")
    note("cost", f"together at most {probe + sum(passes[name] for name in names):,} forward passes of one prompt each")
    for name, reason in skipped.items():
        note("skipped", f"{name}: {reason}")
    return [step for step in steps if step.use in names], skipped
