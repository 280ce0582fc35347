"""As strong as a budget of damage allows: a real KL, measured on live edits, and bisection on the strength."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.types import Blend, Change, Edit, Plan, Prompt, Shift, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.logits import first_token_log_probs, kl_divergence

# First tokens of so many prompts give the mean to a tenth or so of its value, and cost one batch.
CHECK_PROMPTS = 48
BISECTION_STEPS = 6  # the factor to 1/64: nearer than the mean's own uncertainty


def limit_kl(
    subject: Subject, done: Plan, new: Plan, prompts: tuple[Prompt, ...], budget: float
) -> tuple[Plan, float, float]:
    """The new plan, weakened as a whole until KL(unedited ‖ done + new) is at most ``budget`` nats on average.

    KL of the first answer token over the first 48 prompts. Returns the plan, its factor (1: as it was) and its KL.
    Where even a 64th of the strength costs more: UserError, or an empty plan if there is one done before it.
    """
    ids = render_prompts(subject, prompts[:CHECK_PROMPTS])
    base = first_token_log_probs(subject, ids, title="KL budget")

    def costs(factor: float) -> float:
        with applied(subject, done + scale_plan(new, factor)):
            return float(kl_divergence(base, first_token_log_probs(subject, ids, title=f"KL at {factor:.0%}")).mean())

    factor, cost = find_largest_factor(costs, budget, BISECTION_STEPS)
    if factor == 0 and done.edits:
        return Plan((), new.model), 0.0, cost
    if factor == 0:
        raise UserError(
            f"excise.kl_budget={budget}: even 1/{2**BISECTION_STEPS} of the strength costs more; raise the budget"
        )
    note("KL budget", f"{factor:.0%} of the strength, {cost:.3f} of {budget} nats")
    return scale_plan(new, factor), factor, cost


def find_largest_factor(costs: Callable[[float], float], budget: float, steps: int) -> tuple[float, float]:
    """The largest factor in 0–1 that was seen to cost at most the budget, and its cost: 1 if it may, else bisected."""
    low, high, at_low = 0.0, 1.0, 0.0
    if (whole := costs(1.0)) <= budget:
        return 1.0, whole
    for _ in range(steps):
        middle = (low + high) / 2
        if (cost := costs(middle)) <= budget:
            low, at_low = middle, cost
        else:
            high = middle
    return low, at_low


def scale_plan(plan: Plan, factor: float) -> Plan:
    """All strengths and shifts times the factor. Masks have no strength: they stay."""
    return replace(plan, edits=tuple(_weakened(change, factor) for change in plan.edits))


def _weakened(change: Change, factor: float) -> Change:
    if isinstance(change, Edit):
        return replace(change, strength=factor * change.strength)
    if isinstance(change, Blend):
        return replace(change, share=factor * change.share)
    return replace(change, vector=factor * change.vector) if isinstance(change, Shift) else change
