"""Wilson and bootstrap intervals, against formulas written out anew and by their coverage."""

from __future__ import annotations

from math import comb, log, sqrt

import pytest
import torch

from obliteratus.verify.intervals import bootstrap, mean, paired_ratio, quantile, wilson_rate


@pytest.mark.parametrize(("hits", "n"), [(0, 48), (1, 48), (24, 48), (47, 48), (48, 48), (0, 1), (1, 1), (3, 7)])
def test_wilson_ends_solve_its_equation(hits: int, n: int) -> None:
    """Both ends p of the interval satisfy |p̂ − p| = z √(p(1 − p)/n): Wilson's definition."""
    found, z = wilson_rate(hits, n), 1.959963984540054
    for end in (found.low, found.high):
        p = hits / n
        assert abs(p - end) == pytest.approx(z * sqrt(end * (1 - end) / n), abs=1e-9) or end == p
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert (found.n, found.unit) == (n, "share")


def test_wilson_known_values() -> None:
    found = wilson_rate(0, 48)
    assert (found.low, found.high) == (0.0, pytest.approx(0.07410, abs=1e-4))
    found = wilson_rate(8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    with pytest.raises(ValueError, match="at least one"):
        wilson_rate(0, 0)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_wilson_covers(p: float) -> None:
    """Exact coverage over the binomial distribution of 40 draws."""
    n = 40
    covered = sum(
        comb(n, k) * p**k * (1 - p) ** (n - k)
        for k in range(n + 1)
        if wilson_rate(k, n).low <= p <= wilson_rate(k, n).high
    )
    assert covered > 0.92


def test_the_bootstrap_covers_the_mean() -> None:
    generator, hits, narrow = torch.Generator().manual_seed(0), 0, 0
    for _ in range(200):
        values = torch.randn(40, generator=generator).exp()
        found = bootstrap(values, mean, "x")
        hits += found.low <= 1.6487 <= found.high
        narrow += found.value - 0.02 <= 1.6487 <= found.value + 0.02
    assert hits / 200 > 0.85  # a percentile interval of 40 skewed values falls somewhat short of 95 %
    assert narrow / 200 < 0.2  # negative control: a much narrower one does not cover


def test_the_bootstrap_is_seeded_and_holds_its_value() -> None:
    values = torch.arange(20.0)
    found = bootstrap(values, quantile(0.95), "nats")
    assert found == bootstrap(values, quantile(0.95), "nats")
    assert found.value == pytest.approx(18.05)
    assert found.low <= found.value <= found.high
    assert found != bootstrap(values, quantile(0.95), "nats", seed=1)
    constant = bootstrap(torch.full((9,), 2.0), mean, "x")
    assert (constant.low, constant.value, constant.high) == (2, 2, 2)


def test_pairs_cancel_the_texts_difficulty() -> None:
    before = torch.linspace(0, 10, 30)
    found = paired_ratio(before + log(2), before)
    assert found.value == pytest.approx(2)
    assert found.high - found.low < 1e-5
    with_noise = bootstrap(before + log(2), mean, "nats")
    assert with_noise.high - with_noise.low > 1  # unpaired, the texts' difference is all there is
