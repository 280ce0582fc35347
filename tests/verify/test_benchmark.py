"""The benchmark scorer: values of items add up to the harness's numbers, and changes are paired."""

from __future__ import annotations

from math import exp, isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api import metrics
from tests.support.harness import write_task
from tests.support.plans import random_plan
from tests.support.scores import is_sound
from tests.support.tiny import tiny_subject

from obliteratus.benchmark.run import MetricValues, TaskResults
from obliteratus.core.errors import UserError
from obliteratus.core.registry import RunInputs
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet
from obliteratus.excise.live.hooks import applied
from obliteratus.verify import measure, scorers
from obliteratus.verify.benchmark import to_items, to_measurement
from obliteratus.verify.intervals import paired_share_change
from obliteratus.verify.score_names import describe_score

SHARES = (1.0, 0.0, 1.0, 1.0)
TEXTS = ((-12.0, 4), (-30.0, 8), (-3.0, 2))
"""Log-likelihood and words of three texts."""


def values(aggregate: Any, items: tuple[Any, ...], metric: str = "acc", kind: str = "none") -> MetricValues:
    value = float(aggregate(items)) if items else 0.5
    return MetricValues("small", metric, kind, value, aggregate, items)


@pytest.mark.parametrize(
    ("aggregate", "items"),
    [
        (metrics.mean, SHARES),
        (metrics.mean, (0.25, 0.5, 1.0)),
        (metrics.perplexity, (-1.5, -2.0, -0.5)),
        (metrics.weighted_perplexity, TEXTS),
        (metrics.bits_per_byte, TEXTS),
    ],
)
def test_items_add_up_to_what_the_harness_reports(aggregate: Any, items: tuple[Any, ...]) -> None:
    found = values(aggregate, items)
    own = to_items(found)
    assert own is not None
    mean = float(own.values.mean())
    assert (exp(mean) if own.unit == "perplexity" else mean) == pytest.approx(found.value)
    assert own.score().value == pytest.approx(found.value)


def test_shares_are_told_from_other_numbers() -> None:
    units = [
        item.unit for item in map(to_items, (values(metrics.mean, SHARES), values(metrics.mean, (0.5, 1.0)))) if item
    ]
    assert units == ["share", "mean"]


def test_metrics_of_a_whole_task_have_no_items_and_no_interval() -> None:
    before = to_measurement(TaskResults((values(lambda items: 0.5, ((0, 1), (1, 1)), "f1"),), {}))
    after = to_measurement(TaskResults((values(lambda items: 0.8, ((0, 0), (1, 1)), "f1"),), {}), before)
    change = after.scores["benchmark.small.f1.change"]
    assert change.value == pytest.approx(0.3)
    assert isnan(change.low)
    assert not after.items


def test_changes_are_paired() -> None:
    one, two = (0.0, 1.0, 1.0, 0.0, 1.0), (1.0, 1.0, 0.0, 1.0, 1.0)
    before = to_measurement(TaskResults((values(metrics.mean, one),), {}))
    after = to_measurement(TaskResults((values(metrics.mean, two),), {}), before)
    assert after.scores["benchmark.small.acc.change"] == paired_share_change(torch.tensor(two), torch.tensor(one))


def test_sides_of_different_kinds_of_numbers_are_still_paired() -> None:
    one, two = (0.0, 1.0, 1.0), (0.5, 1.0, 0.25)
    before = to_measurement(TaskResults((values(metrics.mean, one),), {}))
    after = to_measurement(TaskResults((values(metrics.mean, two),), {}), before)
    assert after.scores["benchmark.small.acc.change"].value == pytest.approx(-0.25 / 3)


def test_filters_have_scores_of_their_own() -> None:
    kinds = [values(metrics.mean, SHARES, kind=kind) for kind in ("strict-match", "flexible-extract")]
    names = list(to_measurement(TaskResults(tuple(kinds), {})).scores)
    assert names == ["benchmark.small.acc.strict-match", "benchmark.small.acc.flexible-extract"]
    assert describe_score(names[0]) == "small, acc, strict-match"


def test_the_scorer_measures_the_edited_model(tmp_path: Path) -> None:
    subject = tiny_subject("llama")
    steps = [Step(use="benchmark", tasks=[str(write_task(tmp_path, kind)) for kind in ("choices", "texts")])]
    before = measure(subject, PromptSet({}), steps)
    with applied(subject, random_plan(subject, strength=1.5)):
        after = measure(subject, PromptSet({}), steps, before)
    assert set(before.scores) == {
        "benchmark.small_choices.acc",
        "benchmark.small_choices.acc_norm",
        "benchmark.small_texts.word_perplexity",
    }
    ratio = after.scores["benchmark.small_texts.word_perplexity.change"]
    assert ratio.value == pytest.approx(
        after.scores["benchmark.small_texts.word_perplexity"].value
        / before.scores["benchmark.small_texts.word_perplexity"].value
    )
    assert ratio.value != 1
    assert is_sound(after.scores["benchmark.small_choices.acc"])


def test_unknown_tasks_are_refused_before_a_model_is_loaded() -> None:
    entry = scorers["benchmark"]
    options = scorers.check("benchmark", {"tasks": ["arithmetik"]})
    with pytest.raises(UserError, match="did you mean 'arithmetic'"):
        entry.fits(options, RunInputs({}, lambda: 32))
    entry.fits(scorers.check("benchmark", {}), RunInputs({}, lambda: 32))


def test_the_cost_counts_the_items_of_our_tasks() -> None:
    costs = [
        scorers["benchmark"].cost(scorers.check("benchmark", options)).texts.evaluate({})
        for options in ({}, {"limit": 10}, {"tasks": ["reading"]}, {"tasks": ["hellaswag"], "limit": 5})
    ]
    assert costs == [4 * 156, 4 * 20, 4 * 60, 4 * 5]
