"""Separability: what theory says of planted shifts, silence on one population, and references of their own."""

from __future__ import annotations

import numpy
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import norm
from tests.support.contexts import activations_of, check_finding, context_of_activations, one_population
from tests.support.planted import planted

from obliteratus.analyze import analyze
from obliteratus.analyze.samples import draw_permutations, permute_d_prime, split_folds
from obliteratus.analyze.separability import (
    Separability,
    cross_validate_probe,
    estimate_variance_inflation,
    fit_logistic,
    score_stream,
)
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations


def run(acts: Activations) -> Separability:
    found = analyze(context_of_activations(acts), [Step(use="separability", draws=99)])["separability"]
    assert isinstance(found, Separability)
    return found


def test_a_planted_shift_is_told_apart_as_far_as_theory_says() -> None:
    """A shift of 4 along a direction known but for sampling error: d′ = 4 cos θ, with tan² θ as in uncertainty."""
    found = run(planted()[0])
    assert found.significant == (1, 2, 3, 4)
    expected = 4 * numpy.cos(numpy.arctan(numpy.sqrt(64 * 2 / 160) / 4))
    for gap, area, probe in list(zip(found.d_prime, found.auc, found.probe, strict=True))[1:]:
        assert gap.low < expected < gap.high
        assert area.value == pytest.approx(norm.cdf(expected / 2**0.5), abs=0.01)
        assert probe.value > 0.9
    numbers = check_finding(found)
    assert numbers["position"] == -1
    assert numbers["majority"] == 0.5
    assert found.auc[0].value == 0.5  # the template's last token: the same for all
    assert found.d_prime[0].value == 0


def test_finds_nothing_in_one_population() -> None:
    found = run(one_population())
    assert found.significant == ()
    assert all(abs(s.value - 0.5) < 0.12 for s in found.auc + found.probe)
    assert "no stream" in found.summary()
    check_finding(found)


def test_held_out_means_held_out() -> None:
    """With more dimensions than prompts any labels can be told apart on the prompts that were fitted; not on others."""
    target, control = torch.randn(2, 20, 2, 200, generator=torch.Generator().manual_seed(0))
    acts = activations_of(target, control)
    found = run(acts)
    assert found.significant == ()
    assert all(abs(s.value - 0.5) < 0.3 for s in found.auc)  # of 20 and 20 prompts: three standard errors
    rows = torch.cat([acts["target"].rows, acts["control"].rows])[:, 0].double()
    everyone, labels = torch.ones(40, dtype=torch.bool), torch.arange(40) < 20
    assert ((fit_logistic(rows @ rows.T, labels, everyone, 1e-3) > 0) == labels).all()


@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_intervals_cover_the_truth(shift: float) -> None:
    """Cross-fitted values are not independent. What a direction of 48 prompts is worth: the mean over 80 samples."""
    found = []
    for seed in range(80):
        rows = torch.randn(60, 32, generator=torch.Generator().manual_seed(seed)).double()
        rows[:30, 0] += shift
        gram, plan = rows @ rows.T, split_folds(30, 30, 5, seed)
        by = estimate_variance_inflation(permute_d_prime(gram, plan, draw_permutations(60, 99, seed))[1:], 30, 30)
        found.append(score_stream(gram, plan, 1.0, seed, by))
    for scores in zip(*found, strict=True):
        truth = sum(s.value for s in scores) / 80
        missed = sum(not s.low <= truth <= s.high for s in scores)
        assert missed <= 9, (scores[0].unit, missed)  # 4 is 5 %, and 9 its binomial upper end


def test_the_probe_is_the_minimum_that_another_optimizer_finds() -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(40, 6, generator=generator).double() * 5 + 2
    rows[:18, 0] += 6
    plan, labels = split_folds(18, 22, 4), (torch.arange(40) < 18).double().numpy() * 2 - 1
    found = cross_validate_probe(rows @ rows.T, plan, ridge=0.7)
    for fold in range(4):
        kept = plan.outside(fold).numpy()
        x = rows.numpy() - rows.numpy()[kept].mean(0)
        x = numpy.c_[x / numpy.sqrt((x[kept] ** 2).sum(1).mean()), numpy.ones(40)]

        def loss(w: numpy.ndarray, x: numpy.ndarray = x, kept: numpy.ndarray = kept) -> float:
            return float(numpy.logaddexp(0, -labels[kept] * (x[kept] @ w)).sum() + 0.35 * w @ w)

        best = minimize(loss, numpy.zeros(7), method="BFGS", options={"gtol": 1e-9}).x
        numpy.testing.assert_allclose(found[~plan.outside(fold)], x[~kept] @ best, atol=1e-4)


def test_the_probe_survives_groups_that_lie_far_apart() -> None:
    rows = torch.randn(30, 4).double()
    rows[:15] += 1e4
    assert torch.isfinite(cross_validate_probe(rows @ rows.T, split_folds(15, 15, 3), ridge=1e-4)).all()
