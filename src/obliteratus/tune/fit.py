"""Fit a plan's strengths and directions by gradient descent. The model's weights stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from obliteratus.causal.losses import ROWS_PER_PASS
from obliteratus.core.errors import NothingToFitError, UserError
from obliteratus.core.progress import note, progress
from obliteratus.core.settings import Tune
from obliteratus.core.types import Edit, Plan, Splits, Subject
from obliteratus.judge.judge import Judge
from obliteratus.tune.balance import balance_plan
from obliteratus.tune.front import Tuned, TunedPlan, find_front
from obliteratus.tune.gradient_memory import plan_gradient_memory
from obliteratus.tune.parameters import EditParameters
from obliteratus.tune.search_check import SearchCheck
from obliteratus.tune.targets import TrainingPairs, collect_pairs
from obliteratus.tune.tuning_data import TuningData
from obliteratus.tune.weakest import MIN_STRENGTH, add_margin, find_weakest

CHECK_EVERY = 10  # steps between two looks at search prompts, which cost about six steps
HELD_OUT_PROMPTS = 24  # search prompts of each group for the loss: their mean varies by less than a step gains
MIN_COST_DROP = 1e-3  # nats: a plan that costs less by a smaller amount is no better
FINAL_RATE_SHARE = 0.1  # the learning rate falls linearly to this share, and the noise of the steps with it
# Factors on the weight of openings after a look that finds too much of the behavior left, and after one that does not:
# it rises faster than it falls, since plans above the goal are of no use.
RISE, FALL = 2.0, 0.7
WEIGHTS = (0.25, 64.0)  # least and most: beyond, one of the two losses decides alone
SCALES = (0.85, 0.7, 0.55, 0.4)  # factors on all strengths, from thorough to gentle
STRONGER = (1.15, 1.3)  # where the goal was not reached
STAYS = "the strengths stay as EXCISE set them"


def tune_plan(
    subject: Subject,
    plan: Plan,
    splits: Splits,
    settings: Tune,
    seed: int = 0,
    judge: Judge | None = None,
    goal: float = 0.0,
) -> Tuned:
    """Return the plan with fitted strengths and directions, and the front from gentle to thorough.

    Ranks and anchors stay; weak edits are dropped. Gradient steps use fit prompts. Search prompts are answered every
    few steps: while more than ``goal`` of them show the behavior, openings weigh more, and else less. The result is the
    cheapest plan that reaches the goal without more loops, or else the one that comes closest. judge: says which
    answers show the behavior; None looks for refusals. Raises UserError if the plan cannot be fitted.
    """
    judge = judge or Judge()
    check = SearchCheck(subject, splits.search, judge, max(settings.watch, settings.tokens))
    try:
        data = make_tuning_data(subject, plan, splits, settings, seed, judge)
    except NothingToFitError:
        if settings.steps:
            raise
        note("TUNE", f"every answer to a target prompt shows {judge.name}; {STAYS}")
        return find_weakest(check, plan, goal)
    if settings.balance:
        plan = balance_or_keep(data, plan, judge.name)
    if not settings.steps:
        return find_weakest(check, plan, goal)
    fit = Fit(data, EditParameters(plan, subject.device, settings.what), check, goal)
    points = fit.take_steps()
    points += fit.scale_best(points)
    weakest = fit.choose(points)
    best = add_margin(weakest, lambda scale: fit.look(weakest.steps, scale), fit.excess)
    front = find_front([*points, best])
    note("TUNE", describe_choice(best, front, judge.name))
    return Tuned(best.plan, front)


def balance_or_keep(data: TuningData, plan: Plan, behavior: str) -> Plan:
    """Return the plan with balanced strengths; as it is, with a note, if no edit weakens the behavior."""
    balanced = balance_plan(data, plan)
    if balanced is None:
        note("TUNE", f"to first order no edit weakens {behavior}; {STAYS}")
    return balanced or plan


def describe_choice(best: TunedPlan, front: Sequence[TunedPlan], name: str) -> str:
    """Return what is said of the plan that was chosen, and how far the front reaches."""
    first, last = front[0].checked, front[-1].checked
    others = (
        f"; {len(front)} plans are saved, from {first.rate:.1%} at {first.kl:.4f} to {last.rate:.1%} at {last.kl:.4f}"
    )
    return (
        f"the plan after {best.steps} steps, with strengths × {best.scale:g}, leaves {name} on "
        f"{best.checked.rate:.1%} of search prompts at KL {best.checked.kl:.4f}{others if len(front) > 1 else ''}"
    )


def make_tuning_data(
    subject: Subject, plan: Plan, splits: Splits, settings: Tune, seed: int, judge: Judge
) -> TuningData:
    """Generate the answers of fit prompts, and of search prompts if steps are taken; plan how many pairs fit a pass."""
    train = collect_pairs(subject, splits.fit, plan, settings, settings.prompts, judge)
    held_out = TrainingPairs((), ())
    if settings.steps:
        held_out = collect_pairs(subject, splits.search, plan, settings, HELD_OUT_PROMPTS, judge)
    first = max(0, min(change.site.layer for change in plan.edits))
    everything = [*train.control, *train.target, *held_out.control, *held_out.target]
    memory = plan_gradient_memory(subject, everything, first, ROWS_PER_PASS)
    return TuningData(subject, train, held_out, settings, memory, seed)


@dataclass
class Fit:
    """A plan on its way: the parameters, and how much openings weigh at the moment."""

    data: TuningData
    parameters: EditParameters
    check: SearchCheck
    goal: float
    """Largest share of search target prompts that may show the behavior."""

    def __post_init__(self) -> None:
        self.weight = self.data.settings.weight

    def take_steps(self) -> list[TunedPlan]:
        """Take gradient steps until the plan gets no better, and return the plans on the way. The parameters end at the
        best of them."""
        settings = self.data.settings
        optimizer = torch.optim.Adam(self.parameters.groups(settings.lr))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, FINAL_RATE_SHARE, settings.steps)
        points, states = [self.look(0)], {0: self.parameters.state()}
        with progress("TUNE", settings.steps) as advance:
            for step in range(1, settings.steps + 1):
                self.take_step(optimizer, step)
                schedule.step()
                advance(1)
                if step % CHECK_EVERY == 0 or step == settings.steps:
                    points.append(self.look(step))
                    states[step] = self.parameters.state()
                    self.adapt_weight(points[-1])
                if step - self.choose(points).steps >= settings.patience:
                    break
        self.parameters.restore(states[self.choose(points).steps])
        return points

    def take_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Take one gradient step. Raises UserError if a parameter becomes NaN or Inf."""
        settings, data = self.data.settings, self.data
        optimizer.zero_grad()
        if settings.sparsity and settings.what != "directions":
            (settings.sparsity * self.parameters.mean_strength()).backward()
        for loss in data.iterate_losses(self.parameters.to_live_plan(), data.draw_batch(step), settings.margin):
            # All parts share the small graph of the parameters.
            loss.total(self.weight, settings.coherence).backward(retain_graph=True)
        optimizer.step()
        if not self.parameters.finite():
            raise UserError("tune: the plan's parameters became NaN or Inf; lower tune.lr")

    def adapt_weight(self, point: TunedPlan) -> None:
        """Let openings weigh more if too much of the behavior is left, and else less."""
        factor = RISE if point.checked.rate > self.goal else FALL
        self.weight = min(max(self.weight * factor, WEIGHTS[0]), WEIGHTS[1])

    def scale_best(self, points: Sequence[TunedPlan]) -> list[TunedPlan]:
        """Return the best plan at other strengths: weaker ones to the first above the goal, or else stronger ones."""
        best, found = self.choose(points), list[TunedPlan]()
        reached = not self.excess(best)
        for scale in SCALES if reached else STRONGER:
            found.append(self.look(best.steps, scale))
            if reached == bool(self.excess(found[-1])):
                break
        return found

    def look(self, steps: int, scale: float = 1.0) -> TunedPlan:
        """Return the plan as it stands, with what search prompts say of it."""
        plan = self.parameters.to_plan(MIN_STRENGTH).scaled(scale)
        return TunedPlan(plan, self.check.check(plan), self.data.evaluate(plan), steps, scale)

    def choose(self, points: Sequence[TunedPlan]) -> TunedPlan:
        """Return the cheapest plan within the limits, or the one that exceeds them least."""
        best = points[0]
        for point in points[1:]:
            excess, least = self.excess(point), self.excess(best)
            if excess < least or (excess == least and self.cost(point) < self.cost(best) - MIN_COST_DROP):
                best = point
        return best

    def excess(self, point: TunedPlan) -> float:
        """Return by how much the plan exceeds the limits on the behavior and on loops; 0 within both."""
        return self.check.excess(point.checked, self.goal)

    def cost(self, point: TunedPlan) -> float:
        """Return what the plan costs, in nats: its loss. Within the limits openings cost nothing: the judge decides."""
        settings = self.data.settings
        weight = settings.weight if self.excess(point) else 0.0
        strengths = [abs(e.strength) for e in point.plan.edits if isinstance(e, Edit)]
        sparsity = settings.sparsity * sum(strengths) / len(self.parameters.edits)
        return float(point.loss.total(weight, settings.coherence)) + sparsity
