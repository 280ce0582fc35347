"""Measures parts one after the other on one loaded model: one baseline, live edits, lower blocks run once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter
from typing import Any

import torch
from torch import nn

from obliteratus.core.errors import UserError
from obliteratus.core.results import Score
from obliteratus.core.types import Plan, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.live.hooks_per_row import applied_per_row
from obliteratus.inference.batching import tokens_per_batch
from obliteratus.inference.generate import MAX_ROWS
from obliteratus.inference.memory import free_memory, trim_heap
from obliteratus.study.base import Knockout, KnockoutResult, StudyContext, strategies
from obliteratus.study.material import material
from obliteratus.study.metrics import Meter, MeterInputs, Values, compare_scores, metrics, on
from obliteratus.study.settings import Study

# Of the memory that is free, what meters may keep of the lower blocks, all together; passes get as much at most.
KEPT = 0.4
# Specs measured before their results are written down: what a kill can lose, and what lanes wait for at the end. Where
# prompts are few, so many more that they fill a step of answering.
LEAST, MOST = 4, 16


@dataclass(eq=False)
class Engine:
    """A loaded model, what a study measures it on, and the parts that it knocks out."""

    subject: Subject
    made: Study
    given: MeterInputs
    specs: tuple[Knockout, ...]

    @classmethod
    def of(cls, subject: Subject, made: Study) -> Engine:
        """Raises UserError for a strategy that has nothing to knock out in this model."""
        texts, prompts, questions = material(subject, made)
        room = KEPT * free_memory(subject) / len(made.metrics)
        given, ground = MeterInputs(subject, texts, prompts, questions, room), StudyContext(subject, texts, made.seed)
        with tokens_per_batch(made.batch):
            specs = _once(spec for step in made.strategies for spec in list_knockouts(ground, step.use, step.options))
        return cls(subject, made, given, specs)

    def lane(self) -> Engine:
        """The same study on the same weights, for another thread: edits of its own, and this one's baseline."""
        subject = replace(self.subject, model=twin(self.subject.model))
        other = Engine(subject, self.made, replace(self.given, subject=subject), self.specs)
        other.base, other.meters = self.base, tuple(on(meter, subject) for meter in self.meters)
        return other

    def chunks(self) -> list[list[Knockout]]:
        """What is measured together: as many parts as fill a step with answers to the prompts."""
        prompts = 0 if self.given.prompts is None else sum(map(len, self.given.prompts.groups.values()))
        return chunks(self.specs, min(MOST, max(LEAST, MAX_ROWS // prompts)) if prompts else LEAST)

    @cached_property
    def meters(self) -> tuple[Meter, ...]:
        """One for each metric, made when the first is read."""
        steps = self.made.metrics
        return tuple(metrics[s.use].function(self.given, **metrics.check(s.use, s.options)) for s in steps)

    @cached_property
    def base(self) -> Values:
        """What the meters say of the model as it is."""
        with self._passes():
            return {name: values for meter in self.meters for name, values in meter.measure(1)[0].items()}

    @contextmanager
    def _passes(self) -> Iterator[None]:
        with torch.inference_mode(), tokens_per_batch(self.made.batch):
            yield

    def baseline(self) -> KnockoutResult:
        """The model as it is."""
        start = perf_counter()
        scores = {name: compare_scores(name, values, values)[0] for name, values in self.base.items()}
        return KnockoutResult(scores=scores, seconds=round(perf_counter() - start, 3))

    def measure(self, specs: Sequence[Knockout]) -> list[KnockoutResult]:
        """These parts, each knocked out by itself; where prompts are few, they share passes."""
        start = perf_counter()
        with self._passes():
            found = [measured(self.subject, meter, specs) for meter in self.meters]
        trim_heap()  # each lane's thread has a heap of its own, which else grows by what it cannot fill
        seconds = round((perf_counter() - start) / len(specs), 3)
        return [self._result(spec, [by_spec[i] for by_spec in found], seconds) for i, spec in enumerate(specs)]

    def _result(self, spec: Knockout, found: Sequence[Values], seconds: float) -> KnockoutResult:
        scores: dict[str, Score] = {}
        change: dict[str, Score] = {}
        for name, values in ((name, values) for one in found for name, values in one.items()):
            scores[name], change[name] = compare_scores(name, values, self.base[name])
        fields = {key: value for key, value in vars(spec).items() if key != "plan"}
        return KnockoutResult(**fields, scores=scores, change=change, seconds=seconds)


def shareable(subject: Subject) -> bool:
    """Whether a twin of the model computes as it does: on a CPU, with nothing but plain weights in memory."""
    held = all(type(p) is nn.Parameter and p.device.type == "cpu" for p in subject.model.parameters())
    return held and not any("_hf_hook" in vars(module) for module in subject.model.modules())


def twin(model: Any) -> Any:
    """The same modules over the same parameters and buffers: hooks on one are not on the other."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return deepcopy(model, shared)


def _once(specs: Iterable[Knockout]) -> tuple[Knockout, ...]:
    """All of them. Raises UserError where two strategies name the same part."""
    found: dict[str, Knockout] = {}
    for spec in specs:
        if spec.component in found:
            raise UserError(f"study: strategies name {spec.component} twice; let them name different parts")
        found[spec.component] = spec
    return tuple(found.values())


def list_knockouts(ground: StudyContext, use: str, options: Mapping[str, object]) -> Iterator[Knockout]:
    """What a strategy yields. Raises UserError for a strategy or option that does not exist."""
    entry = strategies[use]
    return entry.function(ground, **strategies.check(use, dict(options)))


def chunks(specs: Sequence[Knockout], size: int = LEAST) -> list[list[Knockout]]:
    """So many at once, by the lowest block that they change, from the embeddings up: those of one chunk begin near each
    other, and what is kept of lower blocks grows from block to block."""
    ordered = sorted(specs, key=lambda spec: spec.layer)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def measured(subject: Subject, meter: Meter, specs: Sequence[Knockout]) -> list[Values]:
    """What a meter says of each part, several in one pass where that fills it."""
    most = max(1, MAX_ROWS // meter.rows) if meter.together else 1
    parts = [[spec.plan for spec in specs[i : i + most]] for i in range(0, len(specs), most)]
    return [values for plans in parts for values in _together(subject, meter, plans)]


def _together(subject: Subject, meter: Meter, plans: Sequence[Plan]) -> list[Values]:
    if len(plans) == 1:
        with applied(subject, plans[0]):
            return meter.measure(1)
    of_row = [i for i in range(len(plans)) for _ in range(meter.rows)]
    with applied_per_row(subject, plans, of_row):
        return meter.measure(len(plans))
