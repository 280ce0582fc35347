"""Fit a plan's strengths and directions by gradient descent. The model's weights stay as they are."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from obliteratus.causal.early_stopping import EarlyStopping, draw_batch
from obliteratus.causal.interventions import Pair, compute_answer_logits
from obliteratus.causal.losses import ROWS_PER_PASS, ReferenceLogits
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note, progress
from obliteratus.core.settings import Tune
from obliteratus.core.shapes import Float
from obliteratus.core.types import Plan, Splits, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.cached_prompts import CachedPrompts
from obliteratus.inference.memory import free_memory
from obliteratus.judge.judge import Judge
from obliteratus.tune.gradient_memory import GradientMemory, plan_gradient_memory, recompute_blocks
from obliteratus.tune.objective import ZERO_LOSS, LossTerms, control_loss, target_loss
from obliteratus.tune.parameters import EditParameters
from obliteratus.tune.targets import TrainingPairs, collect_pairs

CHECK_EVERY = 5  # steps between two evaluations on held-out prompts; one of 48 prompts costs about two steps
HELD_OUT_PROMPTS = 24  # search prompts of each group to evaluate on: their mean varies by less than a step gains
MIN_LOSS_DROP = 1e-3  # nats: a smaller drop of the held-out loss counts as no progress
MIN_STRENGTH = 0.02  # an edit weaker than this changes no answer, and is dropped from the plan
FINAL_RATE_SHARE = 0.1  # the learning rate falls linearly to this share, and the noise of the steps with it
CACHE_SHARE = 0.25  # of the free memory, for cached prompts: the graph of a pass may take half


@dataclass(frozen=True)
class TunedPlan:
    """A plan fitted at one margin, and its loss terms on search prompts (see `LossTerms`)."""

    plan: Plan
    margin: float
    """Margin of the hinge loss, nats: the larger, the more thorough."""
    kl: float
    hinge: float
    drift: float
    nll: float
    steps: int
    """Steps taken at this margin."""


class TuningData:
    """What stays the same while a plan is fitted: the model, its own answers, and training and held-out pairs."""

    def __init__(
        self,
        subject: Subject,
        train: TrainingPairs,
        held_out: TrainingPairs,
        settings: Tune,
        memory: GradientMemory,
        seed: int = 0,
    ) -> None:
        self.subject, self.train, self.held_out = subject, train, held_out
        self.settings, self.memory, self.seed = settings, memory, seed
        self.reference = ReferenceLogits(subject)
        self.cached = CachedPairs(subject, [*train.control, *train.target, *held_out.control, *held_out.target])

    def iterate_losses(self, plan: Plan, pairs: TrainingPairs, margin: float) -> Iterator[LossTerms]:
        """Yield the loss of a few pairs at a time, weighted by their share, so that only one graph is held.

        Take gradients of each before asking for the next.
        """
        for chunk, share in self._chunks(pairs.control):
            base = self.reference.logp(chunk)
            with applied(self.subject, plan), recompute_blocks(self.subject, self.memory):
                yield control_loss(self.cached.logp(chunk), base, chunk, share)
        for chunk, share in self._chunks(pairs.target):
            base = self.reference.logp(chunk)
            with applied(self.subject, plan), recompute_blocks(self.subject, self.memory):
                yield target_loss(self.cached.logp(chunk), base, chunk, margin, share)

    @torch.no_grad()
    def evaluate(self, plan: Plan, margin: float) -> LossTerms:
        """Return the loss on the held-out pairs."""
        return sum(self.iterate_losses(plan, self.held_out, margin), ZERO_LOSS)

    def draw_batch(self, step: int) -> TrainingPairs:
        """Draw the pairs of a step. They depend on its number and the seed alone."""
        rng = random.Random(f"{self.seed} {step}")
        groups = (self.train.control, self.train.target)
        return TrainingPairs(*(draw_batch(pairs, self.settings.batch, rng) for pairs in groups))

    def _chunks(self, pairs: Sequence[Pair]) -> Iterator[tuple[Sequence[Pair], float]]:
        """Yield as many pairs as fit one pass, with their share of all pairs."""
        for start in range(0, len(pairs), self.memory.rows):
            chunk = pairs[start : start + self.memory.rows]
            yield chunk, len(chunk) / len(pairs)


class CachedPairs:
    """Log-probabilities of a fixed list of pairs under live edits. Blocks below the lowest edit run only once.

    Gradients reach all edits.
    """

    def __init__(self, subject: Subject, pairs: Sequence[Pair]) -> None:
        self.subject = subject
        self.row_of = {str(pair): i for i, pair in enumerate(pairs)}
        longest = max(len(answer) for _, answer in pairs)
        rows = [prompt + answer for prompt, answer in pairs]
        budget = CACHE_SHARE * free_memory(subject)
        self.cached = CachedPrompts(subject, rows, budget=budget, answers=(), leave=longest + 1)

    def logp(self, pairs: Sequence[Pair]) -> Float[Tensor, "tokens vocabulary"]:
        """Return the log-probabilities that predict the answers' tokens, all answers concatenated.

        Raises KeyError for a pair that is not in the list.
        """
        prompts = self.cached.prepare().select([self.row_of[str(pair)] for pair in pairs])
        return compute_answer_logits(self.subject, pairs, prompts=prompts).log_softmax(-1)


def tune_plan(
    subject: Subject, plan: Plan, splits: Splits, settings: Tune, seed: int = 0, judge: Judge | None = None
) -> Plan:
    """Return the plan with fitted strengths and directions. Ranks and anchors stay; weak edits are dropped.

    Gradient steps use fit prompts, and search prompts decide when to stop. If there are several margins, the plan of
    the last one is returned (`tune_all_margins` returns all). judge: says which answers show the behavior; None looks
    for refusals. Raises UserError if the plan cannot be fitted.
    """
    return tune_all_margins(subject, plan, splits, settings, seed, judge or Judge())[-1].plan


def tune_all_margins(
    subject: Subject, plan: Plan, splits: Splits, settings: Tune, seed: int, judge: Judge
) -> list[TunedPlan]:
    """Return a plan for each of ``settings.margins``, each fitted from the best plan of the margin before it."""
    parameters = EditParameters(plan, subject.device, settings.what)
    data = make_tuning_data(subject, plan, splits, settings, seed, judge)
    plans, step = list[TunedPlan](), 0
    for margin in settings.margins:
        tuned = fit_margin(data, parameters, margin, step)
        plans.append(tuned)
        step += tuned.steps
        note(
            "TUNE",
            f"margin {margin}: {tuned.steps} steps; on search prompts KL {tuned.kl:.3f}, drift {tuned.drift:.3f}, "
            f"openings {tuned.nll:.2f} nats and {tuned.hinge:.3f} nats short of the margin; "
            f"{len(tuned.plan.edits)} edits",
        )
    return plans


def make_tuning_data(
    subject: Subject, plan: Plan, splits: Splits, settings: Tune, seed: int, judge: Judge
) -> TuningData:
    """Generate the answers of fit and search prompts, and plan how many pairs fit a pass."""
    train = collect_pairs(subject, splits.fit, plan, settings, settings.prompts, judge)
    held_out = collect_pairs(subject, splits.search, plan, settings, HELD_OUT_PROMPTS, judge)
    first = max(0, min(change.site.layer for change in plan.edits))
    everything = [*train.control, *train.target, *held_out.control, *held_out.target]
    memory = plan_gradient_memory(subject, everything, first, ROWS_PER_PASS)
    return TuningData(subject, train, held_out, settings, memory, seed)


def fit_margin(data: TuningData, parameters: EditParameters, margin: float, steps_before: int) -> TunedPlan:
    """Take steps at one margin until the held-out loss stops falling, and return the plan with the least loss.

    The parameters end at that plan. steps_before: steps taken at earlier margins, so that the sequence of batches
    continues.
    """
    settings = data.settings
    optimizer = torch.optim.Adam(parameters.groups(settings.lr))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, FINAL_RATE_SHARE, settings.steps)
    start = data.evaluate(parameters.to_plan(MIN_STRENGTH), margin)
    stopping = EarlyStopping((parameters.state(), start), float(start.total(settings)), MIN_LOSS_DROP, CHECK_EVERY)
    with progress("TUNE", settings.steps) as advance:
        for stopping.steps in range(1, settings.steps + 1):
            take_step(data, parameters, optimizer, margin, steps_before + stopping.steps)
            schedule.step()
            advance(1)
            if stopping.should_check(settings.steps):
                loss = data.evaluate(parameters.to_plan(MIN_STRENGTH), margin)
                stopping.update((parameters.state(), loss), float(loss.total(settings)))
            if stopping.stalled_steps >= settings.patience:
                break
    state, loss = stopping.best
    parameters.restore(state)
    terms = {name: float(value) for name, value in vars(loss).items()}
    return TunedPlan(parameters.to_plan(MIN_STRENGTH), margin, steps=stopping.steps, **terms)


def take_step(
    data: TuningData, parameters: EditParameters, optimizer: torch.optim.Optimizer, margin: float, step: int
) -> None:
    """Take one gradient step. Raises UserError if a parameter becomes NaN or Inf."""
    settings = data.settings
    optimizer.zero_grad()
    if settings.sparsity and settings.what != "directions":
        (settings.sparsity * parameters.mean_strength()).backward()
    for loss in data.iterate_losses(parameters.to_live_plan(), data.draw_batch(step), margin):
        loss.total(settings).backward(retain_graph=True)  # all parts share the small graph of the parameters
    optimizer.step()
    if not parameters.finite():
        raise UserError("tune: the plan's parameters became NaN or Inf; lower tune.lr")
