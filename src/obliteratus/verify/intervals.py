"""Scores with 95 % confidence intervals: Wilson's for shares, seeded bootstraps for the rest."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from obliteratus.core.results import Score
from obliteratus.core.shapes import Float

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution: 95 % two-sided
RESAMPLES = 2000  # the 2.5 % quantile then rests on 50 resamples; twice as many moved no third digit


def wilson_rate(hits: int, n: int) -> Score:
    """Return a share with its Wilson score interval (Wilson 1927), which is not empty at 0 and 1."""
    if n == 0:
        raise ValueError("a rate needs at least one observation")
    p, z2 = hits / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Score(value=p, low=min(p, max(0.0, middle - half)), high=max(p, min(1.0, middle + half)), n=n, unit="share")


Statistic = Callable[[Float[Tensor, "... n"]], Float[Tensor, "..."]]


def bootstrap(values: Float[Tensor, " n"], statistic: Statistic, unit: str, seed: int = 0) -> Score:
    """Return a statistic over the last axis with its seeded percentile bootstrap interval."""
    resampled = values.double()[_resample_indices(len(values), seed)]
    return _make_score(statistic(values.double()), statistic(resampled), len(values), unit)


def paired_ratio(after: Float[Tensor, " n"], before: Float[Tensor, " n"], seed: int = 0) -> Score:
    """Return exp(mean(after) − mean(before)), a ratio of perplexities, resampled in pairs to cancel difficulty."""
    gap = (after - before).double()
    resampled = gap[_resample_indices(len(gap), seed)].mean(-1).exp()
    return _make_score(gap.mean().exp(), resampled, len(gap), "ratio")


def paired_difference(after: Float[Tensor, " n"], before: Float[Tensor, " n"], unit: str, seed: int = 0) -> Score:
    """Return mean(after) − mean(before) of the same items, resampled in pairs so that their difficulty cancels."""
    return bootstrap((after - before).double(), mean, unit, seed)


def group_ratio(above: Float[Tensor, " n"], below: Float[Tensor, " m"], seed: int = 0) -> Score:
    """Return exp(mean(above) − mean(below)) of two unrelated groups, each resampled by itself; n counts both."""
    first, second = above.double(), below.double()
    means = [x[_resample_indices(len(x), seed + k)].mean(-1) for k, x in enumerate((first, second))]
    value = (first.mean() - second.mean()).exp()
    return _make_score(value, (means[0] - means[1]).exp(), len(first) + len(second), "ratio")


def _resample_indices(n: int, seed: int) -> Tensor:
    return torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))


def _make_score(value: Tensor, resampled: Tensor, n: int, unit: str) -> Score:
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=resampled.dtype)).tolist()
    return Score(value=float(value), low=min(low, float(value)), high=max(high, float(value)), n=n, unit=unit)


def mean(values: Float[Tensor, "... n"]) -> Float[Tensor, "..."]:
    return values.mean(-1)


def quantile(q: float) -> Statistic:
    """Return a statistic: the q-quantile, q in 0–1, linearly interpolated."""
    return lambda values: torch.quantile(values, q, dim=-1)
