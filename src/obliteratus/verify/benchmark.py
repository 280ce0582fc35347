"""The benchmark scorer: tasks of lm-evaluation-harness, with the change of each metric paired item by item."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import log, nan
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from obliteratus.benchmark.questions import count_questions
from obliteratus.benchmark.tasks import find_folders, load_tasks, split_names
from obliteratus.core.cost import Cost, constant
from obliteratus.core.registry import RunInputs
from obliteratus.core.results import Score
from obliteratus.verify.scoring import ItemValues, Measurement, ScorerContext, scorers

if TYPE_CHECKING:
    from obliteratus.benchmark.run import MetricValues, TaskResults

PREFIX = "benchmark"
"""What the names of all its scores begin with: ``benchmark.TASK.METRIC``, with ``.FILTER`` where a task has several."""
CHOICES, UNKNOWN = 4, 1000  # choices of an item, and items of a task that is not ours: usual numbers, for a forecast
Items = Mapping[str, ItemValues]


def _check_tasks(options: Mapping[str, Any], given: RunInputs) -> None:
    """Raise UserError, before any weight is loaded, for tasks that do not exist."""
    find_folders(split_names(options["tasks"]), options["include"])


def _estimate_cost(options: Mapping[str, Any]) -> Cost:
    """One text per choice. How many items other tasks than ours have is known only with their data."""
    items = [count_questions(name, UNKNOWN) for name in split_names(options["tasks"])]
    return Cost(texts=constant(CHOICES * sum(min(n, options["limit"] or n) for n in items)))


@scorers.register(PREFIX, cite="EleutherAI lm-evaluation-harness", fits=_check_tasks, cost=_estimate_cost)
def benchmark(
    context: ScorerContext,
    *,
    tasks: tuple[str, ...] = ("arithmetic", "reading"),
    shots: Annotated[int | None, Field(ge=0)] = None,
    limit: Annotated[int | None, Field(ge=1)] = None,
    chat: bool = False,
    system: str = "",
    include: str = "",
) -> Measurement:
    """Score tasks of lm-evaluation-harness, such as ``benchmark.arithmetic.acc``, each with its change.

    tasks: names; ``arithmetic`` and ``reading`` come with this package, and the data of others are fetched from the
    hub. shots: worked examples before each item; by default the task's own number. limit: most items of each task.
    chat: whether the chat template is applied. system: text of a system turn. include: folder with further tasks.
    Needs the extra `bench`. Raises UserError for tasks that cannot be run.
    """
    loaded = load_tasks(split_names(tasks), include, shots)
    from obliteratus.benchmark.run import AskingStyle, run_tasks

    return to_measurement(run_tasks(context.subject, loaded, AskingStyle(chat, system, limit)), context.before)


def to_measurement(results: TaskResults, before: Measurement | None = None) -> Measurement:
    """Return scores and items of all metrics, and with the unedited model's measurement their changes."""
    scores: dict[str, Score] = {}
    items: dict[str, ItemValues] = {}
    for values in results.metrics:
        name = name_metric(values)
        own = to_items(values)
        if own is None:
            scores[name] = Score(value=values.value, low=nan, high=nan, n=count_items(values), unit="mean")
        else:
            items[name], scores[name] = own, own.score()
    changes = {} if before is None else {f"{name}.change": change_of(name, scores, items, before) for name in scores}
    return Measurement(scores | changes, items=items)


def name_metric(values: MetricValues) -> str:
    """Return the name of a metric's score."""
    kind = "" if values.filter == "none" else f".{values.filter}"
    return f"{PREFIX}.{values.task}.{values.metric}{kind}"


def count_items(values: MetricValues) -> int:
    """Return how many items a metric rests on; 0 for a group whose tasks weigh alike."""
    return len(values.items)


def change_of(name: str, scores: Mapping[str, Score], items: Items, before: Measurement) -> Score:
    """Return a metric's change, paired item by item, or without an interval where the harness keeps no such values."""
    base = before.items.get(name)
    if name in items and base is not None:
        own = items[name]
        if own.unit != base.unit:  # all of one side's values are 0 or 1, and not all of the other's
            own, base = replace(own, unit="mean"), replace(base, unit="mean")
        return own.change(base)
    score = scores[name]
    return Score(value=score.value - before.scores[name].value, low=nan, high=nan, n=score.n, unit="mean")


# --------------------------------------------------------------------------------------------- values of items
def to_items(values: MetricValues) -> ItemValues | None:
    """Return a number for each item whose mean is the metric (of a perplexity: its logarithm), or None.

    None is for metrics of a whole task, such as F1 over classes or BLEU, and for groups whose tasks weigh alike.
    """
    convert = CONVERTERS.get(values.aggregate.__name__)
    return convert(values.items) if convert is not None and values.items else None


def _convert_mean(items: Sequence[Any]) -> ItemValues | None:
    if not all(isinstance(item, int | float) for item in items):  # numpy's float64 is a float too
        return None
    numbers = torch.tensor([float(item) for item in items], dtype=torch.float64)
    return ItemValues(numbers, "share" if bool(((numbers == 0) | (numbers == 1)).all()) else "mean")


def _convert_perplexity(items: Sequence[float]) -> ItemValues:
    return ItemValues(-torch.tensor(items, dtype=torch.float64), "perplexity")


def _convert_weighted(items: Sequence[tuple[float, int]]) -> ItemValues:
    """From log-likelihoods and numbers of words. A text counts by its words, which no edit changes."""
    likelihoods, words = torch.tensor(items, dtype=torch.float64).T
    return ItemValues(-likelihoods * len(items) / words.sum(), "perplexity")


def _convert_bits(items: Sequence[tuple[float, int]]) -> ItemValues:
    return ItemValues(_convert_weighted(items).values / log(2), "mean")


CONVERTERS: Mapping[str, Callable[[Any], ItemValues | None]] = {
    "mean": _convert_mean,
    "_mean": _convert_mean,
    "perplexity": _convert_perplexity,
    "weighted_perplexity": _convert_weighted,
    "bits_per_byte": _convert_bits,
}
"""By the name of the harness's function that makes the metric from its items."""
