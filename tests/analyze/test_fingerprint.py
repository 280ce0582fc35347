"""The fingerprint describes: planted oddities lie outside what permuted labels make, one population does not."""

from __future__ import annotations

import numpy
import pytest
import torch
from scipy.stats import kurtosis
from tests.support.contexts import activations_of, check_finding, context_of_activations, one_population
from tests.support.planted import planted

from obliteratus.analyze import analyses, analyze
from obliteratus.analyze.fingerprint import Fingerprint, compute_features, measure_fingerprint
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations

WIDTH = 32


def run(acts: Activations) -> Fingerprint:
    found = analyze(context_of_activations(acts), [Step(use="fingerprint", draws=59)])["fingerprint"]
    assert isinstance(found, Fingerprint)
    return found


def test_planted_oddities_are_described() -> None:
    """Stream 1: the target is longer. Stream 2: it is flat. Stream 3: five outliers carry the difference."""
    rows = torch.randn(2, 100, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    rows[0, :, 1] *= 1.5
    rows[0, :, 2, 2:] *= 0.1
    rows[0, :, 2, :2] *= 4
    rows[0, :5, 3, 0] += 30
    found = run(activations_of(rows[0], rows[1]))
    assert found.norm_ratio[1] == pytest.approx(1.5, abs=0.08)
    assert 1 in found.unusual["norm_ratio"]
    assert 2 in found.unusual["width"]
    assert found.width[2] < 3
    assert found.kurtosis[3] > 8
    assert all(0 not in streams for streams in found.unusual.values())
    assert check_finding(found)["prompts"] == {"target": 100, "control": 100}


def test_one_population_is_as_its_permutations() -> None:
    found = run(one_population())
    assert not any(found.unusual.values())
    assert "differs from permuted labels in nothing, at none of 5 streams" in found.summary()
    check_finding(found)


def test_oddities_give_no_verdict() -> None:
    """However unlike the groups are, the numbers are described and nothing is concluded from them."""
    found = run(planted(n=24)[0])
    assert any(found.unusual.values())
    assert found.summary().endswith("predicts nothing")
    assert not {"found", "signal", "p", "verdict"} & check_finding(found).keys()
    assert "predict nothing" in analyses["fingerprint"].about + (measure_fingerprint.__doc__ or "")


def test_golden() -> None:
    x = numpy.random.default_rng(0).normal(size=(30, 7)) + 2
    centered = x - x.mean(0)
    lengths = numpy.linalg.norm(x, axis=1)
    found = compute_features(torch.tensor(centered @ centered.T), torch.tensor(lengths), 12)
    one, two = x[:12], x[12:]
    assert float(found[0]) == pytest.approx(lengths[:12].mean() / lengths[12:].mean())
    delta = one.mean(0) - two.mean(0)
    assert float(found[1]) == pytest.approx(kurtosis(one @ delta))
    values = numpy.linalg.svd(one - two.mean(0), compute_uv=False) ** 2
    assert float(found[2]) == pytest.approx(values.sum() ** 2 / (values**2).sum())
