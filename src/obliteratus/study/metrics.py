"""The metrics of a study: VERIFY's scorers, run on cached prompts under each knockout and paired with the baseline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from obliteratus.core.settings import Step
from obliteratus.core.shapes import Float
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.live.hooks_per_row import applied_per_row
from obliteratus.inference.cached_prompts import CachedPrompts
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.generate import MAX_ROWS, IsDone
from obliteratus.judge.judge import Judge
from obliteratus.study.data import StudyData
from obliteratus.verify import ItemValues, Measurement, ScorerContext, scorers

# 16 texts of 128 tokens fill four batches already, so the plans of one pass would only wait for each other.
ONE_PLAN_PER_PASS = frozenset({"perplexity"})
# nats: what counts where a model's outputs are not finite. No loss or KL of a working model comes near it, since a
# uniform distribution over 50 000 tokens is about 11 away.
WORST = 100.0

Items = Mapping[str, ItemValues]
"""Per-item values by score name."""
Records = Sequence[Mapping[str, Any]]
"""What a scorer keeps of each answer."""


class SharedPasses:
    """Cached prompts of one scorer, whose passes all plans that are live at once share.

    The first time that a scorer asks for outputs it runs the passes for all plans; then each plan reads its own rows.
    """

    def __init__(self, subject: Subject, budget: float) -> None:
        """budget: bytes that may be cached of what the blocks below the knockouts compute."""
        self.subject, self.budget = subject, budget
        self.cached: CachedPrompts | None = None
        self.rows = 0
        self.begin(1)

    def begin(self, plans: int) -> None:
        """Forget the outputs, because that many other plans are live now."""
        self.plans, self.plan = plans, 0
        self.outputs: Any = None

    def bytes_cached(self) -> int:
        """Return the bytes of what is cached now."""
        return 0 if self.cached is None else self.cached.layers.bytes_held()

    def read(self, ids: Ids, run: Callable[[CachedPrompts], Any], *, answers: bool = False, prefix: bool = True) -> Any:
        """Return the current plan's rows of what ``run`` returns for the rows of all plans.

        answers: whether the rows are to be answered, which needs keys and values. prefix: whether a shared prefix may
        be cut off the rows.
        """
        if self.cached is None:
            self.rows = len(ids)
            self.cached = CachedPrompts(
                self.subject,
                ids,
                budget=self.budget,
                answers=None if answers else (),
                leave=1 if prefix else max(map(len, ids)),
                depths=range(1, self.subject.n_layers),
            )
        if self.outputs is None:
            self.outputs = run(self.cached.repeat(self.plans))
        return self.outputs[self.rows * self.plan : self.rows * (self.plan + 1)]


@dataclass(frozen=True)
class SharedContext(ScorerContext):
    """A scorer's context whose outputs come from shared passes over cached prompts."""

    passes: SharedPasses | None = None

    def _read(self, ids: Ids, run: Callable[[CachedPrompts], Any], **options: bool) -> Any:
        assert self.passes is not None
        return self.passes.read(ids, run, **options)

    def first_tokens(self, ids: Ids) -> Float[Tensor, "rows vocabulary"]:
        logp: Tensor = self._read(ids, lambda cached: cached.first_token())
        return logp

    def losses(self, ids: Ids, title: str) -> list[Tensor]:
        # in fp64, so that the mean of a text is
        losses: list[Tensor] = self._read(ids, lambda cached: [x.double() for x in cached.losses()], prefix=False)
        return losses

    def answers(
        self, ids: Ids, tokens: int, done: IsDone, wanted: Sequence[int]
    ) -> tuple[Ids, Float[Tensor, "k vocab"]]:
        answers: Ids = self._read(ids, lambda cached: cached.generate(tokens, done=done), answers=True)
        return answers, torch.empty(0, 0)


class Metric:
    """One scorer on the study's data."""

    def __init__(self, subject: Subject, data: StudyData, step: Step, budget: float, judge: Judge) -> None:
        """budget: bytes that may be cached of what the blocks below the knockouts compute."""
        self.passes = SharedPasses(subject, budget)
        prompts = data.prompts or PromptSet({})
        self.context = SharedContext(
            subject, prompts, texts=data.texts, questions=data.questions, judge=judge, passes=self.passes
        )
        self.scorer = partial(scorers[step.use].function, **scorers.check(step.use, step.options))
        self.one_plan = step.use in ONE_PLAN_PER_PASS

    @cached_property
    def unedited(self) -> tuple[Measurement, Items]:
        """The unedited model's measurement, and its values where the scorer compares it with itself."""
        self.passes.begin(1)
        measured: Measurement = self.scorer(self.context)
        items, _ = self._score(measured)
        self.passes.begin(1)
        return measured, items

    def measure(self, plans: Sequence[Plan]) -> list[tuple[Items, Records]]:
        """Return values and records under each plan by itself; as many plans as fill a pass are measured in one."""
        unedited, _ = self.unedited
        size = 1 if self.one_plan else max(1, MAX_ROWS // self.passes.rows)
        return [found for i in range(0, len(plans), size) for found in self._measure(plans[i : i + size], unedited)]

    def _measure(self, plans: Sequence[Plan], unedited: Measurement) -> list[tuple[Items, Records]]:
        measured = []
        with self._applied(plans):
            self.passes.begin(len(plans))
            for plan in range(len(plans)):
                self.passes.plan = plan
                measured.append(self._score(unedited))
        self.passes.begin(1)  # frees the outputs
        return measured

    def _score(self, unedited: Measurement) -> tuple[Items, Records]:
        measured: Measurement = self.scorer(replace(self.context, before=unedited))
        return {name: bound_values(item) for name, item in measured.items.items()}, measured.records

    def _applied(self, plans: Sequence[Plan]) -> AbstractContextManager[None]:
        if len(plans) == 1:
            return applied(self.context.subject, plans[0])
        plan_of_row = [plan for plan in range(len(plans)) for _ in range(self.passes.rows)]
        return applied_per_row(self.context.subject, plans, plan_of_row)


def bound_values(item: ItemValues) -> ItemValues:
    """Return the values with NaN, infinity and all above `WORST` replaced by it; shares stay as they are."""
    if item.unit == "share":
        return item
    return replace(item, values=item.values.nan_to_num(nan=WORST, posinf=WORST).clamp(max=WORST))
