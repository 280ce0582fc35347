"""Cross-layer geometry: planted turns and persistence are found, with their signs; noise that lasts is not."""

from __future__ import annotations

import numpy
import torch
from tests.support.contexts import activations_of, check_finding, context_of_activations, one_population
from torch import Tensor

from obliteratus.analyze import analyze
from obliteratus.analyze.geometry import Geometry, find_similar_runs, permute_cosines
from obliteratus.analyze.samples import Sample
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations

STREAMS, WIDTH = 8, 32


def run(acts: Activations) -> Geometry:
    found = analyze(context_of_activations(acts), [Step(use="geometry", draws=99)])["geometry"]
    assert isinstance(found, Geometry)
    return found


def lasting(shift: Tensor, seed: int = 0) -> Activations:
    """Noise of which each stream keeps nearly all; ``shift`` [streams, width] is what the target has more."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randn(2, 100, 1, WIDTH, generator=generator)
    rows = kept + 0.2 * torch.randn(2, 100, STREAMS, WIDTH, generator=generator)
    rows[0] += shift
    return activations_of(rows[0], rows[1])


def turning() -> Tensor:
    """Nothing at 0 and 1, e0 at 2–4, e1 at 5 and 6, −e1 at 7."""
    shift = torch.zeros(STREAMS, WIDTH)
    shift[2:5, 0], shift[5:7, 1], shift[7, 1] = 4, 4, -4
    return shift


def test_finds_runs_turns_and_signs() -> None:
    found = run(lasting(turning()))
    assert found.clusters == ((2, 3, 4), (5, 6), (7,))
    assert found.reach == (2, 1, 0, 1, 0, 0)
    assert found.cosine[6, 7] < -0.8
    assert found.cosine[2, 4] > 0.8
    assert abs(found.cosine[4, 5]) < 0.4
    assert check_finding(found)["clusters"] == [[2, 3, 4], [5, 6], [7]]


def test_finds_nothing_in_one_population_though_its_noise_lasts() -> None:
    found = run(lasting(torch.zeros(STREAMS, WIDTH)))
    assert found.cosine.min() > 0.8  # what a measure without a null would call persistence
    assert found.significant == found.clusters == found.reach == ()
    assert found.chance.min() > 0.8
    assert "no stream" in found.summary()
    check_finding(found)


def test_finds_nothing_in_independent_noise() -> None:
    assert run(one_population()).clusters == ()


def test_a_slow_turn_is_not_chained() -> None:
    angle = torch.arange(STREAMS) * 0.5  # 29° a stream, 45° is the limit
    rows = torch.stack([angle.cos(), angle.sin()], 1).double()
    assert find_similar_runs(rows @ rows.T, range(STREAMS), 0.7) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert find_similar_runs(rows @ rows.T, [0, 1, 3, 4], 0.7) == ((0, 1), (3, 4))  # a gap ends a run


def test_cosines_are_those_of_float64() -> None:
    acts = lasting(turning())
    one, two = (acts[g].rows.double().mean(0).numpy() for g in ("target", "control"))
    delta = one - two
    unit = delta / numpy.linalg.norm(delta, axis=1, keepdims=True)
    numpy.testing.assert_allclose(run(acts).cosine, unit @ unit.T, atol=1e-5)


def test_persistence_by_hand() -> None:
    cosine = torch.tensor([[1, 0.5, 0.2], [0.5, 1, 0.1], [0.2, 0.1, 1]], dtype=torch.float64)
    found = Geometry(cosine, (0, 1, 2), (), (0, 0, 0), torch.zeros(3).double(), 0.7, 0.05, 10)
    torch.testing.assert_close(found.persistence, torch.tensor([1, 0.3, 0.2]).double())
    apart = Geometry(cosine, (0, 2), (), (0, 0), torch.zeros(3).double(), 0.7, 0.05, 10)
    assert apart.to_dict()["persistence"] == [1, None, 0.2]  # no two lie one apart


def test_chance_is_nothing_where_noise_does_not_last() -> None:
    acts = one_population()
    chance = permute_cosines(Sample(acts["target"].rows[:, 1:], acts["control"].rows[:, 1:]), 0)
    assert (chance - torch.eye(4)).abs().max() < 0.1
