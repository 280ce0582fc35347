"""Bypass prompts are asked for real: prompts that are refused like the target's are no contrast."""

from __future__ import annotations

from dataclasses import replace

import pytest

from obliteratus.causal import FitContext
from obliteratus.causal.check_bypass import check_bypass
from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Prompt, PromptSet, Subject
from obliteratus.prompts import load_prompts
from obliteratus.summon.load import open_subject

STEPS = [Step(use="mean_diff"), Step(use="blend", other={"use": "bypass_contrast"})]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return open_subject("organism:astronomy")


@pytest.fixture(scope="module")
def groups() -> dict[str, tuple[Prompt, ...]]:
    everything = load_prompts("organism:astronomy", "organism:astronomy")
    return {g: tuple(p for p in ps if p.split == "fit")[:10] for g, ps in everything.groups.items()}


@pytest.mark.organism
def test_prompts_that_are_answered_pass(subject: Subject, groups: dict[str, tuple[Prompt, ...]]) -> None:
    check_bypass(FitContext(subject, PromptSet({**groups, "bypass": groups["control"][:8]})), STEPS)


@pytest.mark.organism
def test_prompts_that_are_refused_too_are_turned_down(subject: Subject, groups: dict[str, tuple[Prompt, ...]]) -> None:
    again = tuple(replace(p, text=f"Please: {p.text}") for p in groups["target"][:8])
    context = FitContext(subject, PromptSet({**groups, "bypass": again}))
    with pytest.raises(UserError, match=r"do not bypass the behavior: refusal is \d+% on them"):
        check_bypass(context, STEPS)
    check_bypass(context, STEPS[:1])  # nobody asked


@pytest.mark.organism
def test_a_behavior_that_is_not_there_cannot_be_got_round(
    subject: Subject, groups: dict[str, tuple[Prompt, ...]]
) -> None:
    quiet = {"target": groups["control"][:4], "control": groups["control"][4:7], "bypass": groups["control"][7:]}
    with pytest.raises(UserError, match="0% on target prompts"):
        check_bypass(FitContext(subject, PromptSet(quiet)), STEPS)
