"""The AUC and its interval against references."""

from __future__ import annotations

import numpy
import pytest
import torch
from scipy.stats import mannwhitneyu, norm

from obliteratus.analyze.auc import delong_auc, newcombe_interval, pairwise_auc


def test_auc_and_its_interval_agree_with_references() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(25, generator=generator) + 0.7, torch.randn(40, generator=generator)
    two[:5] = one[:5]  # ties
    found = delong_auc(one, two)
    x, y = one.double().numpy(), two.double().numpy()
    assert found.value == pytest.approx(mannwhitneyu(x, y).statistic / 25 / 40)
    placements = (
        [((y < v).mean() + (y == v).mean() / 2) for v in x],
        [((x > v).mean() + (x == v).mean() / 2) for v in y],
    )
    variance = numpy.var(placements[0], ddof=1) / 25 + numpy.var(placements[1], ddof=1) / 40
    assert found.high - found.low == pytest.approx(2 * norm.ppf(0.975) * variance**0.5)


def test_a_perfect_auc_has_an_interval() -> None:
    found = delong_auc(torch.arange(10.0) + 100, torch.arange(12.0))
    assert found.value == found.high == 1
    assert 0.7 < found.low < 0.95
    assert delong_auc(torch.zeros(10), torch.zeros(10)).value == 0.5
    wide, narrow = newcombe_interval(1.0, 10, 10), newcombe_interval(1.0, 100, 100)
    assert wide[0] < narrow[0]


def test_auc_counts_pairs() -> None:
    target, control = torch.tensor([[1.0, 2], [3, 2]]), torch.tensor([[2.0, 2], [0, 9]])
    assert pairwise_auc(target, control).tolist() == [0.75, 0.25]
