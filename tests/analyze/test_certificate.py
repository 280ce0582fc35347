"""The certificate: finds what is there, is exact about chance, and agrees with a computation of its own."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import binom
from tests.support.contexts import check_finding, context_of_activations, one_population
from tests.support.planted import planted, shuffled

from obliteratus.analyze import analyze
from obliteratus.analyze.certificate import Certificate, certify
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
    """Over 200 permutations of the labels of prompts that do differ: within the binomial interval of 0.05."""
    acts = planted(n=24)[0]
    hits = 0
    for seed in range(200):
        rows = shuffled(acts, seed).groups
        found = certify(
            rows["target"].rows[:, :4, :24],
            rows["control"].rows[:, :4, :24],
            draws=39,  # p of 1 or 2 in 40 is found
            folds=4,
            standardize=standardize,
            seed=1000 + 2 * seed,
        )
        hits += found.signal
    low, high = binom.interval(0.95, 200, 0.05)
    assert low <= hits <= high, hits


def test_a_weak_difference_behind_massive_dimensions_needs_standardizing() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 80, 1, 32, generator=generator)
    rows[..., :3] *= 300
    rows[0, :, 0, 10:14] += 0.8
    assert certify(rows[0], rows[1], draws=99).signal
    assert not certify(rows[0], rows[1], draws=99, standardize=False).signal


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
