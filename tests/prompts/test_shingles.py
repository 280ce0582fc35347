"""Clusters and similarities are those of all pairs, computed one by one."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from obliteratus.prompts.folding import Words
from obliteratus.prompts.shingles import find_components, largest_similarities, make_shingles, number_shingles


def texts(n: int, seed: int) -> list[Words]:
    """Random texts of one to nine words out of six, so that similarities of all sizes occur."""
    rng = random.Random(seed)
    return [tuple(rng.choices("abcdef", k=rng.randint(1, 9))) for _ in range(n)]


def similarity(one: Words, other: Words) -> float:
    a, b = make_shingles(one), make_shingles(other)
    return len(a & b) / len(a | b)


def components(found: list[Words], threshold: float) -> set[frozenset[int]]:
    """Connected components by merging all pairs."""
    whole = [{i} for i in range(len(found))]
    for i, j in combinations(range(len(found)), 2):
        if similarity(found[i], found[j]) >= threshold:
            one, other = (next(c for c in whole if k in c) for k in (i, j))
            if one is not other:
                one |= other
                whole.remove(other)
    return {frozenset(c) for c in whole}


def test_shingles_by_hand() -> None:
    assert make_shingles(("tell", "me", "now")) == {
        ("", "", "tell"),
        ("", "tell", "me"),
        ("tell", "me", "now"),
        ("me", "now", ""),
    }
    assert make_shingles(("no",)) == {("", "", "no"), ("", "no", "")}


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_components_are_those_of_all_pairs(seed: int, threshold: float) -> None:
    found = texts(60, seed)
    clusters = find_components(number_shingles(found), threshold)
    assert {frozenset(c) for c in clusters} == components(found, threshold)
    assert sum(map(len, clusters)) == len(found)


def test_the_sample_has_clusters_of_all_kinds() -> None:
    """Otherwise the test above would hold of code that links nothing or everything."""
    sizes = [len(c) for c in find_components(number_shingles(texts(60, 0)), 0.3)]
    assert max(sizes) > 2
    assert sizes.count(1) > 2


def test_the_nearest_is_that_of_all_pairs() -> None:
    one, other = texts(30, 7), texts(40, 8)
    rows = number_shingles([*one, *other])
    assert largest_similarities(rows[:30], rows[30:]) == pytest.approx(
        [max(similarity(a, b) for b in other) for a in one]
    )
    assert largest_similarities(rows[:2], []) == [0.0, 0.0]
