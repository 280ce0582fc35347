"""How much wording texts share, and which of them are linked by it.

Broder, "On the resemblance and containment of documents" (1997): texts are compared by their shingles, runs of words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

import numpy
from numpy.typing import NDArray

from obliteratus.prompts.folding import Words

Ints = NDArray[numpy.int64]
# Two marks before the first word and one after the last, so that the first words weigh more: templates differ most in
# how they begin. Runs of one or two words link prompts that share only common words; see docs/experiments/splits.md.
BEFORE, AFTER, LENGTH = 2, 1, 3


def make_shingles(words: Words) -> set[Words]:
    """Return the runs of three words, with empty words as marks of the beginning and the end."""
    marked = ("",) * BEFORE + words + ("",) * AFTER
    return set(zip(*(islice(marked, start, None) for start in range(LENGTH)), strict=False))


def number_shingles(texts: Sequence[Words]) -> list[Ints]:
    """Return the shingles of each text as distinct numbers, the same number for the same shingle in all texts."""
    numbers: dict[Words, int] = {}
    return [
        numpy.array([numbers.setdefault(shingle, len(numbers)) for shingle in make_shingles(words)], dtype=numpy.int64)
        for words in texts
    ]


class ShingleIndex:
    """Shingle → the texts that have it. Texts can be taken out."""

    def __init__(self, rows: Sequence[Ints]) -> None:
        self.sizes: Ints = numpy.array([len(row) for row in rows], dtype=numpy.int64)
        flat = numpy.concatenate([*rows, numpy.zeros(0, dtype=numpy.int64)])
        self._owners: Ints = numpy.repeat(numpy.arange(len(rows)), self.sizes)[numpy.argsort(flat, kind="stable")]
        ends = numpy.cumsum(numpy.bincount(flat, minlength=1))
        self._ends: list[int] = ends.tolist()
        self._starts = [0, *self._ends[:-1]]
        self.present: NDArray[numpy.bool_] = numpy.ones(len(rows), dtype=bool)

    def find_shared(self, row: Ints, threshold: float) -> tuple[Ints, NDArray[numpy.float64]]:
        """Return the present texts whose Jaccard similarity to these shingles reaches the threshold, and how similar
        they are: the number of common shingles over the number of all shingles of both."""
        least = max(1, math.ceil(threshold * len(row) - 1e-9))  # common shingles without which none is that similar
        lists = [owners for shingle in row.tolist() if len(owners := self._present_owners(shingle))]
        if len(lists) < least:
            return numpy.zeros(0, dtype=numpy.int64), numpy.zeros(0)
        common = numpy.bincount(numpy.concatenate(lists), minlength=1)
        texts = numpy.flatnonzero(common >= least)
        shares = common[texts] / (len(row) + self.sizes[texts] - common[texts])
        enough = shares >= threshold - 1e-9
        return texts[enough], shares[enough]

    def _present_owners(self, shingle: int) -> Ints:
        """Return the present texts with a shingle, and forget the others."""
        if shingle >= len(self._starts):
            return self._owners[:0]
        start, end = self._starts[shingle], self._ends[shingle]
        owners = self._owners[start:end]
        if end > start and not self.present[owners].all():
            owners = owners[self.present[owners]]
            self._ends[shingle] = start + len(owners)
            self._owners[start : start + len(owners)] = owners
        return owners


def find_components(rows: Sequence[Ints], threshold: float) -> list[list[int]]:
    """Return the indices of texts in clusters: any two of different clusters are less similar than the threshold.

    The clusters are the connected components of the graph that links two texts with a Jaccard similarity of at least
    the threshold (single linkage). A text is taken out of the index when it is reached, so a thousand prompts of one
    template cost one look-up of all and a thousand of what remains.
    """
    index = ShingleIndex(rows)
    components = []
    for first in range(len(rows)):
        if not index.present[first]:
            continue
        index.present[first] = False
        component = [first]
        for text in component:  # grows meanwhile
            near, _ = index.find_shared(rows[text], threshold)
            index.present[near] = False
            component += near.tolist()
        components.append(component)
    return components


def largest_similarities(rows: Sequence[Ints], others: Sequence[Ints]) -> list[float]:
    """Return each text's Jaccard similarity (0–1) to the most similar of the others."""
    index = ShingleIndex(others)
    return [float(index.find_shared(row, 0.0)[1].max(initial=0.0)) for row in rows]
