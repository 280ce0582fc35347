"""How well verdicts agree with a person's labels: precision, recall and Cohen's kappa, each with an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from obliteratus.core.results import Score
from obliteratus.judge.judge import SHOWN
from obliteratus.verify.intervals import kappa_score, wilson_rate


def compare_rungs(records: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """Return Cohen's kappa of each pair of rungs, called ``one × other``, on the answers that both judged.

    records: those of the scorer `behavior`.
    """
    said = [record["rungs"] for record in records if "rungs" in record]
    names = list(dict.fromkeys(name for rungs in said for name in rungs))
    scores = {}
    for one, other in combinations(names, 2):
        both = [(r[one] in SHOWN, r[other] in SHOWN) for r in said if r.get(one) and r.get(other)]
        if both:
            scores[f"{one} × {other}"] = measure_agreement(*map(list, zip(*both, strict=True)))["kappa"]
    return scores


def measure_agreement(said: Sequence[bool], labels: Sequence[bool]) -> dict[str, Score]:
    """Return ``precision`` and ``recall`` and ``kappa`` of said against labels.

    Precision is missing where nothing was said, and recall where nothing is labeled. Raises ValueError if either
    sequence is empty or they differ in length.
    """
    pairs = list(zip(said, labels, strict=True))
    both = sum(s and label for s, label in pairs)
    scores = {"kappa": kappa_score(said, labels)}
    scores |= {"precision": wilson_rate(both, sum(said))} if any(said) else {}
    return scores | ({"recall": wilson_rate(both, sum(labels))} if any(labels) else {})
