"""Intervals cover what they say, or are not given: simulations of `bench.coverage` with seeds of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bench.coverage import SIZES, Case, list_cases, measure_coverage

from obliteratus.core.results import Score

DRAWS = 600
# The standard error of a coverage of 95 % over 600 draws is 0.9 points, so true ones of 93 to 97 % may show 1.5 more.
LOW, HIGH = 0.915, 0.985
CASES = list_cases()
# A change of few of 24 items and an agreement of nearly all are covered more often: the interval cannot be as short.
NEVER_TOO_SHORT = ("change of shares, of few", "kappa, 0.9")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n", [24, 200])
def test_an_interval_covers_95_percent(name: str, n: int) -> None:
    found = measure_coverage(CASES[name], n, DRAWS, seed=1)
    if not found.given:
        assert name.startswith("p99") or (name.startswith("p95") and n < 59)
        return
    assert found.covered >= LOW
    assert found.covered <= (1 if name.startswith(NEVER_TOO_SHORT) else HIGH)


def percentile(rng: np.random.Generator, n: int) -> Score:
    values = rng.lognormal(size=n)
    means = values[rng.integers(n, size=(300, n))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Score(value=float(values.mean()), low=float(low), high=float(high), n=n, unit="x")


def percentile_p95(rng: np.random.Generator, n: int) -> Score:
    values = rng.lognormal(size=n)
    low, high = np.quantile(np.quantile(values[rng.integers(n, size=(300, n))], 0.95, axis=1), [0.025, 0.975])
    return Score(value=0.0, low=float(low), high=float(high), n=n, unit="x")


def test_the_percentile_bootstrap_does_not_cover() -> None:
    """Negative control: the simulation finds what is wrong with the most usual bootstrap interval."""
    assert measure_coverage(Case(percentile, float(np.exp(0.5))), 24, DRAWS, seed=1).covered < 0.89
    assert measure_coverage(Case(percentile_p95, float(np.exp(1.6448536))), 24, DRAWS, seed=1).covered < 0.8


def test_the_sizes_are_those_of_the_table() -> None:
    assert SIZES == (24, 48, 96, 200)
    assert torch.tensor(SIZES).min() >= 16  # below, means have no interval
