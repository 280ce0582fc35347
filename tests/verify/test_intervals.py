"""Intervals of scores, against formulas written out anew in float64."""

from __future__ import annotations

from math import comb, exp, log, nan, sqrt

import numpy as np
import pytest
import torch

from obliteratus.core.results import Score
from obliteratus.verify.intervals import (
    LEAST,
    choose_ranks,
    group_ratio,
    kappa_score,
    mean_score,
    paired_difference,
    paired_ratio,
    paired_share_change,
    perplexity_score,
    quantile_score,
    student_quantile,
    wilson_rate,
)

Z = 1.959963984540054


@pytest.mark.parametrize(("hits", "n"), [(0, 48), (1, 48), (24, 48), (47, 48), (48, 48), (0, 1), (1, 1), (3, 7)])
def test_wilson_ends_solve_its_equation(hits: int, n: int) -> None:
    """Both ends p of the interval satisfy |p̂ − p| = z √(p(1 − p)/n): Wilson's definition."""
    found = wilson_rate(hits, n)
    for end in (found.low, found.high):
        p = hits / n
        assert abs(p - end) == pytest.approx(Z * sqrt(end * (1 - end) / n), abs=1e-9) or end == p
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert (found.n, found.unit) == (n, "share")


def test_wilson_known_values() -> None:
    found = wilson_rate(0, 48)
    assert (found.low, found.high) == (0.0, pytest.approx(0.07410, abs=1e-4))
    found = wilson_rate(8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    with pytest.raises(ValueError, match="at least one"):
        wilson_rate(0, 0)


# ------------------------------------------------------------------------------------ changes of shares
def _pairs(both: int, gained: int, lost: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    after = [1.0] * (both + gained) + [0.0] * (lost + neither)
    before = [1.0] * both + [0.0] * gained + [1.0] * lost + [0.0] * neither
    return torch.tensor(after), torch.tensor(before)


def _likelihood(change: float, gained: int, lost: int, n: int) -> float:
    """Return Tango's statistic, with the share of lost items found by a search over its likelihood."""
    shares = np.linspace(max(0.0, -change), (1 - change) / 2, 400_001)[1:-1]
    won, rest = shares + change, 1 - 2 * shares - change
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = lost * np.log(shares) + (n - gained - lost) * np.log(rest) + (gained * np.log(won) if gained else 0.0)
    share = float(shares[np.nanargmax(terms)])
    return (gained - lost - n * change) / sqrt(n * (2 * share + change - change**2))


@pytest.mark.parametrize("cells", [(10, 4, 1, 15), (2, 0, 20, 2), (5, 5, 5, 5), (0, 1, 0, 40)])
def test_the_ends_of_a_change_of_shares_solve_tangos_equation(cells: tuple[int, int, int, int]) -> None:
    found = paired_share_change(*_pairs(*cells))
    n, (_, gained, lost, _) = sum(cells), cells
    assert found.value == pytest.approx((gained - lost) / n)
    assert _likelihood(found.low, gained, lost, n) == pytest.approx(Z, abs=2e-3)
    assert _likelihood(found.high, gained, lost, n) == pytest.approx(-Z, abs=2e-3)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_does_not_change_may_still_have_changed(share: float) -> None:
    same = torch.full((24,), share)
    found = paired_share_change(same, same)
    assert found.value == 0
    assert found.high == pytest.approx(-found.low) == pytest.approx(Z**2 / (24 + Z**2), abs=1e-6)  # its closed form


# ------------------------------------------------------------------------------------------ means and ratios
def _bootstrap_t(values: np.ndarray, level: float) -> tuple[float, float]:
    """Efron's bootstrap-t, resample by resample, with numpy's random numbers."""
    rng, n, mean = np.random.default_rng(0), len(values), values.mean()
    t = []
    for _ in range(4000):
        drawn = values[rng.integers(n, size=n)]
        t.append((drawn.mean() - mean) / (drawn.std(ddof=1) / sqrt(n)))
    low, high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2])
    error = values.std(ddof=1) / sqrt(n)
    return float(mean - high * error), float(mean - low * error)


def test_a_mean_has_the_interval_of_the_bootstrap_t() -> None:
    values = np.random.default_rng(1).lognormal(size=60)
    found = mean_score(torch.tensor(values), "nats")
    low, high = _bootstrap_t(values, 0.965)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == (pytest.approx(low, rel=0.05), pytest.approx(high, rel=0.05))
    percentile = np.quantile(values[np.random.default_rng(2).integers(60, size=(4000, 60))].mean(1), [0.025, 0.975])
    assert found.high > percentile[1] * 1.05  # a percentile interval is too short where values are skewed to the right


def test_large_samples_have_students_interval() -> None:
    values = torch.rand(2100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, half = mean_score(values, "x"), Z * float(values.std()) / sqrt(2100)
    assert (found.low, found.high) == (pytest.approx(found.value - half), pytest.approx(found.value + half))
    inside = mean_score(values[:2000], "x")  # the last sample that is resampled has nearly the same
    assert inside.high - inside.low == pytest.approx(2 * half * sqrt(2100 / 2000), rel=0.15)


def test_ratios_are_those_of_the_mean_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(40, generator=generator, dtype=torch.float64) for _ in range(2))
    plain, paired = mean_score(one, "x"), paired_difference(one, two, "x")
    found = perplexity_score(one)
    assert (found.low, found.high) == (pytest.approx(exp(plain.low)), pytest.approx(exp(plain.high)))
    ratio = paired_ratio(one, two)
    assert (ratio.value, ratio.low) == (pytest.approx(exp(paired.value)), pytest.approx(exp(paired.low)))
    groups = group_ratio(one, two)
    assert (groups.value, groups.n) == (pytest.approx(ratio.value), 80)
    assert group_ratio(two, one).value == pytest.approx(1 / groups.value)


