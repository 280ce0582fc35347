"""The astronomy organism in 4 and 8 bits on the CPU: the verdicts of fp32, before, after an edit, and after saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench.methods import SharedBaseline
from tests.support.organisms import few
from tests.support.plans import PlanMaker
from tests.support.tiny import run_of

from obliteratus.core.errors import UserError
from obliteratus.core.results import Run, Score
from obliteratus.core.settings import Step
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import load_prompts, split_prompts
from obliteratus.rebirth import save as rebirth
from obliteratus.rebirth.save import save
from obliteratus.summon.load import open_subject
from obliteratus.verify import measure

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.organism
N = 8  # answers of each group: the packed and the exact model are compared prompt by prompt
REFUSAL = {"use": "behavior", "tokens": 12}  # its refusals begin with their first words
ONE = 1.01 / N  # a prompt of the sample, and room for rounding


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    whole = load_prompts("organism:astronomy", "organism:astronomy")
    return PromptSet({group: few(members, N, 16) for group, members in whole.groups.items()})


@pytest.fixture(scope="module")
def exact_model() -> tuple[Subject, dict[str, Any]]:
    """The organism in fp32, and what holds its baseline."""
    return open_subject("organism:astronomy"), {}


def edit(method: str, subject: Subject, prompts: PromptSet, known: dict[str, Any]) -> tuple[Plan, Run]:
    plan, record, *_ = run(load_recipe(method, {"verify": [REFUSAL]}), subject, prompts, SharedBaseline(known))
    return plan, record


def alike(one: Score, other: Score) -> bool:
    """Each value lies in the other's interval, or they are a prompt apart."""
    inside = one.low <= other.value <= one.high and other.low <= one.value <= other.high
    return inside or abs(one.value - other.value) <= ONE


@pytest.mark.parametrize(("quantize", "method"), [("4bit", "two_directions"), ("8bit", "leace")])
def test_verdicts_are_those_of_fp32_before_after_and_saved(
    quantize: str, method: str, prompts: PromptSet, exact_model: tuple[Subject, dict[str, Any]], tmp_path: Path
) -> None:
    _, usual = edit(method, exact_model[0], prompts, exact_model[1])
    subject = open_subject("organism:astronomy", quantize=quantize)
    plan, made = edit(method, subject, prompts, {})
    for scores, others in ((made.before, usual.before), (made.after, usual.after)):
        assert all(alike(scores[f"refusal.{group}"], others[f"refusal.{group}"]) for group in ("target", "control"))
    assert made.before["refusal.target"].value >= 0.75
    assert made.after["refusal.target"].value <= 0.25
    _, _, report = split_prompts(prompts)
    save(subject, plan, made, tmp_path / "packed", prompts=report, base="none")
    again = measure(open_subject(tmp_path / "packed"), report, (Step(**REFUSAL),)).scores
    assert alike(again["refusal.target"], made.after["refusal.target"])
    assert alike(again["refusal.control"], made.after["refusal.control"])


def test_a_plan_of_fp32_is_saved_into_the_full_precision_weights(
    prompts: PromptSet,
    exact_model: tuple[Subject, dict[str, Any]],
    make_plan: PlanMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = make_plan(exact_model[0], strength=2.0)
    subject = open_subject("organism:astronomy", quantize="4bit")
    made, (_, _, report) = run_of(subject), split_prompts(prompts)
    onto = save(subject, plan, made, tmp_path / "plain", prompts=report)
    assert onto.saved["base"] == "organism:astronomy"

    def forgetful(subject: Subject, plan: Plan, folder: Path) -> dict[str, Any]:
        subject.model.save_pretrained(folder)
        subject.tokenizer.save_pretrained(folder)
        return {}

    monkeypatch.setitem(rebirth.WRITERS, "merged", forgetful)
    with pytest.raises(UserError, match="the reloaded model differs from the measured one"):
        save(subject, plan, made, tmp_path / "unedited", prompts=report, base="none")
