"""The certificate: finds what is there, is exact about chance, and agrees with a computation of its own."""

from __future__ import annotations

import numpy
import pytest
import torch
from scipy.stats import binom
from tests.support.contexts import check_finding, context_of_activations, one_population
from tests.support.planted import planted, shuffled

from obliteratus.analyze import analyze
from obliteratus.analyze.certificate import Certificate, certify
from obliteratus.analyze.samples import (
    draw_permutations,
    familywise_p_values,
    identity_order,
    project_held_out,
    split_folds,
)
from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations


def run(acts: Activations, **options: object) -> Certificate:
    found = analyze(context_of_activations(acts), [Step(use="certificate", draws=99, **options)])["certificate"]
    assert isinstance(found, Certificate)
    return found


def test_finds_a_planted_difference_everywhere_but_in_the_embeddings() -> None:
    found = run(planted()[0])
    assert found.significant == (1, 2, 3, 4)
    assert found.p[1:].tolist() == [0.01] * 4  # the least that 99 permutations can say
    assert found.d_prime[0] == 0
    assert (found.d_prime[1:] > 2).all()
    numbers = check_finding(found)
    assert numbers["signal"]
    assert numbers["prompts"] == {"target": 200, "control": 200}


def test_finds_nothing_in_one_population() -> None:
    found = run(one_population())
    assert not found.signal
    assert "no difference" in found.summary()
    check_finding(found)


@pytest.mark.parametrize("standardize", [True, False])
def test_false_positives_are_at_most_the_level(standardize: bool) -> None:
    """Over 100 permutations of the labels of prompts that do differ: within the binomial interval of 0.05."""
    acts = planted(n=24)[0]
    hits = 0
    for seed in range(100):
        rows = shuffled(acts, seed).groups
        found = certify(
            rows["target"].rows[:, :4, :24],
            rows["control"].rows[:, :4, :24],
            draws=99,
            folds=4,
            standardize=standardize,
            seed=1000 + 2 * seed,
        )
        hits += found.signal
    low, high = binom.interval(0.95, 100, 0.05)
    assert low <= hits <= high, hits


def test_a_weak_difference_behind_massive_dimensions_needs_standardizing() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 80, 1, 32, generator=generator)
    rows[..., :3] *= 300
    rows[0, :, 0, 10:14] += 0.8
    assert certify(rows[0], rows[1], draws=99).signal
    assert not certify(rows[0], rows[1], draws=99, standardize=False).signal


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


def test_thresholds_are_where_findings_begin() -> None:
    found = run(planted(shift=0.0)[0], level=0.05)
    assert bool((found.d_prime > found.threshold).any()) == found.signal


def test_the_old_name_of_an_option_gives_the_new_one() -> None:
    with pytest.raises(UserError, match="'standardise' is now called 'standardize'; change"):
        run(planted(n=4)[0], standardise=False)  # renamed


def test_needs_rows_and_prompts() -> None:
    with pytest.raises(UserError, match="set probe"):
        run(planted(keep=False)[0])
    with pytest.raises(UserError, match="at least 4"):
        run(planted(n=3)[0])
