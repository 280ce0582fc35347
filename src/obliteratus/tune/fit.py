"""TUNE: a plan's strengths and directions fitted by gradients, the weights left alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from obliteratus.causal.early_stopping import EarlyStopping, draw_batch
from obliteratus.causal.interventions import Pair
from obliteratus.causal.losses import ROWS, ReferenceLogits
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note, progress
from obliteratus.core.settings import Tune
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.tune.memory import GradientMemory, plan_gradient_memory, recompute_blocks
from obliteratus.tune.objective import NO_PULL, LossTerms, control_loss, target_loss
from obliteratus.tune.parameters import EditParameters
from obliteratus.tune.prefix import CachedPairs
from obliteratus.tune.targets import TrainingPairs, collect_pairs

EVERY = 5  # steps between two looks at what no step sees: a look at 48 prompts costs about two steps
HELD = 24  # search prompts of each group that are looked at: their mean moves by less than a step's gain
FALLING = 1e-3  # nats: a loss on them that fell by less stands still
WEAK = 0.02  # an edit weaker than this moves no answer, and is dropped from the plan
SLOWEST = 0.1  # the rate falls in a line to this share of itself: what is left of a step's noise falls with it


@dataclass(frozen=True)
class FrontPoint:
    """A plan on the way from gentle to thorough, and what search prompts say of it: see `LossTerms`."""

    plan: Plan
    lead: float
    """Of the hinge, nats: the larger, the more thorough."""
    kl: float
    hinge: float
    drift: float
    nll: float
    steps: int
    """Made at this lead."""


class TuningData:
    """All that stays the same while a plan is fitted: the model, its own answers, and the prompts of both kinds."""

    def __init__(
        self, subject: Subject, fit: TrainingPairs, held: TrainingPairs, how: Tune, room: GradientMemory, seed: int = 0
    ) -> None:
        self.subject, self.fit, self.held, self.how, self.room, self.seed = subject, fit, held, how, room, seed
        self.own = ReferenceLogits(subject)
        self.stem = CachedPairs(subject, [*fit.control, *fit.target, *held.control, *held.target])

    def parts(self, plan: Plan, pairs: TrainingPairs, lead: float) -> Iterator[LossTerms]:
        """The pulls of some prompts at a time, by their share: one graph is all that is ever held.

        Gradients must be taken before the next part is asked for.
        """
        for some, share in self._shares(pairs.control):
            base = self.own.logp(some)
            with applied(self.subject, plan), recompute_blocks(self.subject, self.room):
                yield control_loss(self.stem.logp(some), base, some, share)
        for some, share in self._shares(pairs.target):
            base = self.own.logp(some)
            with applied(self.subject, plan), recompute_blocks(self.subject, self.room):
                yield target_loss(self.stem.logp(some), base, some, lead, share)

    @torch.no_grad()
    def looked(self, plan: Plan, lead: float) -> LossTerms:
        """The whole pull on search prompts."""
        return sum(self.parts(plan, self.held, lead), NO_PULL)

    def batch(self, step: int) -> TrainingPairs:
        """The prompts of a step, from its number and the seed alone."""
        rng = random.Random(f"{self.seed} {step}")
        return TrainingPairs(*(draw_batch(pairs, self.how.batch, rng) for pairs in (self.fit.control, self.fit.target)))

    def _shares(self, pairs: Sequence[Pair]) -> Iterator[tuple[Sequence[Pair], float]]:
        for first in range(0, len(pairs), self.room.rows):
            some = pairs[first : first + self.room.rows]
            yield some, len(some) / len(pairs)


def tune_plan(subject: Subject, plan: Plan, fit: PromptSet, search: PromptSet, how: Tune, seed: int = 0) -> Plan:
    """The plan with strengths and directions fitted; its rank, sites and anchors stay, sites may drop out.

    Steps see fit prompts, and stop by search prompts. Of several leads the last, most thorough one is taken
    (`tune_front` gives all). Raises UserError where the plan cannot be fitted.
    """
    return tune_front(subject, plan, fit, search, how, seed)[-1].plan


def tune_front(
    subject: Subject, plan: Plan, fit: PromptSet, search: PromptSet, how: Tune, seed: int = 0
) -> list[FrontPoint]:
    """A plan for each of ``how.leads``, gentle to thorough, each begun where the one before it was best."""
    knobs = EditParameters(plan, subject.device, how.what)
    bench = make_tuning_data(subject, plan, fit, search, how, seed)
    points, step = [], 0
    for lead in how.leads:
        points.append(_point(bench, knobs, lead, step))
        last = points[-1]
        step += last.steps
        note(
            "TUNE",
            f"lead {lead}: {last.steps} steps, on search prompts KL {last.kl:.3f}, drift {last.drift:.3f}, "
            f"openings {last.nll:.2f} nats, {last.hinge:.3f} nats short of the lead; {len(last.plan.edits)} edits",
        )
    return points


def make_tuning_data(
    subject: Subject, plan: Plan, fit: PromptSet, search: PromptSet, how: Tune, seed: int
) -> TuningData:
    """The material of both parts, answered by the model, and how much of it fits a pass."""
    seen = collect_pairs(subject, fit, plan, how.tokens, how.prompts)
    held = collect_pairs(subject, search, plan, how.tokens, HELD)
    first = max(0, min(change.site.layer for change in plan.edits))
    both = [*seen.control, *seen.target, *held.control, *held.target]
    return TuningData(subject, seen, held, how, plan_gradient_memory(subject, both, first, ROWS), seed)


def _point(bench: TuningData, knobs: EditParameters, lead: float, before: int) -> FrontPoint:
    """Steps at one lead until the pull on search prompts stands still; the plan with the least of it.

    before: steps made at earlier leads, so that batches go on.
    """
    how = bench.how
    optimiser = torch.optim.Adam(knobs.groups(how.lr))
    falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, SLOWEST, how.steps)
    first = bench.looked(knobs.fixed(WEAK), lead)
    found = EarlyStopping((knobs.state(), first), float(first.total(how)), FALLING, EVERY)
    with progress("TUNE", how.steps) as advance:
        for found.used in range(1, how.steps + 1):
            _step(bench, knobs, optimiser, lead, before + found.used)
            falling.step()
            advance(1)
            if found.looks(how.steps):
                now = bench.looked(knobs.fixed(WEAK), lead)
                found.judge((knobs.state(), now), float(now.total(how)))
            if found.still >= how.patience:
                break
    knobs.restore(found.best[0])
    told = {name: float(value) for name, value in vars(found.best[1]).items()}
    return FrontPoint(knobs.fixed(WEAK), lead, steps=found.used, **told)


def _step(bench: TuningData, knobs: EditParameters, optimiser: torch.optim.Optimizer, lead: float, step: int) -> None:
    optimiser.zero_grad()
    if bench.how.sparsity and bench.how.what != "directions":
        (bench.how.sparsity * knobs.size()).backward()
    for part in bench.parts(knobs.live(), bench.batch(step), lead):
        part.total(bench.how).backward(retain_graph=True)  # the knobs' own small graph is common to all parts
    optimiser.step()
    if not knobs.finite():
        raise UserError("tune: the plan's numbers are none any more (NaN or Inf); lower tune.lr")
