"""Limits from permutations hold their level, and agree with tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from obliteratus.analyze.significance import (
    Contrast,
    compute_ratio_limit,
    contrast_between_groups,
    contrast_within_pairs,
    estimate_degrees_of_freedom,
)


def false_alarms(draw: Any) -> int:
    return sum(bool(draw(torch.Generator().manual_seed(seed)).significant) for seed in range(200))


def test_permuted_limits_hold_their_level() -> None:
    def draw(g: torch.Generator) -> Contrast:
        scale = torch.logspace(-2, 2, 30)
        return contrast_between_groups(
            torch.randn(10, 30, generator=g) * scale, 3 + torch.randn(14, 30, generator=g) * scale - 3
        )

    assert false_alarms(draw) <= 18  # 10 of 200 expected; 18 or more by chance in one of a hundred


def test_flipped_limits_hold_their_level() -> None:
    assert false_alarms(lambda g: contrast_within_pairs(torch.randn(9, 20, generator=g))) <= 18


def test_a_shift_is_found_and_only_it() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 20, generator=g)
    rows[:20, 7] += 3
    assert contrast_between_groups(rows[:20], rows[20:]).significant == [7]
    assert contrast_within_pairs(rows[:20]).significant == [7]


def test_limits_of_ratios_are_those_of_tables() -> None:
    assert compute_ratio_limit(1, 4, 3.0) == pytest.approx(3.490, rel=0.06)  # F of 3 and 12 degrees, 95 %
    assert compute_ratio_limit(10, 2, 6.0) == pytest.approx(5.724, rel=0.1)  # F of 6 and 12 degrees at 0.95^(1/10)


def test_degrees_of_freedom_are_read_off_the_spread_of_logarithms() -> None:
    for freedom in (1.0, 4.0, 50.0):
        draws = torch.distributions.Chi2(torch.tensor(freedom)).sample((200000,))
        assert estimate_degrees_of_freedom(float(draws.log().var())) == pytest.approx(freedom, rel=0.05)
