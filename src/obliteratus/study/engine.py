"""Measures knockouts one after the other on one loaded model: one baseline, live edits, lower blocks run once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import Any

import torch

from obliteratus.core.errors import UserError
from obliteratus.core.types import Subject
from obliteratus.inference.batching import tokens_per_batch
from obliteratus.inference.generate import MAX_ROWS
from obliteratus.inference.memory import free_memory, trim_heap
from obliteratus.judge.judge import Judge
from obliteratus.study.base import Knockout, KnockoutResult, StudyContext, strategies
from obliteratus.study.data import StudyData, load_data
from obliteratus.study.metrics import Items, Metric, Records
from obliteratus.study.settings import Study
from obliteratus.verify import ItemValues
from obliteratus.verify.answers import pair_answers
from obliteratus.verify.ladder import hear_judge

# The share of free memory that all metrics together may fill with cached outputs of lower blocks.
CACHE_SHARE = 0.4
# Knockouts that are measured before their results are written down, which is what a kill can lose. With few prompts
# there are more, so that they fill a decoding step.
MIN_BATCH, MAX_BATCH = 4, 16
DIGITS = 6  # of an item's change: a difference of losses below 1e-6 nats is rounding


@dataclass(eq=False)
class Engine:
    """A loaded model, the data that a study measures it on, and its knockouts."""

    subject: Subject
    study: Study
    data: StudyData
    knockouts: tuple[Knockout, ...]
    judge: Judge

    @classmethod
    def create(cls, subject: Subject, study: Study) -> Engine:
        """Load the data and list the knockouts. Raises UserError for a strategy that has none in this model."""
        data = load_data(subject, study)
        context = StudyContext(subject, data.texts, study.seed)
        with tokens_per_batch(study.batch):
            listed = (list_knockouts(context, step.use, step.options) for step in study.strategies)
            knockouts = _check_distinct(knockout for group in listed for knockout in group)
        return cls(subject, study, data, knockouts, hear_judge(study.judge, subject, data.prompts))

    def batches(self) -> list[list[Knockout]]:
        """Return the knockouts in batches that are measured together."""
        prompts = 0 if self.data.prompts is None else sum(map(len, self.data.prompts.groups.values()))
        size = min(MAX_BATCH, max(MIN_BATCH, MAX_ROWS // prompts)) if prompts else MIN_BATCH
        return batch_knockouts(self.knockouts, size)

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """The study's metrics."""
        budget = CACHE_SHARE * free_memory(self.subject) / len(self.study.metrics)
        return tuple(Metric(self.subject, self.data, step, budget, self.judge) for step in self.study.metrics)

    @cached_property
    def baseline(self) -> Items:
        """The unedited model's values by score name."""
        with self._inference():
            return {name: item for metric in self.metrics for name, item in metric.unedited[1].items()}

    @contextmanager
    def _inference(self) -> Iterator[None]:
        with torch.inference_mode(), tokens_per_batch(self.study.batch):
            yield

    def measure_baseline(self) -> KnockoutResult:
        """Measure the unedited model."""
        start = perf_counter()
        scores = {name: item.score() for name, item in self.baseline.items()}
        return KnockoutResult(scores=scores, seconds=round(perf_counter() - start, 3))

    def measure(self, knockouts: Sequence[Knockout]) -> list[KnockoutResult]:
        """Measure each knockout by itself; where prompts are few, several share a pass."""
        baseline, start = self.baseline, perf_counter()
        plans = [knockout.plan for knockout in knockouts]
        with self._inference():
            by_metric = [metric.measure(plans) for metric in self.metrics]
        trim_heap()  # glibc holds on to freed memory otherwise
        seconds = round((perf_counter() - start) / len(knockouts), 3)
        results = []
        for i, knockout in enumerate(knockouts):
            items = {name: item for measured in by_metric for name, item in measured[i][0].items()}
            scores = {name: item.score() for name, item in items.items()}
            change = {name: item.change(baseline[name]) for name, item in items.items()}
            differences = {name: list_differences(item, baseline[name]) for name, item in items.items()}
            fields = {key: value for key, value in vars(knockout).items() if key != "plan"}
            answers = tuple(self._pair_answers([record for measured in by_metric for record in measured[i][1]]))
            fields |= {"scores": scores, "change": change, "differences": differences}
            results.append(KnockoutResult(**fields, seconds=seconds, answers=answers))
        return results

    def _pair_answers(self, records: Records) -> Iterator[Mapping[str, Any]]:
        """Yield the judged answers under a knockout, each beside that of the unedited model."""
        unedited = [record for metric in self.metrics for record in metric.unedited[0].records]
        return pair_answers({"before": unedited, "after": records})


def list_differences(after: ItemValues, before: ItemValues) -> tuple[float, ...]:
    """Return the change of each item, in the unit of the values, rounded to `DIGITS`."""
    return tuple(round(x, DIGITS) for x in (after.values.double() - before.values.double()).tolist())


def list_knockouts(context: StudyContext, use: str, options: Mapping[str, object]) -> Iterator[Knockout]:
    """Return a strategy's knockouts. Raises UserError for a strategy or option that does not exist."""
    entry = strategies[use]
    return entry.function(context, **strategies.check(use, dict(options)))


def _check_distinct(knockouts: Iterable[Knockout]) -> tuple[Knockout, ...]:
    """Return the knockouts. Raises UserError if two strategies name the same part."""
    by_name: dict[str, Knockout] = {}
    for knockout in knockouts:
        if knockout.component in by_name:
            raise UserError(f"study: two strategies knock out {knockout.component}; remove it from one of them")
        by_name[knockout.component] = knockout
    return tuple(by_name.values())


def batch_knockouts(knockouts: Sequence[Knockout], size: int = MIN_BATCH) -> list[list[Knockout]]:
    """Return the knockouts in batches of that size, by the lowest block that they change, embeddings first.

    The knockouts of a batch change neighboring blocks, so they share the cached pass through the blocks below.
    """
    ordered = sorted(knockouts, key=lambda knockout: knockout.layer)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
