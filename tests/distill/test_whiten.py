"""Whitened SVD and the linear discriminant: against dense formulas, beside massive dimensions, in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.plans import random_basis
from tests.support.planted import LOOSE, STREAMS, cosine, make_moments, matrix_power, planted, projector, shuffled
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations
from obliteratus.distill import find_directions

MASSIVE, OTHER = 3, 64
BOTH = ("whitened_svd", "discriminant")


def beside_massive(
    n: int = 200, width: int = OTHER, shift: float = 5.0, seed: int = 0, askew: bool = False
) -> tuple[Activations, Tensor]:
    """Noise of unequal spread, three directions of std 300 (axes, or askew), and a planted one clear of these."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, n, 2, width, generator=generator) * torch.exp(0.3 * torch.randn(width, generator=generator))
    massive = random_basis(width, MASSIVE, seed + 50) if askew else torch.eye(width)[:MASSIVE]
    rows += 300 * torch.randn(2, n, 2, MASSIVE, generator=generator) @ massive
    truth = random_basis(width, 1, seed)[0]
    truth = torch.nn.functional.normalize(truth - truth @ massive.T @ massive, dim=0).expand(2, -1)
    rows[0] += shift * truth
    return Activations({"target": make_moments(rows[0]), "control": make_moments(rows[1])}, -1), truth


def dense(rows: Tensor, s: float, means: int = 1) -> Tensor:
    """Σ as the module's head defines it, by its width × width matrix, in float64."""
    free = len(rows) - means
    sample = rows.T @ rows / free
    values = torch.linalg.eigvalsh(sample)
    own = values[values > 1e-9 * values.max()]
    assert len(own) == min(free, rows.shape[1])
    return (1 - s) * sample + s * own.median() * len(own) / rows.shape[1] * torch.eye(rows.shape[1])


def streams(acts: Activations, stream: int) -> tuple[Tensor, Tensor]:
    target, control = (acts[g].rows[:, stream].double() for g in ("target", "control"))
    return target, control


# ----------------------------------------------------------------------------------------------- golden
@pytest.mark.parametrize("n", [30, 200])  # fewer prompts than width, and more
@pytest.mark.parametrize("s", [0.05, 0.5, 1.0])
def test_whitened_svd_is_the_dense_formula(n: int, s: float) -> None:
    acts, _ = planted(n=n)
    found = find_directions(acts, [Step(use="whitened_svd", k=3, shrinkage=s)])
    for stream in range(1, STREAMS):
        target, control = streams(acts, stream)
        rows = (target - control.mean(0)) @ matrix_power(dense(control - control.mean(0), s), -0.5)
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        wanted = vectors[:, -3:] @ vectors[:, -3:].T
        torch.testing.assert_close(projector(found.basis[stream]), wanted, rtol=0, atol=1e-3)
        torch.testing.assert_close(found.raw[stream].double(), values[-3:].sum() / n, **LOOSE)


@pytest.mark.parametrize("n", [30, 200])
@pytest.mark.parametrize("within", ["both", "control"])
def test_discriminant_is_the_dense_formula(n: int, within: str) -> None:
    acts, _ = planted(n=n)
    found = find_directions(acts, [Step(use="discriminant", within=within, shrinkage=0.2)])
    for stream in range(1, STREAMS):
        target, control = streams(acts, stream)
        rows = [x - x.mean(0) for x in ((target, control) if within == "both" else (control,))]
        delta = target.mean(0) - control.mean(0)
        wanted = torch.linalg.solve(dense(torch.cat(rows), 0.2, len(rows)), delta)
        torch.testing.assert_close(found.basis[stream, 0].double(), wanted / wanted.norm(), rtol=0, atol=1e-4)
        torch.testing.assert_close(found.raw[stream].double(), wanted @ delta, **LOOSE)


# -------------------------------------------------------------------------------------------- the truth
@pytest.mark.parametrize("use", BOTH)
@pytest.mark.parametrize("askew", [False, True])
@pytest.mark.parametrize(("n", "width", "shift"), [(200, 64, 6.0), (64, 256, 12.0), (48, 512, 20.0)])
def test_a_direction_beside_massive_ones_is_found(use: str, n: int, width: int, shift: float, askew: bool) -> None:
    for seed in range(3):
        acts, truth = beside_massive(n, width, shift, seed, askew)
        least = 0.9 if use == "whitened_svd" else 0.8  # a discriminant also leans away from ordinary spread
        assert (cosine(find_directions(acts, [Step(use=use)]), truth) > least).all()
        for plain in ("svd", "mean_diff"):  # the negative control
            assert (cosine(find_directions(acts, [Step(use=plain)]), truth).abs() < 0.5).all()


