"""Generalized eigenvectors: the dense formula in float64, several directions without categories, and a null."""

from __future__ import annotations

import pytest
import torch
from tests.support.planted import make_moments, planted, shuffled
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations
from obliteratus.distill import find_directions
from obliteratus.excise.linear import project

WIDTH, N = 24, 400


def askew(seed: int = 0) -> Activations:
    """Control prompts whose covariance is far from round; half of the target prompts shift one way, half another."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) * torch.logspace(0, 1.5, WIDTH)
    rows = torch.randn(2, N, 2, WIDTH, generator=generator) @ mix
    ways = 30 * torch.randn(2, WIDTH, generator=generator)
    rows[0, ::2] += ways[0]
    rows[0, 1::2] += ways[1]
    return Activations({"target": make_moments(rows[0]), "control": make_moments(rows[1])}, -1)


def dense(acts: Activations, k: int) -> tuple[Tensor, Tensor]:
    """The λ and the projection, by dense matrices in float64, without shrinkage."""
    target, control = (acts[g].rows[:, 1].double() for g in ("target", "control"))
    about = target - control.mean(0)
    half = torch.linalg.inv(torch.linalg.cholesky(torch.cov(control.T)))
    values, vectors = torch.linalg.eigh(half @ (about.T @ about / len(about)) @ half.T)
    v = half.T @ vectors.flip(1)[:, :k]
    b = torch.cov(control.T) @ v
    return values.flip(0)[:k], torch.eye(WIDTH).double() - b @ torch.linalg.inv(v.T @ b) @ v.T


@pytest.mark.parametrize("k", [1, 2, 5])
def test_it_is_the_dense_solution(k: int) -> None:
    acts = askew()
    found = find_directions(acts, [Step(use="generalized_eigen", k=k, shrinkage=1e-9)])
    values, projection = dense(acts, k)
    mine = torch.eye(WIDTH).double() - found.basis[1].double().T @ found.covectors[1].double()
    torch.testing.assert_close(mine, projection, rtol=1e-3, atol=1e-3 * float(projection.abs().max()))
    torch.testing.assert_close(found.raw[1].double(), values.sum(), rtol=1e-3, atol=0.0)


def test_two_directions_remove_two_shifts_and_one_does_not() -> None:
    acts = askew()
    left = []
    for k in (1, 2):
        found = find_directions(acts, [Step(use="generalized_eigen", k=k, shrinkage=1e-6)])
        rows, control = (project(acts[g].rows[:, 1], found.basis[1], 1.0, found.covectors[1]) for g in acts.groups)
        left.append([float((rows[i::2].mean(0) - control.mean(0)).norm()) for i in (0, 1)])
    bare = [float((acts["target"].rows[i::2, 1].mean(0) - acts["control"].rows[:, 1].mean(0)).norm()) for i in (0, 1)]
    assert max(left[1]) < 0.1 * min(bare)
    assert max(left[0]) > 3 * max(left[1])


def test_it_finds_the_planted_direction_and_in_shuffled_groups_nothing() -> None:
    acts, truth = planted()
    step = [Step(use="generalized_eigen")]
    found, null = find_directions(acts, step), find_directions(shuffled(acts), step)
    assert float((found.basis[1:, 0] * truth[1:]).sum(1).min()) > 0.8
    assert float(null.raw[1:].max()) < 0.5 * float(found.raw[1:].min())
    assert not found.basis[0].any()


def test_too_few_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="k=40 directions need at least 40 target prompts; got 20"):
        find_directions(planted(n=20)[0], [Step(use="generalized_eigen", k=40)])
