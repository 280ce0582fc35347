"""Folds, held-out projections and p values against computations by hand."""

from __future__ import annotations

import numpy
import pytest
import torch

from obliteratus.analyze.samples import (
    d_prime,
    draw_permutations,
    familywise_p_values,
    identity_order,
    project_held_out,
    split_folds,
)


def test_held_out_scores_are_those_of_a_loop_in_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(30, 12, generator=generator).double() + 3
    plan, order = split_folds(13, 17, 4, seed=2), draw_permutations(30, 3, seed=3)
    found = project_held_out(rows @ rows.T, plan, order)
    for draw in range(4):
        x = rows.numpy()[order[draw].numpy()]
        for i in range(30):
            outside = (plan.fold != plan.fold[i]).numpy()
            one, two = x[:13][outside[:13]].mean(0), x[13:][outside[13:]].mean(0)
            along = (one - two) / numpy.linalg.norm(one - two)
            numpy.testing.assert_allclose(found[draw, i], (x[i] - (one + two) / 2) @ along, rtol=1e-9)


def test_folds_are_even_and_of_both_groups() -> None:
    plan = split_folds(13, 17, 4)
    for part in (plan.fold[:13], plan.fold[13:]):
        counts = torch.bincount(part)
        assert counts.max() - counts.min() <= 1
    assert int(split_folds(3, 17, 5).fold.max()) == 2  # no more folds than the smaller group has prompts
    assert identity_order(3).tolist() == [[0, 1, 2]]


def test_family_wise_p_by_hand() -> None:
    statistics = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, -1.0], [2.0, 0.5]], dtype=torch.float64)
    z = (statistics - statistics.mean(0)) / statistics.std(0)
    by_hand = [sum(bool(z[b].max() >= z[0, s]) for b in range(4)) / 4 for s in range(2)]
    assert familywise_p_values(statistics).tolist() == by_hand


def test_d_prime_by_hand() -> None:
    one, two = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 2.0, 1.0, 1.0])
    by_hand = (3 - 1) / numpy.sqrt((4 + 2 / 3) / 2)
    assert float(d_prime(one, two)) == pytest.approx(by_hand)
    assert float(d_prime(torch.ones(4), torch.ones(4))) == 0
