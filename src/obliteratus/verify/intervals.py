"""Scores with 95 % intervals that cover what they say. Where the sample is too small for that, there is none.

Shares have Wilson's interval, their changes Tango's, means and ratios a bootstrap-t, quantiles order statistics, and
kappa that of its large-sample variance. Simulations of their coverage are in tests/verify/test_coverage.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import exp, hypot, inf, isfinite, lgamma, log, log1p, nan, sqrt
from statistics import NormalDist

import torch
from torch import Tensor

from obliteratus.core.results import Score
from obliteratus.core.shapes import Float

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
# The bootstrap-t falls short of what it states by up to two points on skewed samples of 24: stated as 96.5 %, it covers
# 93 to 97 % of normal, lognormal (σ = 1) and half-zero samples of 24 to 200.
STUDENTIZED_LEVEL = 0.965
RESAMPLES = 2000  # the outermost 1.75 % then rest on 35 resamples; twice as many moved no third digit
# With fewer items the bootstrap-t covers as little as 92 % (12 lognormal ones), with 16 of them 94 %.
LEAST = 16
# Items that differ from the commonest value. With fewer, such as 5 of 24 prompts that an edit moves at all, resamples
# without any of them are frequent, and the interval has no end.
LEAST_DIFFERENT = 10
# From here on Student's interval covers as well, and the resamples would take 32 MB and more.
MANY = 2000
LARGEST = 709.0  # exp of more is infinite in float64
# An order statistic's interval has the coverage that the binomial distribution allows. Those that cover less or more,
# or leave more than this on one side, are not given: that takes 59 items for p95, and 299 for p99.
LEAST_COVERAGE, MOST_COVERAGE, MOST_OUTSIDE = 0.93, 0.97, 0.05
NEGLIGIBLE = 1e-4  # less than this outside on one side: a rank that is too far out to be an end


# -------------------------------------------------------------------------------------------------- shares
def wilson_rate(hits: int, n: int) -> Score:
    """Return a share with its Wilson score interval (Wilson 1927), which is not empty at 0 and 1."""
    if n == 0:
        raise ValueError("a rate needs at least one observation")
    p, z2 = hits / n, Z * Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z * sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Score(value=p, low=min(p, max(0.0, middle - half)), high=max(p, min(1.0, middle + half)), n=n, unit="share")


def paired_share_change(after: Float[Tensor, " n"], before: Float[Tensor, " n"]) -> Score:
    """Return share(after) − share(before) of the same items, each 0 or 1, with Tango's score interval (Tango 1998).

    It has a width also where no item changes, and covers more than it states where fewer than about ten do.
    """
    n = len(after)
    gained = int((after > before).sum())
    lost = int((before > after).sum())
    value = (gained - lost) / n
    ends = [_solve_tango(gained, lost, n, sign, value) for sign in (-1, 1)]
    return Score(value=value, low=min(value, ends[0]), high=max(value, ends[1]), n=n, unit="share")


def _solve_tango(gained: int, lost: int, n: int, sign: int, value: float) -> float:
    """Return the change on that side of the observed one whose score statistic is z."""
    inside, outside = value, float(sign)
    for _ in range(50):  # halvings, to the last digit
        middle = (inside + outside) / 2
        if abs(_score_change(gained, lost, n, middle)) < Z:
            inside = middle
        else:
            outside = middle
    return inside


def _score_change(gained: int, lost: int, n: int, change: float) -> float:
    """Return the observed change minus a supposed one, in standard errors under that one (Tango 1998, eq. 8)."""
    b = -gained - lost + (2 * n - gained + lost) * change
    c = -lost * change * (1 - change)
    q = (sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)  # the share of items lost, by maximum likelihood
    variance = n * (2 * q + change * (1 - change))
    gap = gained - lost - n * change
    return gap / sqrt(variance) if variance > 0 else 0.0 if abs(gap) < 1e-9 * n else inf


def share_difference(one: Score, two: Score) -> Score:
    """Return one share minus another of unrelated items, with Newcombe's hybrid score interval (Newcombe 1998).

    one, two: shares with Wilson's intervals. n counts both.
    """
    value = one.value - two.value
    below, above = ((one.value - one.low), (two.high - two.value)), ((one.high - one.value), (two.value - two.low))
    low, high = value - hypot(*below), value + hypot(*above)
    return Score(value=value, low=low, high=high, n=one.n + two.n, unit="share")


# --------------------------------------------------------------------------------------- means and ratios
def mean_score(values: Float[Tensor, " n"], unit: str, seed: int = 0) -> Score:
    """Return a mean with its interval by the bootstrap-t (Efron 1981), or without one (see `LEAST`)."""
    value, low, high = _studentize(seed, values)
    return Score(value=value, low=low, high=high, n=len(values), unit=unit)


def perplexity_score(losses: Float[Tensor, " n"], seed: int = 0) -> Score:
    """Return exp of the mean of losses in nats, with the interval of the mean."""
    return _make_ratio(_studentize(seed, losses), len(losses), "perplexity")


def paired_ratio(after: Float[Tensor, " n"], before: Float[Tensor, " n"], seed: int = 0) -> Score:
    """Return exp(mean(after) − mean(before)), a ratio of perplexities, in pairs so that their difficulty cancels."""
    return _make_ratio(_studentize(seed, after.double() - before.double()), len(after), "ratio")


def paired_difference(after: Float[Tensor, " n"], before: Float[Tensor, " n"], unit: str, seed: int = 0) -> Score:
    """Return mean(after) − mean(before) of the same items, in pairs so that their difficulty cancels."""
    return mean_score(after.double() - before.double(), unit, seed)


def group_ratio(above: Float[Tensor, " n"], below: Float[Tensor, " m"], seed: int = 0) -> Score:
    """Return exp(mean(above) − mean(below)) of two unrelated groups, each resampled by itself; n counts both."""
    return _make_ratio(_studentize(seed, above, below), len(above) + len(below), "ratio")


def _studentize(seed: int, *samples: Float[Tensor, " _"]) -> tuple[float, float, float]:
    """Return the first sample's mean, less the second's if there is one, and the ends of its interval."""
    rows = [sample.double() for sample in samples]
    means = [float(row.mean()) for row in rows]
    value = means[0] - sum(means[1:])
    if not all(_is_enough(row) for row in rows):
        return value, nan, nan
    error = sqrt(sum(float(row.var()) / len(row) for row in rows))
    if min(map(len, rows)) > MANY:
        return value, value - Z * error, value + Z * error
    resampled = [_resample(row, seed + k) for k, row in enumerate(rows)]
    gap = resampled[0][0] - sum(mean for mean, _ in resampled[1:])
    t = gap / sum((variance for _, variance in resampled), torch.zeros(())).sqrt()
    tail = (1 - STUDENTIZED_LEVEL) / 2
    t = torch.where(t.isnan(), 0.0, t)  # of a resample without spread it is infinite, unless it has the sample's mean
    low, high = torch.quantile(t, torch.tensor([tail, 1 - tail], dtype=t.dtype), interpolation="nearest").tolist()
    least, most = _find_extremes(rows)
    ends = max(value - high * error, least), min(value - low * error, most)
    return (value, *ends) if all(map(isfinite, ends)) else (value, nan, nan)


def _find_extremes(rows: Sequence[Tensor]) -> tuple[float, float]:
    """Return the least and the largest that the mean could be if all items were as the most extreme ones.

    Where one item is far from the others, resamples without it have next to no spread, and the interval would end many
    times beyond any item: at 18 nats for the KL of 48 prompts, in one run of `informed`.
    """
    ends = [(float(row.min()), float(row.max())) for row in rows]
    return ends[0][0] - sum(high for _, high in ends[1:]), ends[0][1] - sum(low for low, _ in ends[1:])


def _is_enough(row: Tensor) -> bool:
    """Return whether a sample has an interval: it is finite, and enough of its items differ."""
    if len(row) < LEAST or not bool(row.isfinite().all()):
        return False
    return len(row) - int(row.unique(return_counts=True)[1].max()) >= LEAST_DIFFERENT


def _resample(row: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return each resample's mean, less the sample's, and its squared standard error [resamples]."""
    centered, weights, n = row - row.mean(), _draw_weights(len(row), seed), len(row)
    mean = weights @ centered
    return mean, (weights @ centered.square() - mean.square()).clamp(min=0) / (n - 1)


