"""A check that the model answers the bypass prompts: a contrast with prompts that are refused alike is noise."""

from __future__ import annotations

from collections.abc import Sequence

from obliteratus.causal.interventions import FitContext
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.settings import Step
from obliteratus.core.types import Prompt, PromptSet
from obliteratus.distill.steps import collect_needs
from obliteratus.verify import measure

MAX_PROMPTS, TOKENS = 24, 16  # a behavior shows in the first words, and 24 answers distinguish half from all
MAX_SHARE = 0.5  # of the rate on target prompts: with more than half of them left, the contrast is mostly wording


def check_bypass(context: FitContext, steps: Sequence[Step]) -> None:
    """Raise UserError if a step needs the group bypass and the model refuses those prompts too.

    The model answers 24 fit prompts of each group; the behavior's rate on bypass prompts may be at most half of that on
    target prompts.
    """
    if "bypass" not in collect_needs(steps):
        return
    bypass, target = (_measure_rate(context, context.prompts[group]) for group in ("bypass", "target"))
    note("bypass", f"{context.judge.name} {bypass:.0%}, target {target:.0%}")
    if bypass > MAX_SHARE * target or target == 0:
        raise UserError(
            f"the bypass prompts do not bypass the behavior: {context.judge.name} is {bypass:.0%} on them and "
            f"{target:.0%} on target prompts; give prompts without it, or a method without bypass"
        )


def _measure_rate(context: FitContext, prompts: Sequence[Prompt]) -> float:
    few = PromptSet({"target": tuple(prompts[:MAX_PROMPTS])})
    measurement = measure(context.subject, few, (Step(use="behavior", tokens=TOKENS),), judge=context.judge)
    return measurement.scores[context.judge.rate_of("target")].value
