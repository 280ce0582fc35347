"""Covering arrays cover: every pair that may occur does, in far fewer rows than the full cross."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
from tests.support.pairwise import pairwise


def pairs(rows: Any) -> set[Any]:
    return {pair for row in rows for pair in combinations(enumerate(row), 2)}


@pytest.mark.parametrize("sizes", [(3,), (3, 2), (9, 4, 5, 3), (2, 2, 2, 2, 2)])
def test_every_pair_occurs(sizes: tuple[int, ...]) -> None:
    factors = [[f"{i}{j}" for j in range(n)] for i, n in enumerate(sizes)]
    rows = pairwise(*factors)
    assert pairs(rows) == pairs(product(*factors))
    assert rows == pairwise(*factors)
    if len(sizes) > 2:
        assert 2 * len(rows) < len(list(product(*factors)))


def test_rows_that_may_not_occur_do_not() -> None:
    def allowed(a: int, b: int, c: int) -> bool:
        return not (a == 1 and b == 2)

    rows = pairwise(range(4), range(4), range(4), allowed=allowed)
    assert all(allowed(*row) for row in rows)
    assert pairs(rows) == {p for p in pairs(product(range(4), repeat=3)) if p != ((0, 1), (1, 2))}
