"""How well one number tells two groups apart, whatever its unit: the area under the ROC curve and its interval."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from obliteratus.core.results import Score
from obliteratus.core.shapes import Float
from obliteratus.verify.intervals import Z

HALVINGS = 60  # of the interval 0–1: past what fp64 tells apart


def pairwise_auc(target: Float[Tensor, "a n"], control: Float[Tensor, "b n"]) -> Float[Tensor, " n"]:
    """P(target > control) + ½ P(equal), over all pairs, for each of n numbers (Mann and Whitney 1947)."""
    parts = [(x > control).float().mean(0) + 0.5 * (x == control).float().mean(0) for x in target]
    return torch.stack(parts).mean(0)


def delong_auc(one: Float[Tensor, " n"], two: Float[Tensor, " m"]) -> Score:
    """The probability that a value of ``one`` lies above one of ``two``, ties counted half, with its interval.

    The interval is DeLong's (1988), which assumes nothing of the values. Where one group lies wholly above the other,
    or all values are the same, its variance is zero and says nothing; there Newcombe's (2006, method 5) stands.
    Values are taken as independent: those from cross-fitting nearly are.
    """
    wins = _wins(one.double(), two.double())
    value = float(wins.mean())
    variance = float(wins.mean(1).var() / len(one) + wins.mean(0).var() / len(two))
    if variance > 0:
        low, high = value - Z * sqrt(variance), value + Z * sqrt(variance)
    else:
        low, high = newcombe(value, len(one), len(two))
    return Score(value=value, low=max(0.0, low), high=min(1.0, high), n=len(one) + len(two), unit="AUC")


def newcombe(value: float, n: int, m: int) -> tuple[float, float]:
    """Where an AUC's distance to the one observed is Z standard errors, at *its* value: not empty at 0 and 1."""
    return _end(value, 0.0, n, m), _end(value, 1.0, n, m)


def _wins(one: Float[Tensor, " n"], two: Float[Tensor, " m"]) -> Float[Tensor, "n m"]:
    gap = one[:, None] - two[None]
    return (gap > 0).double() + 0.5 * (gap == 0).double()


def _end(value: float, far: float, n: int, m: int) -> float:
    """The farthest AUC towards ``far`` that the one observed does not refute, by halving."""
    near = value
    for _ in range(HALVINGS):
        middle = (near + far) / 2
        held = abs(middle - value) <= Z * sqrt(_variance(middle, n, m))
        near, far = (middle, far) if held else (near, middle)
    return near


def _variance(value: float, n: int, m: int) -> float:
    """Hanley and McNeil's (1982), with both groups of their mean size inside the bracket as Newcombe has it."""
    more = (n + m) / 2 - 1
    inside = 1 + more * (1 - value) / (2 - value) + more * value / (1 + value)
    return value * (1 - value) * inside / (n * m)
