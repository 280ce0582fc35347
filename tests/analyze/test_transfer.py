"""Cross-model transfer: a planted linear relation between widths is found, unrelated models are not."""

from __future__ import annotations

import numpy
import pytest
import torch
from scipy.stats import binom
from tests.support.contexts import activations_of, check_finding

from obliteratus.analyze.samples import Sample, split_folds
from obliteratus.analyze.transfer import (
    RIDGES,
    FoldMap,
    Transfer,
    choose_ridge,
    compute_fold_difference,
    measure_transfer,
    permute_within_groups,
    score_maps,
)
from obliteratus.core.errors import UserError
from obliteratus.core.types import Activations

N, LATENT, ONE, TWO = 120, 6, 24, 40


def models(related: bool = True, shift: float = 3.0, seed: int = 0) -> tuple[Activations, Activations]:
    """Two models of different width that see the same 6 things in each prompt, or nothing in common but the group."""
    generator = torch.Generator().manual_seed(seed)
    seen = torch.randn(2, N, LATENT, generator=generator)
    other = seen if related else torch.randn(2, N, LATENT, generator=generator)
    made = []
    for things, width in ((seen, ONE), (other, TWO)):
        spread = torch.randn(LATENT, width, generator=generator)
        group = torch.randn(width, generator=generator)
        rows = things @ spread + 0.5 * torch.randn(2, N, width, generator=generator)
        rows[0] += shift * group / group.norm() + shift * 0.7 * spread[0]
        made.append(activations_of(rows[0][:, None], rows[1][:, None]))
    return made[0], made[1]


def run(pair: tuple[Activations, Activations], folds: int = 5) -> Transfer:
    return measure_transfer(*pair, (0, 0), folds=folds, draws=19)


def test_a_planted_relation_is_found() -> None:
    found = run(models())
    assert found.significant
    assert found.r2 > 0.8
    assert found.cosine > 0.9
    assert found.ceiling >= found.cosine - 0.05
    assert max(found.r2_by_chance) < 0.1
    numbers = check_finding(found)
    assert numbers["widths"] == [ONE, TWO]
    assert numbers["prompts"] == 2 * N


def test_unrelated_models_without_a_group_give_nothing() -> None:
    """And over 30 such pairs of models no more findings than the level allows."""
    found = run(models(related=False, shift=0.0, seed=1))
    assert not found.significant
    assert found.r2 < 0.02
    assert abs(found.cosine) < 0.5
    assert "no map" in found.summary()
    check_finding(found)
    hits = sum(run(few(models(related=False, shift=0.0, seed=seed)), 2).significant for seed in range(30))
    assert hits <= binom.ppf(0.975, 30, 0.05), hits


def few(pair: tuple[Activations, Activations]) -> tuple[Activations, Activations]:
    one, two = (activations_of(*(acts[g].rows[:20] for g in ("target", "control"))) for acts in pair)
    return one, two


def test_shuffled_pairs_give_nothing() -> None:
    """The null of a real relation: the same rows, paired by chance, in both groups alike."""
    one, two = models()
    rows = torch.cat([two["target"].rows, two["control"].rows])
    rows = rows[torch.randperm(2 * N, generator=torch.Generator().manual_seed(5))]
    found = run((one, activations_of(rows[:N], rows[N:])))
    assert not found.significant
    assert found.r2 < 0.02


def test_what_the_group_alone_gives_is_said() -> None:
    """Nothing in common but the group: the map beats chance, and no more than pairs shuffled within groups."""
    found = run(models(related=False))
    assert found.significant
    assert found.r2 == pytest.approx(found.r2_within, abs=0.05)
    assert found.cosine > 0.8  # the group's direction maps onto the group's direction, whatever else is shared


def test_prompts_must_be_the_same() -> None:
    one, two = models()
    with pytest.raises(UserError, match="the same prompts"):
        measure_transfer(one, activations_of(two["target"].rows[:-1], two["control"].rows), (0, 0))


def test_golden() -> None:
    """Against the primal ridge solution with λ by a search of its own, in float64."""
    one, two = models()
    x = torch.cat([one["target"].rows, one["control"].rows])[:, 0].double().numpy()
    y = torch.cat([two["target"].rows, two["control"].rows])[:, 0].double().numpy()
    plan = split_folds(N, N, 3)
    errors = whole = 0.0
    cosines = []
    for fold in range(3):
        kept = plan.outside(fold).numpy()
        xk, yk = x[kept] - x[kept].mean(0), y[kept] - y[kept].mean(0)
        best, least = None, numpy.inf
        unit = numpy.trace(xk @ xk.T) / len(xk)
        for ridge in RIDGES:
            inverse = numpy.linalg.inv(xk.T @ xk + ridge * unit * numpy.eye(ONE))
            fitted = inverse @ xk.T @ yk
            freedom = len(xk) - 1 - numpy.trace(xk @ inverse @ xk.T)
            error = ((yk - xk @ fitted) ** 2).sum() / freedom**2
            best, least = (fitted, error) if error < least else (best, least)
        truth = y[~kept] - y[kept].mean(0)
        errors += ((truth - (x[~kept] - x[kept].mean(0)) @ best) ** 2).sum()
        whole += (truth**2).sum()
        mapped = (plan.weights[fold].numpy() @ x) @ best
        own = compute_fold_difference(torch.tensor(y), plan, fold).numpy()
        cosines.append(mapped @ own / numpy.linalg.norm(mapped) / numpy.linalg.norm(own))
    found = score_maps([FoldMap(torch.tensor(x), plan, f) for f in range(3)], torch.tensor(y))
    assert found[0] == pytest.approx(1 - errors / whole, rel=1e-6)
    assert found[1] == pytest.approx(numpy.mean(cosines), rel=1e-6)


def test_gcv_shrinks_noise_and_trusts_signal() -> None:
    values, ridges = torch.ones(50).double(), torch.tensor(RIDGES).double()
    noise = torch.ones(50).double()
    assert choose_ridge(values.index_fill(0, torch.arange(40, 50), 0.0), noise, ridges) == ridges[-1]
    signal = torch.cat([100 * torch.ones(40), 0.01 * torch.ones(10)]).double()
    assert choose_ridge(values.index_fill(0, torch.arange(40, 50), 0.0), signal, ridges) == ridges[0]


def test_within_keeps_groups() -> None:
    for order in permute_within_groups(Sample(torch.zeros(5, 1, 2), torch.zeros(7, 1, 2)), 10, 0):
        assert sorted(order[:5].tolist()) == list(range(5))
        assert sorted(order[5:].tolist()) == list(range(5, 12))
