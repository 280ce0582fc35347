"""Cost of removal: the least KL at which an edit brings the behavior down to a share of what it was, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, hypot, inf, isinf, log
from typing import NamedTuple

import torch
from pydantic import ConfigDict
from torch import Tensor

from obliteratus.audit.doses import Curve, Dose
from obliteratus.core.results import Score
from obliteratus.core.settings import FrozenModel
from obliteratus.core.shapes import Float
from obliteratus.verify.intervals import mean_score

RESAMPLES = 1000  # the outer 2.5 % then rest on 25 resamples
# Share of loops and empty answers, beyond the unedited model's, from which on an edit breaks the model instead of
# removing the behavior. Working edits of the organisms have up to 0.08.
BROKEN = 0.25
MOST_LOG = 700.0  # the exponential of more is infinite
HALF, TWENTIETH = 0.5, 0.05
GOALS = (HALF, TWENTIETH)
"""Shares of the unedited model's rate to which removal is to bring it."""


class RemovalCost(FrozenModel):
    """What it costs to bring the behavior down to a share of what it was."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # JSON has no infinity

    goal: float
    """Share of the unedited model's rate."""
    kl: Score
    """Nats. The upper end is infinite if more than 2.5 % of resamples never reach the goal, as for one in twenty with
    fewer than some 75 target prompts; the value is infinite if the sample itself does not."""
    scale: float | None
    """Factor on the plan's strengths at which the goal is reached; None if it is not."""
    tried: float
    """Largest mean KL that was tried, nats: where the goal was not reached, the cost is above it."""
    best: str = ""
    """The method, where the least of several is meant."""

    @property
    def reached(self) -> bool:
        """Whether the sample itself reached the goal."""
        return self.scale is not None


class Crossings(NamedTuple):
    """Costs of one curve: of the sample, and of resamples of its prompts."""

    kl: Tensor
    """[1 + resamples], nats; the first is the sample as it is. Infinite where the goal is not reached."""
    scale: Tensor


def cross_goal(
    curve: Curve, unedited: Dose, goal: float, *, controls: bool = False, resamples: int = RESAMPLES, seed: int = 0
) -> Crossings:
    """Return where the curve's rate first falls to the goal, in the sample and in resamples of target prompts.

    The rate at a strength is the least at that or any weaker one; an edit that breaks the model removes nothing.
    Between two strengths the rate is taken as linear in the strength, and the KL as quadratic. Resamples are those of
    the Bayesian bootstrap (Rubin 1981), with one prompt more, which is never brought round: without it, no resample
    of prompts of which none is left at a strength would know that others might be.

    controls: whether control prompts are resampled too. All curves of the same prompts are resampled alike, so their
    costs are paired.
    """
    held = [unedited.shown if breaks(dose, unedited) else dose.shown for dose in curve.doses]
    shown = torch.tensor([unedited.shown, *held], dtype=torch.float64)
    scale = torch.tensor([0.0, *(dose.scale for dose in curve.doses)], dtype=torch.float64)
    weights = draw_target_weights(shown.shape[1], resamples, seed)
    rates = weights[:, :-1] @ shown.T + weights[:, -1:]
    kl = tabulate_kl(curve, unedited)
    drawn = draw_weights(kl.shape[1], resamples, seed + 1) @ kl.T
    costs = drawn if controls else drawn[:1].expand(len(rates), -1)
    return interpolate(rates, costs.clamp(min=0).sqrt(), scale, goal * rates[:, :1])


def tabulate_kl(curve: Curve, unedited: Dose) -> Float[Tensor, "looks controls"]:
    """Return the KL of each control prompt, first under no edit: 0."""
    return torch.tensor([[0.0] * len(unedited.kl), *(dose.kl for dose in curve.doses)], dtype=torch.float64)


def breaks(dose: Dose, unedited: Dose) -> bool:
    """Return whether too many answers are loops or empty for the edit to count as a removal."""
    return dose.loops > unedited.loops + BROKEN


