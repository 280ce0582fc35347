"""Directions of random labels are what a difference of means is where labels mean nothing."""

from __future__ import annotations

from itertools import permutations

import torch
from tests.support.contexts import activations_of
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze.chance import draw_chance_directions, draw_chance_subspaces
from obliteratus.analyze.samples import Sample, read_sample
from obliteratus.analyze.significance import draw_unit_vectors

WIDTH, DRAWS = 24, 200
SPLITS = list(permutations(range(4)))  # of four rows into two pairs, in every order


def uneven_rows(seed: int, n: int = 24) -> Tensor:
    """Rows of two groups of one population that varies along few axes, heavy-tailed: [2 n, 2 streams, width]."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2 * n, 2, WIDTH, generator=generator) ** 3
    return rows * torch.logspace(1, -1, WIDTH)


def sample_of(rows: Tensor) -> Sample:
    half = len(rows) // 2
    return read_sample(activations_of(rows[:half], rows[half:]), "test")


def count_first_of_twenty(draw_others: object) -> int:
    """How often a difference of means has more along the first axis than 19 others: 1 in 20 by chance."""
    first = 0
    for seed in range(DRAWS):
        sample = sample_of(uneven_rows(seed))
        rows = sample.at(1)
        delta = normalize(rows[: sample.n].mean(0) - rows[sample.n :].mean(0), dim=0)
        others = draw_others(sample, seed)  # type: ignore[operator]
        first += bool(abs(float(delta[0])) > float(others[:, 0].abs().max()))
    return first


def test_a_difference_of_meaningless_labels_is_one_of_them() -> None:
    assert count_first_of_twenty(lambda sample, seed: draw_chance_directions(sample, 1, 19, seed)) <= 21


def test_it_is_none_of_directions_drawn_evenly() -> None:
    assert count_first_of_twenty(lambda sample, seed: draw_unit_vectors(19, WIDTH, seed)) > 60


def test_they_are_mean_differences_of_permuted_rows() -> None:
    rows = uneven_rows(0, n=2)
    sample = sample_of(rows)
    found = draw_chance_directions(sample, 1, 50, 0).double()
    possible = [normalize(rows[[i, j], 1].mean(0) - rows[[k, m], 1].mean(0), dim=0) for i, j, k, m in SPLITS]
    nearest = (found @ torch.stack(possible).double().T).amax(1)
    torch.testing.assert_close(nearest, torch.ones(50).double(), atol=1e-5, rtol=0)


def test_streams_share_their_labels_and_rows_that_do_not_vary_give_directions_all_the_same() -> None:
    rows = uneven_rows(1)
    rows[:, 1] = 2 * rows[:, 0]
    sample = sample_of(rows)
    one, two = (draw_chance_directions(sample, stream, 10, 7) for stream in (0, 1))
    torch.testing.assert_close(one, two)
    rows[:, 0] = 1
    flat = draw_chance_directions(sample_of(rows), 0, 10, 7)
    torch.testing.assert_close(flat.norm(dim=1), torch.ones(10))


def test_subspaces_are_orthonormal_and_span_the_directions() -> None:
    sample = sample_of(uneven_rows(2))
    spans, vectors = draw_chance_subspaces(sample, 1, 3, 5, 1), draw_chance_directions(sample, 1, 15, 1).view(5, 3, -1)
    torch.testing.assert_close(spans @ spans.mT, torch.eye(3).expand(5, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(vectors @ spans.mT @ spans, vectors, atol=1e-4, rtol=0)
