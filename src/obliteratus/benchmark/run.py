"""Run tasks on a model as it is edited now, and take the harness's results apart into values of items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lm_eval.api.task
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.evaluator import evaluate

from obliteratus.benchmark.language_model import HarnessModel
from obliteratus.benchmark.tasks import LoadedTasks
from obliteratus.core.errors import UserError
from obliteratus.core.types import Subject


@dataclass(frozen=True)
class AskingStyle:
    """How items are put to the model, in the harness's own terms."""

    chat: bool = False
    """Whether contexts are rendered as turns by the model's chat template (``--apply_chat_template``)."""
    system: str = ""
    """Text of a system turn, or before the context without a template (``--system_instruction``)."""
    limit: int | None = None
    """Most items of each task; None takes all."""


@dataclass(frozen=True)
class MetricValues:
    """One metric of one task, or of a group of tasks."""

    task: str
    metric: str
    filter: str
    """Which reading of the answers was scored; ``none`` if there is only one."""
    value: float
    """What the harness reports."""
    aggregate: Callable[..., float]
    """How the harness makes it from the items."""
    items: tuple[Any, ...]
    """What each item contributes, in the task's order; empty for a group whose tasks weigh alike."""
    higher_is_better: bool = True


@dataclass(frozen=True)
class TaskResults:
    """What tasks gave for one state of a model."""

    metrics: tuple[MetricValues, ...]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    """By task, the harness's record of each item and filter."""


def run_tasks(subject: Subject, tasks: LoadedTasks, style: AskingStyle = AskingStyle()) -> TaskResults:
    """Return the results of the tasks. The same seeds give every state of a model the same worked examples.

    Raises UserError where an item cannot be put to this model, or does not fit into memory.
    """
    for task in tasks.tasks.values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    try:
        with _without_bars():
            found: Any = evaluate(
                HarnessModel(subject),
                tasks.loaded,
                limit=style.limit,
                bootstrap_iters=0,  # intervals are ours
                system_instruction=style.system or None,
                apply_chat_template=style.chat,
                fewshot_as_multiturn=True,
            )
    except torch.OutOfMemoryError as error:  # batches were halved down to one row before
        raise UserError(
            f"{subject.source.id}: a single item of {', '.join(tasks.names)} does not fit into the memory "
            "that is left; leave the task with the longest items out, or load the model with --quantize"
        ) from error
    return TaskResults(tuple(_read_metrics(tasks, found)), found["samples"])


@contextmanager
def _without_bars() -> Iterator[None]:
    """Leave out the harness's bars over the building of contexts, which no option of it turns off."""
    bar = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = lambda rows, **options: rows
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar


def _read_metrics(tasks: LoadedTasks, found: Mapping[str, Any]) -> Iterator[MetricValues]:
    by_key: dict[tuple[str, str, str], MetricValues] = {}
    for name, task in tasks.tasks.items():
        aggregations, better = task.aggregation(), task.higher_is_better()
        for metric, kind, values in _collect_items(found["samples"][name]):
            value = float(found["results"][name][f"{metric},{kind}"])
            aggregate = aggregations.get(metric, _mean)
            by_key[name, metric, kind] = MetricValues(
                name, metric, kind, value, aggregate, values, bool(better.get(metric, True))
            )
    yield from by_key.values()
    for group in tasks.loaded["groups"].values():
        yield from _read_group(group, found, by_key)


def _mean(items: Sequence[float]) -> float:
    return sum(items) / len(items)


def _collect_items(samples: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Yield each metric and filter of a task with the values of its items."""
    keys = dict.fromkeys((metric, sample["filter"]) for sample in samples for metric in sample["metrics"])
    for metric, kind in keys:
        yield metric, kind, tuple(s[metric] for s in samples if s["filter"] == kind and metric in s)


def _read_group(
    group: Any, found: Mapping[str, Any], by_key: Mapping[tuple[str, str, str], MetricValues]
) -> Iterator[MetricValues]:
    """Yield the metrics of a group. Its items are those of its tasks if it weighs tasks by their size."""
    results = found.get("groups", {}).get(group.name, {})
    leaves = [task.task_name for task in group.get_all_tasks()]
    for wanted in group.aggregate_metric_list or ():
        for key in results:
            metric, _, kind = key.partition(",")
            own = [by_key[name, metric, kind] for name in leaves if (name, metric, kind) in by_key]
            if metric != wanted.metric or not kind or not own:
                continue
            items = tuple(item for values in own for item in values.items) if wanted.weight_by_size else ()
            yield MetricValues(
                group.name, metric, kind, float(results[key]), own[0].aggregate, items, own[0].higher_is_better
            )