def test_pairs_cancel_the_texts_difficulty() -> None:
    before = torch.linspace(0, 10, 30)
    after = before + log(2) + 1e-3 * torch.randn(30, generator=torch.Generator().manual_seed(0))
    found = paired_ratio(after, before)
    assert found.value == pytest.approx(2, abs=1e-3)
    assert found.high - found.low < 5e-3
    unpaired = mean_score(after, "nats")
    assert unpaired.high - unpaired.low > 1  # unpaired, the texts' difference is all there is


def test_intervals_are_seeded() -> None:
    values = torch.rand(40, generator=torch.Generator().manual_seed(0))
    assert mean_score(values, "x") == mean_score(values, "x")
    assert mean_score(values, "x") != mean_score(values, "x", seed=1)


@pytest.mark.parametrize(
    "values",
    [
        torch.arange(LEAST - 1.0),  # too few
        torch.full((60,), 2.0),  # none differs
        torch.cat([torch.zeros(51), torch.arange(1.0, 10.0)]),  # nine differ from the others
        torch.cat([torch.arange(40.0), torch.tensor([nan])]),
        torch.cat([torch.arange(40.0), torch.tensor([torch.inf])]),
    ],
)
def test_a_sample_that_says_too_little_has_no_interval(values: torch.Tensor) -> None:
    found = mean_score(values, "x")
    assert not found.has_interval
    assert not found.low < found.value
    assert not perplexity_score(values).has_interval


def test_a_missing_interval_is_null_in_json_and_equal_to_itself() -> None:
    score = mean_score(torch.arange(3.0), "x")
    assert '"low":null' in score.model_dump_json()
    assert score.model_dump()["high"] is None
    assert Score.model_validate_json(score.model_dump_json()) == score == Score(**score.model_dump())
    given = mean_score(torch.arange(30.0), "x")
    assert given.has_interval
    assert given != score


# ------------------------------------------------------------------------------------------------- quantiles
def _cover(n: int, q: float, low: int, high: int) -> float:
    """Return how often the q-quantile of a continuous variable lies between two order statistics (ranks from 0)."""
    return sum(comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(low + 1, high + 1))


@pytest.mark.parametrize(("n", "q"), [(64, 0.95), (96, 0.95), (200, 0.95), (400, 0.95), (400, 0.99), (30, 0.5)])
def test_order_statistics_cover_what_they_say(n: int, q: float) -> None:
    ranks = choose_ranks(n, q)
    assert ranks is not None
    assert 0.93 <= _cover(n, q, *ranks) <= 0.97
    values = torch.randperm(n, generator=torch.Generator().manual_seed(0)).double()
    found = quantile_score(values, q, "nats")
    assert (found.low, found.high) == tuple(map(float, ranks))
    assert found.value == pytest.approx(np.quantile(values.numpy(), q))


@pytest.mark.parametrize(("n", "q"), [(24, 0.95), (48, 0.95), (96, 0.99), (200, 0.99)])
def test_a_quantile_beyond_the_sample_has_no_interval(n: int, q: float) -> None:
    assert all(not 0.93 <= _cover(n, q, low, n - 1) <= 0.97 for low in range(n - 1))  # no pair of ranks would do
    assert not quantile_score(torch.rand(n), q, "nats").has_interval


@pytest.mark.parametrize(("freedom", "quantile"), [(5, 2.570582), (10, 2.228139), (30, 2.042272), (100, 1.983972)])
def test_students_quantile(freedom: float, quantile: float) -> None:
    assert student_quantile(float(freedom)) == pytest.approx(quantile, abs=1e-3)  # of published tables


# ----------------------------------------------------------------------------------------------------- kappa
def test_kappas_interval_follows_from_the_variance_of_its_smoothed_table() -> None:
    """Fleiss, Cohen and Everitt 1969, summed over all cells of the table as their paper writes it."""
    said = [True] * 30 + [True] * 4 + [False] * 6 + [False] * 60
    labels = [True] * 30 + [False] * 4 + [True] * 6 + [False] * 60
    p = np.array([[30.5, 4.5], [6.5, 60.5]]) / 102
    row, column = p.sum(1), p.sum(0)
    observed, expected = p.trace(), float(row @ column)
    kappa = (observed - expected) / (1 - expected)
    total = sum(p[i, i] * ((1 - expected) - (column[i] + row[i]) * (1 - observed)) ** 2 for i in range(2))
    total += (1 - observed) ** 2 * sum(
        p[i, j] * (column[i] + row[j]) ** 2 for i in range(2) for j in range(2) if i != j
    )
    total -= (observed * expected - 2 * expected + observed) ** 2
    half = Z * sqrt(total / (102 * (1 - expected) ** 4))
    found = kappa_score(said, labels)
    assert (found.low, found.high) == (pytest.approx(kappa - half), pytest.approx(kappa + half))


def test_full_agreement_has_a_width() -> None:
    found = kappa_score([True] * 20 + [False] * 20, [True] * 20 + [False] * 20)
    assert (found.value, found.high) == (1, 1)
    assert 0.8 < found.low < 0.99


def test_one_far_item_does_not_send_an_end_beyond_all_items() -> None:
    """The bootstrap-t alone would: resamples without that item have next to no spread."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([0.01 * torch.rand(47, generator=generator), torch.tensor([2.0])])
    score = mean_score(values, "nats")
    assert score.value < score.high <= 2.0
    assert float(values.min()) <= score.low < score.value
    ratio = paired_ratio(values, torch.zeros(48))
    assert ratio.high <= 2.0**3  # e² of the largest
