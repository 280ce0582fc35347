"""Uncertainty of the mean difference: the angle is the one that theory gives, and halves of nothing do not agree."""

from __future__ import annotations

import numpy
import pytest
import torch
from tests.support.contexts import activations_of, check_finding, context_of_activations, one_population
from tests.support.planted import planted

from obliteratus.analyze import analyze
from obliteratus.analyze.samples import Sample
from obliteratus.analyze.uncertainty import (
    Uncertainty,
    compute_angles,
    compute_half_agreement,
    draw_bootstrap_weights,
    draw_half_weights,
)
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations


def run(acts: Activations) -> Uncertainty:
    found = analyze(context_of_activations(acts), [Step(use="uncertainty", draws=99, resamples=200)])["uncertainty"]
    assert isinstance(found, Uncertainty)
    return found


def test_a_planted_direction_is_agreed_on() -> None:
    found = run(planted()[0])
    assert found.significant == (1, 2, 3, 4)
    assert (found.halves[1:] > 0.8).all()
    assert found.halves[0] == 0
    assert found.angle[0] == 90
    check_finding(found)


@pytest.mark.parametrize("n", [50, 200])
def test_the_angle_is_the_sampling_error(n: int) -> None:
    """tan² of it is tr Σ (1/n + 1/m) / ‖δ‖²: 64 dimensions of variance 1 against a shift of 4."""
    found = run(planted(n=n)[0])
    expected = numpy.degrees(numpy.arctan(numpy.sqrt(64 * 2 / n) / 4))
    numpy.testing.assert_allclose(found.angle[1:], expected, rtol=0.12)
    assert (found.angle_high >= found.angle).all()


def test_finds_nothing_in_one_population() -> None:
    found = run(one_population())
    assert found.significant == ()
    assert (found.halves.abs() < 0.3).all()  # 64 dimensions: a cosine by chance is 0.12
    assert (found.angle[1:] > 35).all()
    assert "no direction" in found.summary()
    check_finding(found)


def test_few_prompts_are_less_sure() -> None:
    few, many = run(planted(n=12)[0]), run(planted(n=200)[0])
    assert (few.angle[1:] > 2 * many.angle[1:]).all()


def test_golden() -> None:
    """Against means of the very rows that the weights name, in float64."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(23, 1, 9, generator=generator)
    sample = Sample(rows[:12], rows[12:])
    x = sample.at(0)
    gram = x @ x.T
    weights = draw_bootstrap_weights(sample, 5, 1)
    vectors = (weights @ x).numpy()
    numpy.testing.assert_allclose(vectors[0], (rows[:12].double().mean(0) - rows[12:].double().mean(0))[0], atol=1e-6)
    cosines = vectors[1:] @ vectors[0] / numpy.linalg.norm(vectors[1:], axis=1) / numpy.linalg.norm(vectors[0])
    numpy.testing.assert_allclose(compute_angles(gram, weights), numpy.degrees(numpy.arccos(cosines)), rtol=1e-9)
    order = torch.randperm(23, generator=generator)
    parts = draw_half_weights(sample, 1, 2)
    one, two = (parts[0] @ x[order]).numpy()
    expected = one @ two / numpy.linalg.norm(one) / numpy.linalg.norm(two)
    numpy.testing.assert_allclose(compute_half_agreement(gram, parts, order[None])[0], expected, rtol=1e-9)


def test_halves_share_no_prompt() -> None:
    sample = Sample(torch.zeros(7, 1, 3), torch.zeros(8, 1, 3))
    parts = draw_half_weights(sample, 20, 0)
    assert ((parts[:, 0] != 0) ^ (parts[:, 1] != 0)).all()
    torch.testing.assert_close(parts[:, :, :7].sum(2), torch.ones(20, 2).double())
    torch.testing.assert_close(parts[:, :, 7:].sum(2), -torch.ones(20, 2).double())


def test_a_group_of_four_is_enough() -> None:
    run(activations_of(torch.randn(4, 2, 8), torch.randn(5, 2, 8)))
