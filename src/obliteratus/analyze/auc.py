"""The area under the ROC curve: how well a number tells two groups apart, whatever its unit, with an interval."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from obliteratus.core.results import Score
from obliteratus.core.shapes import Float
from obliteratus.verify.intervals import Z

HALVINGS = 60  # of the interval 0–1: past what fp64 tells apart


def pairwise_auc(target: Float[Tensor, "a n"], control: Float[Tensor, "b n"]) -> Float[Tensor, " n"]:
    """Return P(target > control) + ½ P(equal) over all pairs, for each of n numbers (Mann and Whitney 1947)."""
    parts = [(x > control).float().mean(0) + 0.5 * (x == control).float().mean(0) for x in target]
    return torch.stack(parts).mean(0)


def delong_auc(one: Float[Tensor, " n"], two: Float[Tensor, " m"]) -> Score:
    """Return the probability that a value of ``one`` exceeds one of ``two``, ties counted half, with its interval.

    The interval is DeLong's (1988), which assumes nothing of the values' distribution. Where one group lies wholly
    above the other, or all values are equal, its variance is zero and says nothing; Newcombe's interval (2006,
    method 5) takes its place. Values are taken as independent; those from cross-fitting nearly are.
    """
    wins = _count_wins(one.double(), two.double())
    value = float(wins.mean())
    variance = float(wins.mean(1).var() / len(one) + wins.mean(0).var() / len(two))
    if variance > 0:
        low, high = value - Z * sqrt(variance), value + Z * sqrt(variance)
    else:
        low, high = newcombe_interval(value, len(one), len(two))
    return Score(value=value, low=max(0.0, low), high=min(1.0, high), n=len(one) + len(two), unit="AUC")


def newcombe_interval(value: float, n: int, m: int) -> tuple[float, float]:
    """Return the AUCs that lie Z of their own standard errors from the observed one; not empty at 0 and 1."""
    return _find_end(value, 0.0, n, m), _find_end(value, 1.0, n, m)


def _count_wins(one: Float[Tensor, " n"], two: Float[Tensor, " m"]) -> Float[Tensor, "n m"]:
    gap = one[:, None] - two[None]
    return (gap > 0).double() + 0.5 * (gap == 0).double()


def _find_end(value: float, bound: float, n: int, m: int) -> float:
    """Return the AUC nearest to ``bound`` that the observed one does not refute, by bisection."""
    near = value
    for _ in range(HALVINGS):
        middle = (near + bound) / 2
        compatible = abs(middle - value) <= Z * sqrt(_compute_variance(middle, n, m))
        near, bound = (middle, bound) if compatible else (near, middle)
    return near


def _compute_variance(value: float, n: int, m: int) -> float:
    """Return Hanley and McNeil's variance (1982), with Newcombe's change: the mean group size inside the bracket."""
    more = (n + m) / 2 - 1
    inside = 1 + more * (1 - value) / (2 - value) + more * value / (1 + value)
    return value * (1 - value) * inside / (n * m)
