"""Measurements: every score has an interval, passes are shared, and what was measured saves and loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.scores import is_sound
from tests.support.tiny import tiny_subject

from obliteratus.core.results import Score
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet, Subject
from obliteratus.verify import Measurement, measure
from obliteratus.verify.accuracy import RenderedChoices
from obliteratus.verify.scoring import ItemValues

STEPS = (Step(use="behavior", tokens=6), Step(use="first_token_kl"), Step(use="perplexity"))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject("llama")


def test_every_score_has_its_interval(subject: Subject, prompts: PromptSet) -> None:
    before = measure(subject, prompts, STEPS)
    after = measure(subject, prompts, STEPS, before)
    assert {"refusal.target", "refusal.control", "degenerate.target", "perplexity"} <= set(before.scores)
    assert {"kl.first_token.mean", "perplexity.ratio"} <= set(after.scores)
    assert all(map(is_sound, after.scores.values()))


def test_first_tokens_are_the_same_with_and_without_answers(subject: Subject, prompts: PromptSet) -> None:
    alone = measure(subject, prompts, STEPS[1:2]).tensors["first_token.control"]
    shared = measure(subject, prompts, STEPS[:2]).tensors["first_token.control"]
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[0], alone[1], atol=1e-4)  # a row in another's place would be seen


def test_what_was_measured_saves_and_loads(subject: Subject, prompts: PromptSet, tmp_path: Path) -> None:
    before = measure(subject, prompts, STEPS)
    before.save(tmp_path / "measured")
    found = Measurement.load(tmp_path / "measured")
    assert dict(found.scores) == dict(before.scores)
    assert list(found.records) == list(before.records)
    assert found.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(found.tensors[k], v) for k, v in before.tensors.items())
    assert found.items.keys() == before.items.keys() >= {"refusal.target", "perplexity"}
    for name, item in before.items.items():
        assert found.items[name].unit == item.unit
        assert torch.equal(found.items[name].values, item.values)


def test_an_infinite_score_saves_and_loads(tmp_path: Path) -> None:
    score = Score(value=torch.inf, low=1.0, high=torch.inf, n=3, unit="perplexity")
    Measurement({"perplexity": score}).save(tmp_path / "measured")
    assert Measurement.load(tmp_path / "measured").scores["perplexity"] == score


def test_scores_are_of_the_items(subject: Subject, prompts: PromptSet) -> None:
    """What a study pairs is what VERIFY reports: one value per prompt or text."""
    before = measure(subject, prompts, STEPS)
    after = measure(subject, prompts, STEPS, before)
    for name in ("refusal.target", "degenerate.control", "perplexity"):
        assert after.items[name].score() == after.scores[name]
    assert after.items["perplexity"].change(before.items["perplexity"]) == after.scores["perplexity.ratio"]
    assert after.items["kl.first_token"].score() == after.scores["kl.first_token.mean"]
    assert len(after.items["refusal.target"].values) == len(prompts["target"])


def test_a_broken_model_answers_nothing_right() -> None:
    """Of three questions the first choice is right; where a likelihood is not a number, none is the likeliest."""
    rows = RenderedChoices([[1, 2]] * 6, (1,) * 6, (2, 2, 2), (0, 0, 0))
    losses = [torch.tensor([x]) for x in (0.1, 0.5, torch.nan, 0.5, 0.1, torch.nan)]
    assert rows.score_hits(losses).tolist() == [1, 0, 0]
    assert rows.score_hits([torch.tensor([0.1])] * 6).tolist() == [1, 1, 1]  # the first of equal ones


def test_a_mean_of_what_is_no_number_has_no_interval() -> None:
    item = ItemValues(torch.full((40,), torch.nan), "nats")
    assert torch.tensor(item.score().value).isnan()
    assert not item.score().has_interval