def interpolate(
    rates: Float[Tensor, "draws looks"],
    roots: Float[Tensor, "draws looks"],
    scale: Float[Tensor, " looks"],
    goal: Tensor,
) -> Crossings:
    """Return KL and scale where the running least of the rates first reaches the goal. roots: of the mean KL."""
    least = rates.cummin(1).values
    reached = (least <= goal) & (rates[:, :1] > 0)
    after = reached.to(torch.int8).argmax(1)
    found, after = reached.any(1), after.clamp(min=1)
    rows = torch.arange(len(rates))
    high, low = least[rows, after - 1], least[rows, after]
    share = ((high - goal[:, 0]) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    root = roots[rows, after - 1] + share * (roots[rows, after] - roots[rows, after - 1])
    at = scale[after - 1] + share * (scale[after] - scale[after - 1])
    infinite = torch.full_like(root, torch.inf)
    return Crossings(kl=torch.where(found, root.square(), infinite), scale=torch.where(found, at, infinite))


def draw_weights(n: int, resamples: int, seed: int) -> Float[Tensor, "draws n"]:
    """Return equal weights, then in how large a share of each resample an item is drawn; fp64."""
    picks = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    drawn = torch.zeros(resamples, n, dtype=torch.float64)
    drawn.scatter_add_(1, picks, torch.ones(resamples, n, dtype=torch.float64))
    return torch.cat([torch.ones(1, n, dtype=torch.float64), drawn]) / n


def draw_target_weights(n: int, resamples: int, seed: int) -> Float[Tensor, "draws items"]:
    """Return weights of n prompts and of the one that is added to resamples: equal and 0, then drawn; fp64."""
    drawn = torch.empty(resamples, n + 1, dtype=torch.float64)
    drawn.exponential_(generator=torch.Generator().manual_seed(seed))
    sample = torch.cat([torch.full((1, n), 1 / n, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)], 1)
    return torch.cat([sample, drawn / drawn.sum(1, keepdim=True)])


# --------------------------------------------------------------------------------------------------- scores
def summarize_cost(curve: Curve, unedited: Dose, goal: float) -> RemovalCost:
    """Return the cost of one curve, with its interval over prompts."""
    return find_least_cost({curve.name: curve}, unedited, goal)


def find_least_cost(
    curves: Mapping[str, Curve], unedited: Dose, goal: float, seeds: Sequence[Curve] = ()
) -> RemovalCost:
    """Return the least cost over methods, with its interval over prompts and over fits on other prompts.

    The least is taken anew in each resample of target prompts, so the interval covers the choice of the method. Its
    sides are the roots of the summed squares of two intervals of the logarithm (Newcombe's hybrid, 1998): that over
    target prompts, and that of the mean over control prompts by the bootstrap-t, without which the upper end of a mean
    of skewed numbers is too low.

    seeds: curves of one method, fitted on all fit prompts and on halves of them. Each resample multiplies the cost by
    how far one of them, drawn at random, lies from their geometric mean.
    """
    found = {name: cross_goal(curve, unedited, goal) for name, curve in curves.items()}
    costs = torch.stack([crossings.kl for crossings in found.values()])
    best = list(found)[int(costs[:, 0].argmin())]
    draws = costs.min(0).values * draw_seed_factors(seeds, unedited, goal)
    scale = float(found[best].scale[0])
    over_targets = make_score(draws, len(unedited.shown), "nats")
    over_controls = score_mean(interpolate_items(curves[best], unedited, scale))
    return RemovalCost(
        goal=goal,
        kl=combine(over_targets, over_controls),
        scale=scale if scale < torch.inf else None,
        tried=max((dose.mean_kl.value for curve in curves.values() for dose in curve.doses), default=0.0),
        best=best,
    )


def interpolate_items(curve: Curve, unedited: Dose, scale: float) -> Float[Tensor, " controls"]:
    """Return the KL of each control prompt at a scale between two that were tried, at the strongest if beyond.

    Their mean is that of `interpolate`.
    """
    kl, scales = tabulate_kl(curve, unedited), [0.0, *(dose.scale for dose in curve.doses)]
    after = next((i for i, known in enumerate(scales) if known >= scale and i), len(scales) - 1)
    below, above = kl[after - 1], kl[after]
    share = min((scale - scales[after - 1]) / (scales[after] - scales[after - 1]), 1.0)
    low, high = float(below.mean().sqrt()), float(above.mean().sqrt())
    wanted, gap = (low + share * (high - low)) ** 2, float(above.mean() - below.mean())
    return below + (above - below) * ((wanted - float(below.mean())) / gap if gap else share)


def score_mean(values: Float[Tensor, " n"]) -> Score:
    """Return a mean with its interval by the bootstrap-t, or by plain resamples where there are too few for that."""
    score = mean_score(values, "nats")
    return (
        score
        if score.has_interval
        else make_score(draw_weights(len(values), RESAMPLES, 1) @ values, len(values), "nats")
    )


def combine(one: Score, other: Score) -> Score:
    """Return the first score with an interval that is wider by what the second is unsure of, on a logarithmic scale.

    An infinite value keeps its lower end over target prompts.
    """
    if isinf(one.value) or one.value <= 0 or other.value <= 0:
        return one
    below = hypot(_log_ratio(one.value, one.low), _log_ratio(other.value, other.low))
    above = hypot(_log_ratio(one.high, one.value), _log_ratio(other.high, other.value))
    return one.model_copy(
        update={"low": one.value * exp(-below), "high": one.value * (exp(above) if above < MOST_LOG else inf)}
    )


def _log_ratio(large: float, small: float) -> float:
    return inf if isinf(large) or small <= 0 else log(large / small)


def draw_seed_factors(seeds: Sequence[Curve], unedited: Dose, goal: float) -> Float[Tensor, " draws"]:
    """Return by how much the cost of a fit drawn at random differs from their geometric mean; 1 for the sample, and
    where fewer than two fits reach the goal."""
    logs = torch.stack([cross_goal(curve, unedited, goal).kl.log() for curve in seeds]) if seeds else torch.empty(0, 1)
    if len(logs) < 2:
        return torch.ones(1 + RESAMPLES, dtype=torch.float64)
    finite = logs.isfinite()
    mean = torch.where(finite, logs, 0.0).sum(0) / finite.sum(0).clamp(min=1)
    pick = torch.randint(len(logs), (logs.shape[1],), generator=torch.Generator().manual_seed(2))
    drawn = logs[pick, torch.arange(logs.shape[1])]
    factors = torch.where(drawn.isfinite() & (finite.sum(0) > 1), (drawn - mean).exp(), 1.0)
    factors[0] = 1.0
    return factors


def make_score(draws: Float[Tensor, " draws"], n: int, unit: str) -> Score:
    """Return the first of the draws with the 95 % interval of the others. Draws may be infinite."""
    ends = torch.quantile(draws[1:], torch.tensor([0.025, 0.975], dtype=draws.dtype), interpolation="nearest")
    value, (low, high) = float(draws[0]), ends.tolist()
    return Score(value=value, low=min(low, value), high=max(high, value), n=n, unit=unit)


def compare_costs(one: Curve, other: Curve, unedited: Dose, goal: float) -> Score | None:
    """Return cost(one) ÷ cost(other), paired by prompt; None if either does not reach the goal, or costs nothing."""
    first, second = (cross_goal(curve, unedited, goal, controls=True).kl for curve in (one, other))
    if not all(0 < float(costs[0]) < torch.inf for costs in (first, second)):
        return None
    ratio = first / second
    return make_score(torch.where(ratio.isnan(), torch.inf, ratio), len(unedited.shown), "ratio")
