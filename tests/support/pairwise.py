"""Few combinations of many options, in which every pair of values still occurs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, product
from typing import Any

Row = tuple[Any, ...]


def pairwise(*given: Iterable[Any], allowed: Callable[..., bool] = lambda *row: True) -> list[Row]:
    """Return rows with one value of each factor so that every pair of values that may occur together does so.

    allowed: whether a row may occur. Greedy: each row is the first of those that cover the most pairs yet uncovered, so
    the same factors give the same rows.
    """
    factors = [list(values) for values in given]
    rows = [indices for indices in product(*(range(len(f)) for f in factors)) if allowed(*_values(factors, indices))]
    pairs = {row: set(_pairs(row)) for row in rows}
    left = set().union(*pairs.values())
    chosen = []
    while left:
        best = max(rows, key=lambda row: len(pairs[row] & left))
        chosen.append(_values(factors, best))
        left -= pairs[best]
    return chosen


def _values(factors: Sequence[Sequence[Any]], indices: Sequence[int]) -> Row:
    return tuple(factor[i] for factor, i in zip(factors, indices, strict=True))


def _pairs(row: Sequence[int]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    return combinations(enumerate(row), 2)
