"""How well each stream separates the groups on held-out prompts: AUC, d′, and the accuracy of a logistic probe."""

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
from obliteratus.verify.intervals import wilson_rate

# Of the probe, fitted in the span of its prompts so that its cost does not grow with the width.
RIDGE = 1.0  # with rows of mean square length 1, 64 dimensions of noise and 160 prompts are not overfitted
STEPS = 50  # Newton's method takes about eight
CONVERGED = 1e-10  # change of the log-odds
RESAMPLES = 2000  # of d′: the 2.5 % quantile then rests on 50 of them
MIN_VARIANCE = 1e-9  # of p (1 − p): a prompt with a certain label leaves a weight whose inverse must stay finite


@dataclass(frozen=True)
class Separability:
    """Scores of each stream on held-out folds, with 95 % intervals."""

    auc: tuple[Score, ...]
    """AUC along the other folds' mean difference."""
    d_prime: tuple[Score, ...]
    """Difference of the means of the same projections, in standard deviations."""
    probe: tuple[Score, ...]
    """Share of prompts that a logistic probe fitted on the other folds assigns to their group."""
    majority: float
    """Accuracy of always naming the larger group."""
    p: Float[Tensor, " streams"]
    """p values of d′ from permuted labels, corrected for all streams."""
    level: float
    position: int
    """Token of the prompts, counted from their end."""

    @property
    def significant(self) -> tuple[int, ...]:
        """Streams that separate the groups beyond chance."""
        return tuple((self.p <= self.level).nonzero().flatten().tolist())

    @property
    def best(self) -> int:
        """The stream with the highest AUC, of equals the one with the highest d′."""
        return max(range(len(self.auc)), key=lambda s: (self.auc[s].value, self.d_prime[s].value))

    def to_dict(self) -> dict[str, Any]:
        """Return the scores by stream, each with its interval."""
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
        """Return how many streams separate the groups, and the scores of the best one."""
        if not self.significant:
            return f"no stream separates the groups beyond chance ({self.auc[0].n} prompts, level {self.level:g})"
        auc, gap, probe = self.auc[self.best], self.d_prime[self.best], self.probe[self.best]
        return (
            f"{len(self.significant)} of {len(self.auc)} streams separate the groups; best {self.best}: "
            f"AUC {_format(auc)}, d′ {_format(gap)}, probe {_format(probe)} ({auc.n} prompts, level {self.level:g})"
        )

    def draw(self, figure: Figure) -> None:
        """Draw AUC and the probe's accuracy, and beside them d′."""
        left, right = figure.subplots(1, 2)
        plot_band(left, self.auc, "AUC", BLUE)
        plot_band(left, self.probe, "logistic probe, accuracy", GREEN)
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
    """Measure held-out AUC (DeLong et al. 1988), d′ and a logistic probe's accuracy at each stream.

    Each fold's prompts are scored by what is fitted on the others: their coordinate along the mean difference, from
    half way between the means, and a logistic probe (`cross_validate_probe`). p comes from ``draws`` permutations of
    the labels, by the largest d′ of all streams (`familywise_p_values`): where labels mean nothing, any stream is found
    in at most a share ``level`` of cases.

    The intervals are DeLong's, a bootstrap's over prompts, and Wilson's, each widened by what permutations show: folds
    share prompts, so held-out values are not independent and vary more than these formulas assume (1.4 times, for 60
    prompts of one population). They hold for one stream; the best of many is optimistic. A probe learns a difference
    of topic as well as of behavior. Needs rows, and four prompts of each group.
    """
    sample = read_sample(context.activations, "separability", least=4)
    n, m = sample.n, len(sample) - sample.n
    plan, order = split_folds(n, m, folds, seed), draw_permutations(n + m, draws, seed + 1)
    scores, null = [], []
    for gram in sample.grams():
        null.append(permute_d_prime(gram, plan, order))
        scores.append(score_stream(gram, plan, ridge, seed, estimate_variance_inflation(null[-1][1:], n, m)))
    p, majority = familywise_p_values(torch.stack(null, 1)), max(n, m) / (n + m)
    aucs, gaps, accuracies = (tuple(column) for column in zip(*scores, strict=True))
    return Separability(aucs, gaps, accuracies, majority, p, level, context.activations.position)


