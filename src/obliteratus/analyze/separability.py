"""How well each layer tells the groups apart, on prompts that nothing was fitted on: AUC, d′, and a logistic probe."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.analyze.auc import delong_auc
from obliteratus.analyze.base import AnalysisContext, analyses
from obliteratus.analyze.samples import (
    DRAWS,
    FOLDS,
    LEVEL,
    Draws,
    FoldPlan,
    Folds,
    Level,
    d_prime,
    draw_permutations,
    familywise_p_values,
    identity_order,
    permute_d_prime,
    project_held_out,
    read_sample,
    split_folds,
)
from obliteratus.core.results import Score
from obliteratus.core.shapes import Bool, Float
from obliteratus.report.curves import BLUE, GREEN, GREY, ORANGE, Figure, add_legend, plot_band
from obliteratus.verify.intervals import RESAMPLES, wilson_rate

RIDGE = 1.0  # with rows of mean square length 1 and λ = 1, 64 dimensions of noise and 160 prompts are not overfitted
STEPS = 50  # Newton's method takes about eight
DONE = 1e-10  # change of the log-odds at which it has arrived
FLAT = 1e-9  # least p (1 − p): a prompt that is sure leaves a weight whose inverse must stay finite


def cross_validate_probe(
    gram: Float[Tensor, "rows rows"], plan: FoldPlan, ridge: float = RIDGE
) -> Float[Tensor, " rows"]:
    """Log-odds that each row is the target's, from a probe fitted on the other folds."""
    scores = gram.new_zeros(len(gram))
    labels = torch.arange(len(gram)) < plan.n
    for fold in range(len(plan.weights)):
        kept = plan.outside(fold)
        scores[~kept] = fit_logistic(gram, labels, kept, ridge)[~kept]
    return scores


def fit_logistic(
    gram: Float[Tensor, "rows rows"], labels: Bool[Tensor, " rows"], kept: Bool[Tensor, " rows"], ridge: float = RIDGE
) -> Float[Tensor, " rows"]:
    """Log-odds of all rows, by the kept ones alone.

    Rows are taken about the kept rows' mean and in units of their root mean square length; small is then made
    Σ log(1 + exp(−y f)) + λ/2 (‖w‖² + b²), with f = w·x + b, λ = ridge and y = ±1: iterated reweighted least squares
    on f = Kα, K = XXᵀ + 1.
    """
    kernel = _centered(gram, kept)
    size = kernel.diagonal()[kept].mean()
    kernel = kernel / torch.where(size > 0, size, 1.0) + 1
    inner, y = kernel[kept][:, kept], labels[kept].to(gram)
    alpha = torch.zeros_like(y)
    for _ in range(STEPS):
        f = inner @ alpha
        p = torch.sigmoid(f)
        weight = (p * (1 - p)).clamp(min=FLAT)
        root = weight.sqrt()  # K + λ/w, scaled by √w on both sides: its condition stays near that of K
        system = root[:, None] * inner * root + ridge * torch.eye(len(y), dtype=gram.dtype)
        solved = torch.linalg.solve_ex(system, root * (f + (y - p) / weight))[0]
        alpha, before = root * solved, f
        if (inner @ alpha - before).abs().max() < DONE:
            break
    return kernel[:, kept] @ alpha


def _centered(gram: Tensor, kept: Tensor) -> Tensor:
    """Products of the rows about the kept rows' mean."""
    along = gram[:, kept].mean(1)
    return gram - along[:, None] - along[None] + gram[kept][:, kept].mean()


@dataclass(frozen=True)
class Separability:
    """At each stream index, on held-out folds, with 95 % intervals."""

    auc: tuple[Score, ...]
    """Along the other folds' mean difference."""
    d_prime: tuple[Score, ...]
    """The same projections: difference of the means in standard deviations."""
    probe: tuple[Score, ...]
    """Share of prompts that a logistic probe of the other folds puts into their group."""
    majority: float
    """What a probe gets that always names the larger group."""
    p: Float[Tensor, " streams"]
    """Of d′, by permuted labels, corrected for all streams."""
    level: float
    position: int
    """Token of the prompts, counted from their end."""

    @property
    def significant(self) -> tuple[int, ...]:
        """Stream indices that tell the groups apart beyond chance."""
        return tuple((self.p <= self.level).nonzero().flatten().tolist())

    @property
    def best(self) -> int:
        """The stream index of the highest AUC, of equals that of the highest d′."""
        return max(range(len(self.auc)), key=lambda s: (self.auc[s].value, self.d_prime[s].value))

    def to_dict(self) -> dict[str, Any]:
        """By stream index, each with its interval."""
        return {
            "position": self.position,
            "level": self.level,
            "found": list(self.significant),
            "best": self.best,
            "majority": self.majority,
            "auc": [s.model_dump() for s in self.auc],
            "d_prime": [s.model_dump() for s in self.d_prime],
            "probe": [s.model_dump() for s in self.probe],
            "p": self.p.tolist(),
        }

    def summary(self) -> str:
        if not self.significant:
            return f"no stream tells the groups apart beyond chance ({self.auc[0].n} prompts)"
        one, gap, probe = self.auc[self.best], self.d_prime[self.best], self.probe[self.best]
        return (
            f"{len(self.significant)} of {len(self.auc)} streams tell the groups apart; best {self.best}: AUC {_shown(one)}, "
            f"d′ {_shown(gap)}, probe {_shown(probe)} ({one.n} prompts)"
        )

    def draw(self, figure: Figure) -> None:
        """AUC and probe beside d′."""
        left, right = figure.subplots(1, 2)
        plot_band(left, self.auc, "AUC", BLUE)
        plot_band(left, self.probe, "logistic probe, share right", GREEN)
        left.axhline(0.5, color=GREY, ls="--", label="chance, AUC")
        left.set(xlabel="stream index", ylabel="held-out", ylim=(0, 1.03))
        plot_band(right, self.d_prime, "d′", ORANGE)
        right.axhline(0, color=GREY, ls="--", label="chance")
        right.set(xlabel="stream index", ylabel="held-out d′")
        add_legend(left)
        add_legend(right)


