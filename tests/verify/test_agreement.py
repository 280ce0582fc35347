"""Agreement with labels: Cohen's kappa against its definition, precision and recall."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obliteratus.verify.agreement import measure_agreement


def kappa_by_table(said: list[bool], labels: list[bool]) -> float:
    """Cohen 1960, from the table of counts in float64."""
    table = np.zeros((2, 2))
    for s, label in zip(said, labels, strict=True):
        table[int(s), int(label)] += 1
    table /= table.sum()
    expected = (table.sum(1)[:, None] * table.sum(0)[None]).trace()
    return float((table.trace() - expected) / (1 - expected))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=4, max_size=40))
@settings(max_examples=40, deadline=None)
def test_kappa_is_that_of_the_table(pairs: list[tuple[bool, bool]]) -> None:
    said, labels = [s for s, _ in pairs], [label for _, label in pairs]
    score = measure_agreement(said, labels)["kappa"]
    if len({*said, *labels}) == 2:
        assert score.value == pytest.approx(kappa_by_table(said, labels), abs=1e-12)
    assert score.low <= score.value <= score.high


def test_precision_and_recall() -> None:
    found = measure_agreement([True, True, True, False, False], [True, True, False, True, False])
    assert (found["precision"].value, found["precision"].n) == (pytest.approx(2 / 3), 3)
    assert (found["recall"].value, found["recall"].n) == (pytest.approx(2 / 3), 3)


def test_chance_agrees_with_nothing() -> None:
    rng = np.random.default_rng(0)
    said, labels = (list(map(bool, rng.random(400) < p)) for p in (0.7, 0.3))
    score = measure_agreement(said, labels)["kappa"]
    assert score.low < 0 < score.high


def test_what_nothing_says_is_missing() -> None:
    assert set(measure_agreement([False, False], [False, True])) == {"kappa", "recall"}
    assert set(measure_agreement([True, False], [False, False])) == {"kappa", "precision"}
