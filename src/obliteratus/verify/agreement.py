"""How well verdicts agree with a person's labels: precision, recall and Cohen's kappa, each with an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from obliteratus.core.results import Score
from obliteratus.core.shapes import Float
from obliteratus.judge.judge import SHOWN
from obliteratus.verify.intervals import bootstrap, wilson_rate


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
    """Return ``precision`` and ``recall`` (Wilson intervals) and ``kappa`` (bootstrap) of said against labels.

    Precision is missing where nothing was said, and recall where nothing is labeled. Raises ValueError if either
    sequence is empty or they differ in length.
    """
    pairs = list(zip(said, labels, strict=True))
    both = sum(s and label for s, label in pairs)
    scores = {"kappa": bootstrap(torch.tensor([2.0 * s + label for s, label in pairs]), kappa, "kappa")}
    scores |= {"precision": wilson_rate(both, sum(said))} if any(said) else {}
    return scores | ({"recall": wilson_rate(both, sum(labels))} if any(labels) else {})


def kappa(codes: Float[Tensor, "... n"]) -> Float[Tensor, "..."]:
    """Return Cohen's kappa (Cohen 1960) over the last axis of 2·said + label, or 1 where both say one thing only."""
    said, label = (codes >= 2).double().mean(-1), (codes % 2 == 1).double().mean(-1)
    agree = ((codes == 0) | (codes == 3)).double().mean(-1)
    chance = said * label + (1 - said) * (1 - label)
    return torch.where(chance < 1, (agree - chance) / (1 - chance).clamp(min=1e-12), torch.ones_like(agree))