@analyses.register("separability", cite="doi:10.2307/2531595", needs=("rows",))
def measure_separability(
    context: AnalysisContext,
    *,
    folds: Folds = FOLDS,
    ridge: Annotated[float, Field(gt=0)] = RIDGE,
    draws: Draws = DRAWS,
    level: Level = LEVEL,
    seed: int = 0,
) -> Separability:
    """Held-out AUC (DeLong et al. 1988), d′ and a logistic probe's accuracy for each stream, at the probed position.

    Each fold's prompts are scored by what the others give: their place along the mean difference, from half way
    between the means, and a logistic probe (`cross_validate_probe`, ``ridge``). p: ``draws`` permutations of the labels, by the
    largest d′ of all streams (`familywise_p_values`).

    Intervals are DeLong's, a bootstrap's over prompts, and Wilson's, each widened by what permutations show: folds
    share prompts, so held-out values are not independent and their statistics vary more than these formulas know (1.4
    times, for 60 prompts of one population). They hold for one stream; the best of many flatters itself. A probe learns
    a difference of topic as well as refusal. Needs rows, four prompts of each group.
    """
    sample = read_sample(context.activations, "separability", least=4)
    n, m = sample.n, len(sample) - sample.n
    plan, order = split_folds(n, m, folds, seed), draw_permutations(n + m, draws, seed + 1)
    measured, drawn = [], []
    for gram in sample.grams():
        drawn.append(permute_d_prime(gram, plan, order))
        measured.append(score_stream(gram, plan, ridge, seed, estimate_variance_inflation(drawn[-1][1:], n, m)))
    p, most = familywise_p_values(torch.stack(drawn, 1)), max(n, m) / (n + m)
    areas, gaps, shares = (tuple(scores) for scores in zip(*measured, strict=True))
    return Separability(areas, gaps, shares, most, p, level, context.activations.position)


def score_stream(gram: Float[Tensor, "rows rows"], plan: FoldPlan, ridge: float, seed: int, by: float) -> list[Score]:
    """One stream's AUC, d′ and probe, the intervals widened ``by``."""
    n, rows = plan.n, len(gram)
    scores = project_held_out(gram, plan, identity_order(rows))[0]
    right = int(((cross_validate_probe(gram, plan, ridge) > 0) == (torch.arange(rows) < n)).sum())
    gap = bootstrap_d_prime(scores[:n], scores[n:], seed)
    shares = [widen_interval(x, by, 0.0, 1.0) for x in (delong_auc(scores[:n], scores[n:]), wilson_rate(right, rows))]
    return [shares[0], widen_interval(gap, by), shares[1]]


def estimate_variance_inflation(by_chance: Float[Tensor, " draws"], n: int, m: int) -> float:
    """How many times more d′ varies under permuted labels than it would for independent values; at least 1."""
    return max(1.0, float(by_chance.std()) / sqrt(1 / n + 1 / m))


def widen_interval(score: Score, by: float, least: float = -inf, most: float = inf) -> Score:
    """The score with both ends of its interval ``by`` times as far away, within what it can be."""
    low, high = score.value - by * (score.value - score.low), score.value + by * (score.high - score.value)
    return score.model_copy(update={"low": max(least, low), "high": min(most, high)})


def bootstrap_d_prime(one: Float[Tensor, " n"], two: Float[Tensor, " m"], seed: int = 0) -> Score:
    """d′ with the percentile interval of a bootstrap over both groups' values."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [x[torch.randint(len(x), (RESAMPLES, len(x)), generator=generator)] for x in (one, two)]
    ends = torch.quantile(d_prime(*drawn), torch.tensor([0.025, 0.975], dtype=one.dtype))
    value = float(d_prime(one, two))
    low, high = min(float(ends[0]), value), max(float(ends[1]), value)
    return Score(value=value, low=low, high=high, n=len(one) + len(two), unit="d′")


def _shown(score: Score) -> str:
    return f"{score.value:.2f} [{score.low:.2f}, {score.high:.2f}]"
