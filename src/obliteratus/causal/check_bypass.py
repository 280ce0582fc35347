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

MAX_PROMPTS, TOKENS = 24, 16  # a refusal shows in its first words, and 24 answers distinguish half from all
MAX_SHARE = 0.5  # of the target prompts' refusals: with more than half of them left, the contrast is mostly wording


def check_bypass(context: FitContext, steps: Sequence[Step]) -> None:
    """Raise UserError if a step needs the group bypass and the model refuses those prompts too.

    The model answers 24 fit prompts of each group; the refusal rate of bypass prompts may be at most half of that of
    target prompts.
    """
    if "bypass" not in collect_needs(steps):
        return
    bypass, target = (_measure_refusal(context, context.prompts[group]) for group in ("bypass", "target"))
    note("bypass", f"refused {bypass:.0%}, target {target:.0%}")
    if bypass > MAX_SHARE * target or target == 0:
        raise UserError(
            f"the bypass prompts do not bypass the refusal: the model refuses {bypass:.0%} of them and "
            f"{target:.0%} of the target prompts; give prompts that it answers, or a method without bypass"
        )


def _measure_refusal(context: FitContext, prompts: Sequence[Prompt]) -> float:
    few = PromptSet({"target": tuple(prompts[:MAX_PROMPTS])})
    measurement = measure(context.subject, few, (Step(use="refusal", tokens=TOKENS),))
    return measurement.scores["refusal.target"].value
