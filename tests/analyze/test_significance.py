"""Limits from permutations hold their level, and agree with tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from obliteratus.analyze.significance import (
    Contrast,
    contrast_between_groups,
    contrast_within_pairs,
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


@pytest.mark.parametrize("pairs", [6, 8, 12])
def test_two_families_hold_one_level_together(pairs: int) -> None:
    """With a limit of its own for each, as many again are found."""

    def draw(g: torch.Generator) -> Contrast:
        return contrast_within_pairs(torch.randn(pairs, 40, generator=g))

    assert false_alarms(draw) <= 21  # the binomial's 99.9 % point
    whole = draw(torch.Generator().manual_seed(0))
    first, others = whole.split(15)
    assert first.limit == others.limit == whole.limit
    assert torch.equal(torch.cat([first.t, others.t]), whole.t)
    rows = torch.randn(pairs, 40, generator=torch.Generator().manual_seed(0))
    assert min(contrast_within_pairs(part).limit for part in (rows[:, :15], rows[:, 15:])) < whole.limit


def test_fewer_than_six_pairs_show_nothing() -> None:
    for pairs in range(1, 6):
        assert contrast_within_pairs(torch.ones(pairs, 3) + 0.01 * torch.rand(pairs, 3)).significant == []
    assert contrast_within_pairs(torch.ones(6, 3) + 0.01 * torch.rand(6, 3)).significant


def test_all_sign_flips_are_tried_where_they_are_few() -> None:
    """The limit of eight pairs is an order statistic of 128 patterns, computed apart."""
    rows = torch.randn(8, 5, generator=torch.Generator().manual_seed(4)).double()
    largest = []
    for number in range(128):
        flipped = rows * torch.tensor([1 - 2.0 * (number >> i & 1) for i in range(8)]).double()[:, None]
        largest.append(float((flipped.mean(0) / (flipped.std(0) / 8**0.5)).abs().max()))
    expected = sorted(largest, reverse=True)[6]  # at most 5 % of 128 are beyond
    assert contrast_within_pairs(rows).limit == pytest.approx(expected, rel=1e-6)
