"""The KL budget: a plan's strength is lowered by bisection until the measured KL divergence is within the budget."""

from __future__ import annotations

from collections.abc import Callable

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.types import Plan, Prompt, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.logits import first_token_log_probs, kl_divergence

# First tokens of this many prompts give the mean to about a tenth of its value, and cost one batch.
CHECK_PROMPTS = 48
BISECTION_STEPS = 6  # the factor to 1/64: finer than the uncertainty of the mean


def limit_kl(
    subject: Subject, done: Plan, new: Plan, prompts: tuple[Prompt, ...], budget: float
) -> tuple[Plan, float, float]:
    """Scale the new plan down until KL(unedited ‖ done + new) is at most ``budget`` nats on average.

    The KL divergence is of the first answer token, over the first 48 prompts. Returns the plan, its factor (1 means
    unchanged) and its KL. If even 1/64 of the strength costs more, returns an empty plan after earlier passes; raises
    UserError if there are none.
    """
    ids = render_prompts(subject, prompts[:CHECK_PROMPTS])
    base = first_token_log_probs(subject, ids, title="KL budget")

    def costs(factor: float) -> float:
        with applied(subject, done + new.scaled(factor)):
            return float(kl_divergence(base, first_token_log_probs(subject, ids, title=f"KL at {factor:.0%}")).mean())

    factor, cost = find_largest_factor(costs, budget, BISECTION_STEPS)
    if factor == 0 and done.edits:
        return Plan((), new.model), 0.0, cost
    if factor == 0:
        raise UserError(
            f"excise.kl_budget={budget}: even 1/{2**BISECTION_STEPS} of the strength costs more; raise the budget"
        )
    note("KL budget", f"{factor:.0%} of the strength, {cost:.3f} of {budget} nats")
    return new.scaled(factor), factor, cost


def find_largest_factor(costs: Callable[[float], float], budget: float, steps: int) -> tuple[float, float]:
    """Return the largest factor in 0–1 found to cost at most the budget, and its cost: 1 if possible, else bisected."""
    low, high, at_low = 0.0, 1.0, 0.0
    if (full := costs(1.0)) <= budget:
        return 1.0, full
    for _ in range(steps):
        middle = (low + high) / 2
        if (cost := costs(middle)) <= budget:
            low, at_low = middle, cost
        else:
            high = middle
    return low, at_low
