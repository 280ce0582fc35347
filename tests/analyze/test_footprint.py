"""The weight footprint: planted writers and planted columns are found, directions of meaningless labels are not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy
import pytest
import torch
from tests.support.contexts import activations_of, check_finding, context_of_activations
from tests.support.plans import random_basis
from tests.support.tiny import tiny_subject

from obliteratus.analyze import analyze
from obliteratus.analyze.footprint import (
    Footprint,
    find_smallest_share,
    gini,
    iterate_writer_matrices,
    measure_subspace_shares,
)
from obliteratus.core.settings import Step
from obliteratus.core.types import Directions, Subject
from obliteratus.summon.sites import read_gain
from obliteratus.weights.matrices import read_weight


def directions(subject: Subject, k: int = 1, seed: int = 0) -> Directions:
    streams = subject.n_layers + 1
    basis = torch.stack([random_basis(subject.width, k, seed + s) for s in range(streams)])
    return Directions(basis, torch.ones(streams), torch.ones(streams), "")


def run(subject: Subject, found: Directions) -> Footprint:
    generator = torch.Generator().manual_seed(9)
    groups = torch.randn(2, 24, subject.n_layers + 1, subject.width, generator=generator)
    context = context_of_activations(activations_of(*groups), found, model=subject)
    made = analyze(context, [Step(use="footprint", draws=99)])["footprint"]
    assert isinstance(made, Footprint)
    return made


def test_finds_the_matrices_and_columns_that_write() -> None:
    subject = tiny_subject("llama")
    found = directions(subject)
    loud, narrow = "model.layers.1.mlp.down_proj", "model.layers.2.self_attn.o_proj"
    with torch.no_grad():
        weight = subject.module(loud).weight
        weight += found.basis[2, 0][:, None] * torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1))
        weight = subject.module(narrow).weight
        weight[:, 3] += 3 * found.basis[3, 0]  # far more, and random directions see the column, too
    made = run(subject, found)
    assert made.significant == (f"{loud}.weight", f"{narrow}.weight")
    assert made.sparse == (f"{narrow}.weight",)
    at = made.sites.index(f"{narrow}.weight")
    assert made.columns[at] == pytest.approx(1 / 32)
    numbers = check_finding(made)
    assert len(numbers["share"]) == len(made.sites) == 7  # embeddings, and two writers in each of three layers


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_random_directions_find_nothing(name: str) -> None:
    subject = tiny_subject(name)
    found = run(subject, directions(subject, k=2, seed=5))
    assert found.significant == found.sparse == ()
    assert found.share.mean() == pytest.approx(math.sqrt(2 / subject.width), rel=0.25)
    check_finding(found)


def test_streams_without_a_direction_are_left_out() -> None:
    subject = tiny_subject("llama")
    found = directions(subject)
    basis = found.basis.clone()
    basis[:2] = 0
    made = run(subject, replace(found, basis=basis))
    assert set(made.layers) == {1, 2}
    empty = run(subject, replace(found, basis=torch.zeros_like(basis)))
    assert empty.sites == ()
    assert "no matrix" in empty.summary()
    check_finding(empty)


def test_every_expert_is_a_matrix_of_its_own() -> None:
    subject = tiny_subject("mixtral")
    names = [name for name, _, _ in iterate_writer_matrices(subject)]
    assert len(names) == len(set(names))
    assert sum("[" in name for name in names) == 2 * 4


def test_gains_count() -> None:
    subject = tiny_subject("gemma2")
    made = 0
    for _, site, weight in iterate_writer_matrices(subject):
        gain = read_gain(subject.model, site)
        if gain is not None:
            plain = read_weight(subject.module(site.path), site)
            torch.testing.assert_close(weight, torch.diag(gain.float()) @ plain)
            made += 1
    assert made


def test_golden() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(8, 30, generator=generator), random_basis(8, 2, 1)
    share, gini, columns = measure_subspace_shares(weight, rows[None])[:, 0].tolist()
    v = (rows.double().numpy() @ weight.double().numpy()) ** 2
    energy = v.sum(0)
    assert share == pytest.approx(numpy.sqrt(v.sum()) / numpy.linalg.norm(weight.double().numpy()))
    pairs = numpy.abs(energy[:, None] - energy[None]).mean() / (2 * energy.mean())
    assert gini == pytest.approx(pairs)
    ordered = numpy.sort(energy)[::-1]
    assert columns == pytest.approx((numpy.searchsorted(ordered.cumsum(), 0.8 * energy.sum()) + 1) / 30)


def test_what_gaussian_columns_give() -> None:
    values = torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0)).square()
    assert float(gini(values)) == pytest.approx(2 / math.pi, abs=0.005)
    assert float(gini(torch.ones(1, 10))) == pytest.approx(0, abs=1e-6)
    assert float(find_smallest_share(torch.ones(1, 10))) == pytest.approx(0.8)
    assert float(gini(torch.zeros(1, 10))) == 0
