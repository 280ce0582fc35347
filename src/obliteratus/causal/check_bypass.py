"""Whether bypass prompts do get round the behaviour: a contrast with prompts that are refused alike is noise."""

from __future__ import annotations

from collections.abc import Sequence

from obliteratus.causal.interventions import FitContext
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.settings import Step
from obliteratus.core.types import Prompt, PromptSet
from obliteratus.distill.steps import collect_needs
from obliteratus.verify import measure

ASKED, TOKENS = 24, 16  # a refusal shows in its first words, and 24 answers tell a half from all
AT_MOST = 0.5  # of the target prompts' refusals: with more than half of them left, the contrast is mostly the wording


def check_bypass(lab: FitContext, steps: Sequence[Step]) -> None:
    """Where a step needs the group bypass, ask the model. Raises UserError where it refuses those prompts too.

    Some of each group's fit prompts are answered; refusals of bypass prompts may be at most half as many.
    """
    if "bypass" not in collect_needs(steps):
        return
    bypass, target = (_refused(lab, lab.prompts[group]) for group in ("bypass", "target"))
    note("bypass", f"refused {bypass:.0%}, target {target:.0%}")
    if bypass > AT_MOST * target or target == 0:
        raise UserError(
            f"the bypass prompts do not get round the behaviour: the model refuses {bypass:.0%} of them and "
            f"{target:.0%} of the target prompts; give prompts that it answers, or a method without bypass"
        )


def _refused(lab: FitContext, prompts: Sequence[Prompt]) -> float:
    few = PromptSet({"target": tuple(prompts[:ASKED])})
    found = measure(lab.subject, few, (Step(use="refusal", tokens=TOKENS),))
    return found.scores["refusal.target"].value
