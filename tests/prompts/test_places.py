"""Parts are filled as closely as the clusters allow."""

from __future__ import annotations

import random

import numpy
import pytest

from obliteratus.prompts.places import NONE, Ints, Load, fill, place, quota


def load(sizes: list[list[int]], singles: list[int], need: int = 0) -> Load:
    table = numpy.array(sizes, dtype=numpy.int64).reshape(len(sizes), len(singles))
    return Load(table, numpy.full(len(sizes), NONE), numpy.array(singles), numpy.full((3, len(singles)), need))


def test_quotas_are_the_stated_fractions() -> None:
    assert quota(100) == (60, 15, 25)
    assert all(sum(quota(n)) == n for n in range(300))


def test_equal_clusters_are_apportioned_by_their_number() -> None:
    placed = place(load([[10]] * 20, [0]))
    assert placed.counts[:, 0].tolist() == [120, 30, 50]


@pytest.mark.parametrize("seed", range(5))
def test_two_groups_are_close_to_the_fractions_at_once(seed: int) -> None:
    rng = random.Random(seed)
    sizes = sorted(([rng.randint(0, 9), rng.randint(0, 9)] for _ in range(60)), key=lambda s: -sum(s))
    counts = place(load(sizes, [0, 0])).counts
    for group in range(2):
        share = counts[:, group] / counts[:, group].sum()
        assert numpy.abs(share - [0.6, 0.15, 0.25]).max() < 0.03


def test_three_clusters_go_to_three_parts_if_each_needs_one() -> None:
    """By the fractions alone the third goes to fit as well."""
    assert sorted(place(load([[10]] * 3, [0], need=1)).parts.tolist()) == [0, 1, 2]
    assert sorted(place(load([[10]] * 3, [0])).parts.tolist()) == [0, 0, 2]


def test_two_clusters_leave_a_part_unfilled() -> None:
    assert place(load([[10]] * 2, [0], need=1)).unfilled == 1
    assert place(load([[10]] * 2, [1], need=1)).unfilled == 0  # a single prompt fills it


def test_pinned_clusters_stay() -> None:
    table = load([[5]] * 4, [0])
    fixed = Load(table.sizes, numpy.array([1, NONE, 1, NONE]), table.singles, table.need)
    assert place(fixed).parts[[0, 2]].tolist() == [1, 1]


def filled(counts: list[int], need: list[int], singles: int) -> list[int]:
    arrays: list[Ints] = [numpy.array(values, dtype=numpy.int64) for values in (counts, need)]
    return fill(*arrays, singles).tolist()


def test_single_prompts_fill_what_is_left() -> None:
    assert filled([0, 0, 0], [0, 0, 0], 100) == [60, 15, 25]
    assert filled([60, 0, 0], [0, 0, 0], 40) == [0, 15, 25]
    assert filled([90, 0, 0], [0, 0, 0], 10) == [0, 4, 6]  # as 15 to 25
    assert filled([90, 0, 0], [0, 8, 0], 10) == [0, 8, 2]
    assert sum(filled([50, 3, 1], [9, 9, 9], 5)) == 5
