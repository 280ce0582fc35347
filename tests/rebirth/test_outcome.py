"""What a record says in words claims nothing that chance explains, and says what is left and what to try."""

from __future__ import annotations

import pytest
import torch

from obliteratus.core.results import Run
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.rebirth.outcome import describe_outcome
from obliteratus.verify.intervals import paired_share_change, share_difference, wilson_rate

RATE = "refusal.target"


def record(before: int, after: int, method: str = "basic", n: int = 64, **fields: object) -> Run:
    """A run whose target prompts showed refusal so often; those after are among those before, or the other way."""
    shown = [torch.arange(n) < hits for hits in (before, after)]
    return Run(
        recipe=load_recipe(method),
        source={},
        prompts={},
        judge={"behavior": "refusal"},
        before={RATE: wilson_rate(before, n)},
        after={RATE: wilson_rate(after, n)},
        change={RATE: paired_share_change(shown[1].double(), shown[0].double())},
        **fields,  # type: ignore[arg-type]
    )


def test_a_removal_says_nothing_more() -> None:
    assert describe_outcome(record(60, 1)) == []


def test_what_is_left_is_said_with_what_to_try() -> None:
    (said,) = describe_outcome(record(60, 12))
    assert said == (
        "Left: refusal on 60 of 64 report prompts before and 12 of 64 after the edit. Try --method informed or "
        "--method tuned or obliteratus search."
    )
    (said,) = describe_outcome(record(60, 12, "tuned"))
    assert "--method informed" in said
    assert "--method tuned" not in said


@pytest.mark.parametrize(("before", "after"), [(30, 30), (30, 29), (2, 0), (0, 0), (0, 2)])
def test_chance_is_no_effect(before: int, after: int) -> None:
    (said,) = describe_outcome(record(before, after))
    assert said.startswith("No change of refusal beyond chance")


def test_a_behavior_that_grew_is_not_left() -> None:
    assert describe_outcome(record(20, 50, "reinforce")) == []


def test_a_forced_edit_says_so() -> None:
    against = "0 of 12 target and 0 of 12 control answers show refusal; it takes 8 target answers that do"
    said = describe_outcome(record(60, 1, presence={"against": against, "left_out": {"target": 0, "control": 0}}))
    assert said == [f"Warning: the edit was forced. Before it, {against}."]


def test_left_out_prompts_are_counted() -> None:
    said = describe_outcome(record(60, 1, presence={"against": "", "left_out": {"target": 7, "control": 0}}))
    assert said[0].startswith("Directions are fitted without 7 target prompts that do not show refusal and 0 control")


@pytest.mark.parametrize(("report", "chance"), [(3, "within chance"), (20, "beyond chance")])
def test_choices_that_flatter_are_told(report: int, chance: str) -> None:
    one, two = wilson_rate(1, 48), wilson_rate(report, 64)
    optimism = {"search": one, "report": two, "difference": share_difference(two, one)}
    said = describe_outcome(record(60, 1, optimism=optimism))[-1]
    assert "2.1% show refusal" in said
    assert chance in said
    assert f"{100 * (report / 64 - 1 / 48):+.1f} points" in said