def test_mapping_back_or_a_mean_floor_would_lose_it() -> None:
    """The formulas that were not taken, on the same data: Σ^½ after whitening, and a floor of the mean variance."""
    acts, truth = beside_massive()
    target, control = streams(acts, 1)
    centered = control - control.mean(0)
    sigma = dense(centered, 0.5)
    v = torch.linalg.svd((target - control.mean(0)) @ matrix_power(sigma, -0.5))[2][0]
    back = matrix_power(sigma, 0.5) @ v
    assert abs(v @ truth[1].double()) > 0.9
    assert abs(back @ truth[1].double() / back.norm()) < 0.5
    sample = centered.T @ centered / (len(centered) - 1)
    floored = 0.5 * sample + 0.5 * sample.diag().mean() * torch.eye(OTHER)
    v = torch.linalg.svd((target - control.mean(0)) @ matrix_power(floored, -0.5))[2][0]
    assert abs(v @ truth[1].double()) < 0.5


def test_discriminant_leans_away_from_what_varies() -> None:
    generator = torch.Generator().manual_seed(1)
    loud, quiet = random_basis(OTHER, 2, 5)
    rows = torch.randn(2, 400, 2, OTHER, generator=generator)
    rows += 6 * torch.randn(2, 400, 2, 1, generator=generator) * loud
    rows[0] += 4 * (0.6 * loud + 0.8 * quiet)
    acts = Activations({"target": make_moments(rows[0]), "control": make_moments(rows[1])}, -1)
    best = torch.linalg.solve(torch.eye(OTHER) + 36 * torch.outer(loud, loud), 0.6 * loud + 0.8 * quiet)
    best = (best / best.norm()).expand(2, -1)
    assert (cosine(find_directions(acts, [Step(use="discriminant")]), best) > 0.9).all()
    assert (cosine(find_directions(acts, [Step(use="mean_diff")]), best) < 0.87).all()


@pytest.mark.parametrize("k", [1, 3])
def test_full_shrinkage_is_plain_svd(k: int) -> None:
    acts, _ = planted()
    plain, full = (
        find_directions(acts, [Step(**s, k=k)]) for s in ({"use": "svd"}, {"use": "whitened_svd", "shrinkage": 1})
    )
    torch.testing.assert_close(full.basis, plain.basis, rtol=0, atol=1e-4)


@pytest.mark.parametrize("use", BOTH)
def test_shuffled_labels_give_no_direction(use: str) -> None:
    acts, truth = beside_massive()
    assert (cosine(find_directions(shuffled(acts), [Step(use=use)]), truth).abs() < 0.5).all()


# ------------------------------------------------------------------------------------- memory, bad input
class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            self.size = max(self.size, x.numel() if isinstance(x, Tensor) else 0)
        return made


@pytest.mark.parametrize("use", BOTH)
def test_no_matrix_of_width_by_width_is_made(use: str) -> None:
    width = 2048
    acts, _ = beside_massive(n=12, width=width, shift=20.0)
    with Largest() as seen:
        find_directions(acts, [Step(use=use)])
    assert 0 < seen.size <= 12 * 2 * width * 2  # two groups, two streams
    with Largest() as seen:  # the watch itself can tell
        rows = acts["control"].rows[:, 1]
        rows.T @ rows
    assert seen.size == width * width


@pytest.mark.parametrize("use", BOTH)
def test_dimensions_that_never_vary_do_no_harm(use: str) -> None:
    acts, truth = beside_massive()
    rows = {g: acts[g].rows.clone() for g in ("target", "control")}
    for one in rows.values():
        one[..., 40:45] = 7.0
    found = find_directions(Activations({g: make_moments(x) for g, x in rows.items()}, -1), [Step(use=use)])
    assert (found.basis[:, 0, 40:45].abs() < 1e-3).all()
    assert (cosine(found, truth) > 0.85).all()


@pytest.mark.parametrize("use", BOTH)
@pytest.mark.parametrize("s", [0.0, 1.5])
def test_shrinkage_has_a_range(use: str, s: float) -> None:
    with pytest.raises(UserError, match=f"'{use}': shrinkage: input should be"):
        find_directions(planted()[0], [Step(use=use, shrinkage=s)])


def test_too_few_prompts_for_k_are_refused() -> None:
    with pytest.raises(UserError, match="'whitened_svd': k=9 directions need at least 9 target prompts; got 8"):
        find_directions(planted(n=8)[0], [Step(use="whitened_svd", k=9)])
    for use in BOTH:
        with pytest.raises(UserError, match=f"'{use}' needs every prompt's activations"):
            find_directions(planted(keep=False)[0], [Step(use=use)])