def score_stream(
    gram: Float[Tensor, "rows rows"], plan: FoldPlan, ridge: float, seed: int, inflation: float
) -> list[Score]:
    """Return one stream's AUC, d′ and probe accuracy, with intervals widened by the inflation."""
    n, rows = plan.n, len(gram)
    scores = project_held_out(gram, plan, identity_order(rows))[0]
    right = int(((cross_validate_probe(gram, plan, ridge) > 0) == (torch.arange(rows) < n)).sum())
    auc, accuracy = (
        widen_interval(x, inflation, 0.0, 1.0) for x in (delong_auc(scores[:n], scores[n:]), wilson_rate(right, rows))
    )
    return [auc, widen_interval(bootstrap_d_prime(scores[:n], scores[n:], seed), inflation), accuracy]


def estimate_variance_inflation(null: Float[Tensor, " draws"], n: int, m: int) -> float:
    """Return the ratio of d′'s standard deviation under permuted labels to that of independent values; at least 1."""
    return max(1.0, float(null.std()) / sqrt(1 / n + 1 / m))


def widen_interval(score: Score, factor: float, least: float = -inf, most: float = inf) -> Score:
    """Return the score with both ends of its interval ``factor`` times as far away, within [least, most]."""
    low, high = score.value - factor * (score.value - score.low), score.value + factor * (score.high - score.value)
    return score.model_copy(update={"low": max(least, low), "high": min(most, high)})


def bootstrap_d_prime(one: Float[Tensor, " n"], two: Float[Tensor, " m"], seed: int = 0) -> Score:
    """Return d′ with the percentile interval of a bootstrap over both groups' values."""
    generator = torch.Generator().manual_seed(seed)
    resampled = [x[torch.randint(len(x), (RESAMPLES, len(x)), generator=generator)] for x in (one, two)]
    ends = torch.quantile(d_prime(*resampled), torch.tensor([0.025, 0.975], dtype=one.dtype))
    value = float(d_prime(one, two))
    low, high = min(float(ends[0]), value), max(float(ends[1]), value)
    return Score(value=value, low=low, high=high, n=len(one) + len(two), unit="d′")


def _format(score: Score) -> str:
    return f"{score.value:.2f} [{score.low:.2f}, {score.high:.2f}]"


# ---------------------------------------------------------------------------------------- the logistic probe
def cross_validate_probe(
    gram: Float[Tensor, "rows rows"], plan: FoldPlan, ridge: float = RIDGE
) -> Float[Tensor, " rows"]:
    """Return the log-odds that each row is the target's, from a probe fitted on the other folds."""
    scores = gram.new_zeros(len(gram))
    labels = torch.arange(len(gram)) < plan.n
    for fold in range(len(plan.weights)):
        fitted = plan.outside(fold)
        scores[~fitted] = fit_logistic(gram, labels, fitted, ridge)[~fitted]
    return scores


def fit_logistic(
    gram: Float[Tensor, "rows rows"], labels: Bool[Tensor, " rows"], fitted: Bool[Tensor, " rows"], ridge: float = RIDGE
) -> Float[Tensor, " rows"]:
    """Return the log-odds of all rows from a logistic regression on the fitted rows.

    Rows are centered on the fitted rows' mean and divided by their root mean square length. The loss is
    Σ log(1 + exp(−y f)) + λ/2 (‖w‖² + b²) with f = w·x + b, λ = ridge and y = ±1, minimized by iterated reweighted
    least squares on f = Kα with K = XXᵀ + 1.
    """
    kernel = _center(gram, fitted)
    size = kernel.diagonal()[fitted].mean()
    kernel = kernel / torch.where(size > 0, size, 1.0) + 1
    inner, y = kernel[fitted][:, fitted], labels[fitted].to(gram)
    alpha = torch.zeros_like(y)
    for _ in range(STEPS):
        f = inner @ alpha
        p = torch.sigmoid(f)
        weight = (p * (1 - p)).clamp(min=MIN_VARIANCE)
        root = weight.sqrt()  # K + λ/w, scaled by √w on both sides: its condition stays near that of K
        system = root[:, None] * inner * root + ridge * torch.eye(len(y), dtype=gram.dtype)
        solution = torch.linalg.solve_ex(system, root * (f + (y - p) / weight))[0]
        alpha, before = root * solution, f
        if (inner @ alpha - before).abs().max() < CONVERGED:
            break
    return kernel[:, fitted] @ alpha


def _center(gram: Tensor, fitted: Tensor) -> Tensor:
    """Return the inner products of the rows minus the fitted rows' mean."""
    along = gram[:, fitted].mean(1)
    return gram - along[:, None] - along[None] + gram[fitted][:, fitted].mean()
