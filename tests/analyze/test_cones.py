"""Concept cones: categories with directions of their own are found; those of one direction, or of none, are not."""

from __future__ import annotations

from math import exp, log

import numpy
import pytest
import torch
from tests.support.contexts import activations_of, check_finding, context_of_activations, prompts_of_categories
from torch import Tensor

from obliteratus.analyze import analyze
from obliteratus.analyze.cones import (
    Cones,
    bootstrap_category_weights,
    compute_cosines,
    compute_effective_rank,
    compute_inner_products,
    group_by_category,
)
from obliteratus.analyze.samples import Sample
from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet

WIDTH, EACH = 32, 20
NAMES = [c for c in ("stars", "rivers", "music") for _ in range(EACH)]


def run(shift: Tensor, names: PromptSet | None = None, seed: int = 0, **options: object) -> Cones:
    """``shift`` [categories, streams, width] is added to each category of the target."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, len(NAMES), shift.shape[1], WIDTH, generator=generator)
    rows[0] += shift.repeat_interleave(EACH, 0)
    context = context_of_activations(activations_of(rows[0], rows[1]), prompts=names or prompts_of_categories(*NAMES))
    found = analyze(context, [Step(use="cones", draws=99, **options)])["cones"]
    assert isinstance(found, Cones)
    return found


def planted() -> Tensor:
    """Stream 0: nothing. Stream 1: one direction for all. Stream 2: stars and rivers share one, music has another."""
    shift = torch.zeros(3, 3, WIDTH)
    shift[:, 1, 0] = 6
    shift[:2, 2, 0], shift[2, 2, 1] = 6, 6
    return shift


def test_finds_directions_of_their_own() -> None:
    found = run(planted(), stream=2)
    assert found.significant == (2,)
    assert found.names == ("stars", "rivers", "music")
    assert found.rank[1] < 1.3
    # Two of three at right angles to the third: shares 2/3 and 1/3.
    assert found.rank[2] == pytest.approx(exp(-(2 / 3) * log(2 / 3) - (1 / 3) * log(1 / 3)), abs=0.15)
    assert found.cosine[0][1].low > 0.7
    assert found.cosine[0][2].high < 0.4
    assert found.cosine[0][0].value == pytest.approx(1)
    assert check_finding(found)["categories"] == dict.fromkeys(found.names, EACH)


def test_one_direction_is_no_cone() -> None:
    found = run(planted()[:, :2])
    assert found.significant == ()
    assert found.stream == 1  # where the groups differ most
    assert "no sign" in found.summary()
    check_finding(found)


def test_finds_nothing_in_one_population() -> None:
    """Few prompts alone make a rank near the number of categories: a fixed threshold would call that a cone."""
    found = run(torch.zeros(3, 4, WIDTH))
    assert found.rank.min() > 1.8
    assert found.significant == ()


def test_categories_that_mean_nothing_are_not_found() -> None:
    """The real structure of stream 2, but labels drawn by chance."""
    order = torch.randperm(len(NAMES), generator=torch.Generator().manual_seed(4)).tolist()
    found = run(planted(), prompts_of_categories(*(NAMES[i] for i in order)))
    assert found.significant == ()


@pytest.mark.parametrize(("length", "truth"), [(20, 0.5), (4, 0.5), (4, 0.9)])
def test_intervals_hold_the_cosine_of_many_prompts(length: float, truth: float) -> None:
    """20 prompts a category: at a length of 4, noise alone would take 0.9 down to 0.8."""
    shift = torch.zeros(2, 1, WIDTH)
    shift[:, 0, 0] = length
    shift[1, 0, :2] = torch.tensor([length * truth, length * (1 - truth**2) ** 0.5])
    member = torch.block_diag(torch.ones(1, EACH), torch.ones(1, EACH)).double()
    found = []
    for seed in range(100):
        rows = torch.randn(2, 2 * EACH, 1, WIDTH, generator=torch.Generator().manual_seed(seed))
        rows[0] += shift.repeat_interleave(EACH, 0)
        found.append(compute_cosines(Sample(rows[0], rows[1]), 0, member, 200, seed)[0][1])
    assert sum(s.value for s in found) / 100 == pytest.approx(truth, abs=0.02)
    assert sum(s.low <= truth <= s.high for s in found) >= 90  # 95 % of 100, less two standard errors


def test_products_are_those_of_different_prompts() -> None:
    """Against loops over pairs, in float64, for prompts drawn twice as well."""
    x = numpy.random.default_rng(1).normal(size=(9, 4))
    weights = bootstrap_category_weights(
        torch.block_diag(torch.ones(1, 3), torch.ones(1, 2)).double(), torch.ones(1, 4).double(), 3, 0
    )
    found = compute_inner_products(torch.tensor(x @ x.T), weights)
    for draw in range(4):
        w = weights[draw].numpy()

        def inner(g: int, h: int, w: numpy.ndarray = w) -> float:
            pairs = [(w[g, i] * w[h, j], x[i] @ x[j]) for i in range(9) for j in range(9) if g != h or i != j]
            total = sum(share for share, _ in pairs)
            return sum(share * value for share, value in pairs) / total if total > 1e-9 else 0.0

        for i in range(2):
            for j in range(2):
                expected = inner(i, j) - inner(i, 2) - inner(j, 2) + inner(2, 2)
                assert float(found[draw, i, j]) == pytest.approx(expected, abs=1e-6)


def test_golden() -> None:
    x = numpy.random.default_rng(0).normal(size=(4, 9))
    sigma = numpy.linalg.svd(x, compute_uv=False) ** 2
    shares = sigma / sigma.sum()
    assert float(compute_effective_rank(torch.tensor(x @ x.T))) == pytest.approx(
        numpy.exp(-(shares * numpy.log(shares)).sum())
    )
    assert float(compute_effective_rank(torch.eye(5).double())) == pytest.approx(5)
    assert float(compute_effective_rank(torch.ones(5, 5).double())) == pytest.approx(1)
    assert float(compute_effective_rank(torch.zeros(2, 2).double())) == 0


def test_small_and_nameless_categories_are_left_out() -> None:
    names, member = group_by_category(["a", "", "b", "a", "b", "c"], 2)
    assert names == ("a", "b")
    assert member.tolist() == [[1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 1, 0]]
    with pytest.raises(UserError, match="give prompts a category"):
        group_by_category(["a", "a", "b"], 2)
    with pytest.raises(UserError, match="got none"):
        group_by_category(["", ""], 2)


def test_a_stream_that_is_not_there() -> None:
    with pytest.raises(UserError, match="run from 0 to 2"):
        run(planted(), stream=3)
