"""TUNE: a plan's strengths and directions fitted by gradients, the weights left alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from obliteratus.errors import UserError
from obliteratus.progress import note, progress
from obliteratus.tune.knobs import Knobs
from obliteratus.tune.lab import Pair
from obliteratus.tune.losses import ROWS, Own
from obliteratus.tune.pulls import Pairs, Pull, gathered, pull_control, pull_target
from obliteratus.types import Plan, PromptSet, Subject, Tune

EVERY = 5  # steps between two looks at what no step sees: a look at 48 prompts costs about two steps
HELD = 24  # search prompts of each group that are looked at: their mean moves by less than a step's gain
FALLING = 1e-3  # nats: a loss on them that fell by less stands still
WEAK = 0.02  # an edit weaker than this moves no answer, and is dropped from the plan


@dataclass(frozen=True)
class Point:
    """A plan on the way from gentle to thorough, and what it costs on search prompts."""

    plan: Plan
    level: float
    """Of the hinge, nats a token: the lower, the more thorough."""
    kl: float
    hinge: float
    drift: float
    steps: int


class Bench:
    """All that stays the same while a plan is fitted: the model, its own answers, and the prompts of both kinds."""

    def __init__(self, subject: Subject, fit: Pairs, held: Pairs, how: Tune) -> None:
        self.subject, self.fit, self.held, self.how = subject, fit, held, how
        self.own = Own(subject)

    def parts(self, plan: Plan, pairs: Pairs, level: float) -> Iterator[Pull]:
        """The pulls of `ROWS` prompts at a time, each weighed by its share: one graph is all that is ever held."""
        for some, share in _shares(pairs.control):
            kl = share * pull_control(self.subject, self.own, plan, some)
            yield Pull(kl, kl.new_zeros(()), kl.new_zeros(()))
        for some, share in _shares(pairs.target):
            hinge, drift = pull_target(self.subject, self.own, plan, some, level)
            yield Pull(hinge.new_zeros(()), share * hinge, share * drift)

    @torch.no_grad()
    def looked(self, plan: Plan, level: float) -> Pull:
        """The whole pull on search prompts."""
        parts = list(self.parts(plan, self.held, level))
        return Pull(*(torch.stack(x).sum() for x in zip(*((p.kl, p.hinge, p.drift) for p in parts), strict=True)))

    def batch(self, step: int) -> Pairs:
        """The prompts of a step, from its number alone."""
        rng = random.Random(step)

        def some(pairs: Sequence[Pair]) -> list[Pair]:
            return rng.sample(list(pairs), min(self.how.batch, len(pairs)))

        return Pairs(some(self.fit.control), some(self.fit.target))


def tuned(subject: Subject, plan: Plan, fit: PromptSet, search: PromptSet, how: Tune) -> Plan:
    """The plan with strengths and directions fitted; its rank, sites and anchors stay, sites may drop out.

    Steps see fit prompts, and stop by search prompts. Of several levels the last, most thorough one is taken
    (`front` gives all). Raises UserError where the plan cannot be fitted.
    """
    return front(subject, plan, fit, search, how)[-1].plan


def front(subject: Subject, plan: Plan, fit: PromptSet, search: PromptSet, how: Tune) -> list[Point]:
    """A plan for each of ``how.levels``, gentle to thorough, each begun where the one before it ended."""
    knobs = Knobs(plan, subject.device, how.what)
    few = PromptSet({group: prompts[:HELD] for group, prompts in search.groups.items()})
    bench = Bench(subject, gathered(subject, fit, plan, how.tokens), gathered(subject, few, plan, how.tokens), how)
    points = []
    for level in how.levels:
        points.append(_point(bench, knobs, level))
        last = points[-1]
        note("TUNE", f"level {level}: {last.steps} steps, KL {last.kl:.3f}, hinge {last.hinge:.3f} on search prompts")
    return points


def _point(bench: Bench, knobs: Knobs, level: float) -> Point:
    """Steps at one level until the pull on search prompts stands still; the plan with the least of it."""
    how = bench.how
    optimiser = torch.optim.Adam(knobs.groups(how.lr))
    best = _seen(bench, knobs, level, 0)
    still, step = 0, 0
    with progress("TUNE", how.steps) as advance:
        while step < how.steps and still < how.patience:
            _step(bench, knobs, optimiser, level, step)
            step += 1
            advance(1)
            if step % EVERY == 0 or step == how.steps:
                now = _seen(bench, knobs, level, step)
                gained = _cost(now, how) < _cost(best, how) - FALLING
                still = 0 if gained else still + EVERY
                best = now if _cost(now, how) < _cost(best, how) else best
    return best


def _step(bench: Bench, knobs: Knobs, optimiser: torch.optim.Optimizer, level: float, step: int) -> None:
    optimiser.zero_grad()
    if bench.how.sparsity and bench.how.what != "directions":
        (bench.how.sparsity * knobs.size()).backward()
    for part in bench.parts(knobs.live(), bench.batch(step), level):
        part.total(bench.how.weight).backward(retain_graph=True)  # the knobs' own small graph is common to all parts
    _check_finite(knobs)
    optimiser.step()


def _check_finite(knobs: Knobs) -> None:
    if not all(bool(torch.isfinite(k.strength)) for k in knobs.knobs):
        raise UserError("tune: strengths are no numbers any more; lower tune.lr")


def _seen(bench: Bench, knobs: Knobs, level: float, step: int) -> Point:
    plan = knobs.fixed(WEAK)
    pull = bench.looked(plan, level)
    return Point(plan, level, float(pull.kl), float(pull.hinge), float(pull.drift), step)


def _cost(point: Point, how: Tune) -> float:
    pull = Pull(*(torch.tensor(x) for x in (point.kl, point.hinge, point.drift)))
    return float(pull.total(how.weight))


def _shares(pairs: Sequence[Pair]) -> Iterator[tuple[Sequence[Pair], float]]:
    for first in range(0, len(pairs), ROWS):
        some = pairs[first : first + ROWS]
        yield some, len(some) / len(pairs)