@lru_cache(maxsize=8)
def _draw_weights(n: int, seed: int) -> Float[Tensor, "resamples n"]:
    """Return in how large a share of each resample an item is drawn."""
    picks = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(RESAMPLES, n, dtype=torch.float64)
    return torch.zeros(RESAMPLES, n, dtype=torch.float64).scatter_add_(1, picks, ones) / n


def _make_ratio(logs: tuple[float, float, float], n: int, unit: str) -> Score:
    """Return exp of a value and of the ends of its interval, infinite where a float cannot hold it."""
    value, low, high = (inf if x > LARGEST else exp(x) for x in logs)
    return Score(value=value, low=low, high=high, n=n, unit=unit)


def student_quantile(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5): to three digits from 3 degrees on."""
    z, v = Z, freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v**k for k, term in enumerate(terms, 1))


# ------------------------------------------------------------------------------------------------ quantiles
def quantile_score(values: Float[Tensor, " n"], q: float, unit: str) -> Score:
    """Return the q-quantile (0–1, interpolated) with the interval between two order statistics.

    There is none where the sample is too small for two that cover 95 % (David and Nagaraja 2003, section 7.1).
    """
    ordered, value = values.double().sort().values, float(torch.quantile(values.double(), q))
    ranks = choose_ranks(len(values), q)
    if ranks is None or not isfinite(value):
        return Score(value=value, low=nan, high=nan, n=len(values), unit=unit)
    low, high = (float(ordered[rank]) for rank in ranks)
    return Score(value=value, low=min(low, value), high=max(high, value), n=len(values), unit=unit)


@lru_cache(maxsize=256)
def choose_ranks(n: int, q: float) -> tuple[int, int] | None:
    """Return the ranks (from 0) of the order statistics between which the q-quantile lies nearest to 95 % of the time.

    None if no pair covers 93 to 97 % with at most 5 % on either side.
    """
    most = _binomial_tails(n, q)  # P(at most k of n items are below the quantile)
    lows = [rank for rank in range(n) if NEGLIGIBLE <= most[rank] <= MOST_OUTSIDE]
    highs = [rank for rank in range(n) if NEGLIGIBLE <= 1 - most[rank] <= MOST_OUTSIDE]
    pairs = [(most[high] - most[low], low, high) for low in lows for high in highs if low < high]
    fitting = [pair for pair in pairs if LEAST_COVERAGE <= pair[0] <= MOST_COVERAGE]
    return min(fitting, key=lambda pair: (abs(pair[0] - LEVEL), pair[2] - pair[1]))[1:] if fitting else None


def _binomial_tails(n: int, q: float) -> list[float]:
    steps = range(n + 1)
    logs = [lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) + k * log(q) + (n - k) * log1p(-q) for k in steps]
    return list(accumulate(map(exp, logs)))


# ---------------------------------------------------------------------------------------------------- kappa
def kappa_score(said: Sequence[bool], labels: Sequence[bool]) -> Score:
    """Return Cohen's kappa (Cohen 1960), 1 where both say one thing only, with an interval.

    The interval is that of kappa's large-sample variance (Fleiss, Cohen and Everitt 1969) with half an observation
    added to each cell, without which it is empty at full agreement.
    """
    n = len(said)
    cells = [sum(pair == cell for pair in zip(said, labels, strict=True)) for cell in CELLS]
    value, _ = _kappa([cell / n for cell in cells])
    middle, variance = _kappa([(cell + 0.5) / (n + 2) for cell in cells])
    half = Z * sqrt(variance / (n + 2))
    low, high = min(value, max(-1.0, middle - half)), max(value, min(1.0, middle + half))
    return Score(value=value, low=low, high=high, n=n, unit="kappa")


CELLS = ((True, True), (True, False), (False, True), (False, False))


def _kappa(shares: Sequence[float]) -> tuple[float, float]:
    """Return kappa, and n times its variance, from the shares of `CELLS`."""
    a, b, c, d = shares
    one, two, agree = a + b, a + c, a + d
    chance = one * two + (1 - one) * (1 - two)
    if chance >= 1:
        return 1.0, 0.0
    k = (agree - chance) / (1 - chance)
    diagonal = a * (1 - (one + two) * (1 - k)) ** 2 + d * (1 - (2 - one - two) * (1 - k)) ** 2
    off = (1 - k) ** 2 * (b * (two + 1 - one) ** 2 + c * (one + 1 - two) ** 2)
    variance = (diagonal + off - (k - chance * (1 - k)) ** 2) / (1 - chance) ** 2
    return k, max(0.0, variance)
