"""Apportion clusters of prompts to the parts, so that every group is divided as closely as the clusters allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from obliteratus.core.types import SPLITS

# Directions converge within a few hundred prompts, while the interval of a rate shrinks only with √n. The report
# therefore gets a quarter. A search needs fewer prompts than either.
FRACTIONS = {"fit": 0.60, "search": 0.15, "report": 0.25}
SHARES = numpy.array([FRACTIONS[name] for name in SPLITS])
MOST_MOVES = 1000  # far more than any division took; each lowers the cost, so that it ends anyway
UNFILLED = 1e6  # cost of a prompt missing in a part, above any distance from the fractions
NONE = -1
"""Stands for "in no part yet"."""

Ints = NDArray[numpy.int64]
Numbers = Any  # an array of numbers, or a single one


def quota(n: int) -> tuple[int, int, int]:
    """Return how many of n prompts go to fit, search and report."""
    fit, search = round(n * FRACTIONS["fit"]), round(n * FRACTIONS["search"])
    return fit, search, n - fit - search


@dataclass(frozen=True)
class Load:
    """What is to be divided."""

    sizes: Ints
    """[clusters, groups]: loose prompts of clusters that stay whole."""
    fixed: Ints
    """[clusters]: the part that pinned prompts have drawn a cluster to, or `NONE`."""
    singles: Ints
    """[groups]: prompts that share wording with no other, which fill what is left."""
    need: Ints
    """[parts, groups]: loose prompts without which a part counts as unfilled."""


@dataclass(frozen=True)
class Placement:
    """A part for each cluster."""

    parts: Ints
    counts: Ints
    """[parts, groups]: loose prompts of whole clusters in each part."""
    unfilled: int
    """Prompts missing from what the parts need, which single prompts cannot fill."""


def place(load: Load) -> Placement:
    """Return a part for each cluster, in the order given: the part that is furthest behind its share.

    This is the Sainte-Laguë method of apportionment with clusters for seats, for all groups at once. After it, single
    clusters are moved as long as that fills a part or brings the counts nearer to the fractions (in χ²).
    """
    parts, counts = load.fixed.copy(), _count(load, load.fixed)
    weights = _weights(load)
    for cluster in numpy.flatnonzero(load.fixed == NONE):
        size = load.sizes[cluster]
        parts[cluster] = ((2 * counts + size) * size * weights).sum(1).argmin()
        counts[parts[cluster]] += size
    _improve(load, parts, counts, weights)
    return Placement(parts, counts, int(_unfilled(load, counts)))


def _count(load: Load, parts: Ints) -> Ints:
    return numpy.stack([load.sizes[parts == part].sum(0) for part in range(len(SPLITS))])


def _weights(load: Load) -> Numbers:
    """Return [parts, groups]: 1 ÷ (share of the part × squared size of the group), so that all groups weigh alike."""
    totals = numpy.maximum(load.sizes.sum(0), 1)
    return 1 / (SHARES[:, None] * totals**2)


def _unfilled(load: Load, counts: Numbers) -> Numbers:
    """Return the number of prompts missing; counts: [..., parts, groups]."""
    missing = numpy.maximum(load.need - counts, 0).sum(-2)
    return numpy.maximum(missing - load.singles, 0).sum(-1)


def _cost(load: Load, counts: Numbers, weights: Numbers) -> Numbers:
    wanted = SHARES[:, None] * load.sizes.sum(0)
    return UNFILLED * _unfilled(load, counts) + ((counts - wanted) ** 2 * weights).sum((-1, -2))


def _improve(load: Load, parts: Ints, counts: Ints, weights: Numbers) -> None:
    """Move single clusters, the best move first, as long as the cost falls."""
    free = numpy.flatnonzero(load.fixed == NONE)
    step = numpy.eye(len(SPLITS), dtype=numpy.int64)
    for _ in range(MOST_MOVES if len(free) else 0):
        moved = step[None] - step[parts[free]][:, None]  # [clusters, to, parts]
        after = counts + moved[..., None] * load.sizes[free][:, None, None]
        costs = _cost(load, after, weights)
        cluster, to = numpy.unravel_index(costs.argmin(), costs.shape)
        if costs[cluster, to] >= _cost(load, counts, weights) - 1e-12:
            return
        counts[:] = after[cluster, to]
        parts[free[cluster]] = to


def fill(counts: Ints, need: Ints, singles: int) -> Ints:
    """Return how many single prompts of a group go to each part, first what the parts need and then their shares.

    counts, need: [parts], of one group.
    """
    first = _at_most(numpy.maximum(need - counts, 0), singles)
    wanted = numpy.array(quota(int(counts.sum()) + singles)) - counts - first
    return first + _at_most(numpy.maximum(wanted, 0), singles - int(first.sum()))


def _at_most(wanted: Ints, n: int) -> Ints:
    """Return the wanted numbers, scaled down to sum to n by the method of largest remainders."""
    total = int(wanted.sum())
    if total <= n:
        return wanted
    whole, remainder = wanted * n // total, wanted * n % total
    order = numpy.argsort(-remainder, kind="stable")[: n - int(whole.sum())]
    whole[order] += 1
    return whole
