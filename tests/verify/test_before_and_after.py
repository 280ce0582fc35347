"""How a model is measured before and after a plan: in memory one state after the other, on disk side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.checkpoints import stored
from tests.support.plans import PlanMaker
from tests.support.tiny import tiny_subject

from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet
from obliteratus.excise.live.hooks import applied
from obliteratus.summon.load import open_subject
from obliteratus.summon.load_offloaded import open_offloaded
from obliteratus.verify import measure, measure_before_and_after

STEPS = (Step(use="behavior", tokens=6), Step(use="first_token_kl"), Step(use="perplexity"))


def test_in_memory_both_states_are_measured_by_the_steps(prompts: PromptSet, make_plan: PlanMaker) -> None:
    subject = tiny_subject("llama")
    plan = make_plan(subject)
    before, after = measure_before_and_after(subject, plan, prompts, STEPS)
    assert before.scores == measure(subject, prompts, STEPS).scores  # no edit is live
    with applied(subject, plan):
        assert after.scores == measure(subject, prompts, STEPS, before).scores
    assert after.scores["perplexity"] != before.scores["perplexity"]  # negative control: the edit was live


def test_what_was_measured_before_is_not_measured_again(prompts: PromptSet, make_plan: PlanMaker) -> None:
    subject = tiny_subject("llama")
    known, expected = measure_before_and_after(subject, make_plan(subject), prompts, STEPS[2:])
    before, after = measure_before_and_after(subject, make_plan(subject), prompts, STEPS[2:], known)
    assert before is known
    assert after.scores == expected.scores


def test_on_disk_one_pass_measures_both_states(tmp_path: Path, prompts: PromptSet, make_plan: PlanMaker) -> None:
    folder = stored(tmp_path, "llama", max_position_embeddings=128)
    loaded, offloaded = open_subject(str(folder)), open_offloaded(str(folder))
    plan = make_plan(loaded)
    first_tokens = (Step(use="behavior_score"), *STEPS[1:])  # whole answers would read the weights once per token
    expected = measure_before_and_after(loaded, plan, prompts, first_tokens)
    measured = measure_before_and_after(offloaded, plan, prompts, STEPS)
    for ours, theirs in zip(measured, expected, strict=True):
        assert ours.scores.keys() == theirs.scores.keys()
        for name, score in theirs.scores.items():
            assert ours.scores[name].value == pytest.approx(score.value, rel=1e-4, abs=1e-6), name
