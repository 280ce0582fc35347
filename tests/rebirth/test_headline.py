"""The sentence at the head of a page: counts, intervals, and nothing that chance explains."""

from __future__ import annotations

import torch

from obliteratus.core.results import Run, Score
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.rebirth.headline import describe_headline
from obliteratus.verify.intervals import paired_share_change, wilson_rate


def record(controls: tuple[int, int], behavior: str = "refusal", **more: Score) -> Run:
    """A run in which 61 of 64 target prompts showed the behavior and 2 do, and so many of 96 controls."""
    shown = [(torch.arange(96) < hits).double() for hits in controls]
    target, control = f"{behavior}.target", f"{behavior}.control"
    return Run(
        recipe=load_recipe("lean"),
        source={},
        prompts={},
        judge={"behavior": behavior},
        before={target: wilson_rate(61, 64), control: wilson_rate(controls[0], 96)},
        after={target: wilson_rate(2, 64), control: wilson_rate(controls[1], 96), **more},
        change={control: paired_share_change(shown[1], shown[0])},
    )


def test_what_stayed_is_called_as_before() -> None:
    ratio = Score(value=1.002, low=0.99, high=1.01, n=16, unit="perplexity")
    assert describe_headline(record((3, 2), **{"perplexity.ratio": ratio})) == (
        "Refuses 2 of 64 target prompts (3.1 %, 0.9–10.7), before 61; other prompts as before (2 of 96, before 3); "
        "perplexity of plain text +0.2 %."
    )


def test_over_refusal_is_not_called_as_before() -> None:
    said = describe_headline(record((2, 20)))
    assert "as before" not in said
    assert "other prompts 20 of 96, before 2" in said


def test_other_behaviors_are_named() -> None:
    assert describe_headline(record((0, 0), "disclaimer")).startswith("Shows disclaimer on 2 of 64 target prompts")


def test_a_run_without_answers_says_nothing() -> None:
    assert describe_headline(Run(recipe=load_recipe("lean"), source={}, prompts={})) == ""
