"""What chance alone would show, by exchange of what would be exchangeable if there were nothing to find.

Each limit is for many numbers at once: in one of twenty data sets without any effect, one or more of them pass it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from obliteratus.shapes import Float

# The 95 % point of a maximum then rests on 50 permutations.
RESAMPLES = 1000
LEVEL = 0.95
# Sums of fp32 numbers carry so much of the largest of them as rounding; what lies below it is no difference.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Contrast:
    """Differences of means in units of their standard error, and what the largest of them reaches by chance."""

    value: Float[Tensor, " n"]
    """In their own unit."""
    error: Float[Tensor, " n"]
    """Standard error, same unit."""
    limit: float
    """|value / error| that the largest of all passes in one data set of twenty without any effect."""

    @property
    def t(self) -> Float[Tensor, " n"]:
        """value / error."""
        return self.value / self.error

    @property
    def found(self) -> list[int]:
        """The numbers beyond the limit, largest |t| first."""
        order = self.t.abs().argsort(descending=True, stable=True)
        return [int(i) for i in order if abs(float(self.t[i])) > self.limit]


def between(target: Float[Tensor, "a n"], control: Float[Tensor, "b n"], seed: int = 0) -> Contrast:
    """Mean of target − mean of control for each of n numbers; Welch's t, labels permuted (Westfall and Young 1993)."""
    rows = torch.cat([target, control]).double()
    if not rows.shape[1]:
        return Contrast(torch.empty(0), torch.empty(0), torch.inf)
    rows = rows - rows.mean(0)
    a, n = len(target), len(rows)
    labels = _shuffles(n, seed) < a
    mask = torch.cat([(torch.arange(n) < a)[None], labels]).double()
    floor = ROUNDING * float(torch.cat([target, control]).abs().max()) + torch.finfo(torch.float64).tiny
    value, error = _welch(mask, rows, floor)
    return _contrast(value, error)


def _shuffles(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(RESAMPLES, n, generator=generator).argsort(dim=1)


def _welch(mask: Tensor, rows: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """mask [draws, rows] is 1 in the first group. Differences and standard errors [draws, n]."""
    means, errors = [], []
    for inside in (mask, 1 - mask):
        count = inside.sum(1, keepdim=True)
        mean = inside @ rows / count
        spread = (inside @ rows.square() / count - mean.square()).clamp(min=0)
        means.append(mean)
        errors.append(spread / (count - 1).clamp(min=1))
    return means[0] - means[1], (errors[0] + errors[1] + floor**2).sqrt()


def within(pairs: Float[Tensor, "pairs n"], seed: int = 0) -> Contrast:
    """Mean over pairs for each of n numbers; t, the signs of whole pairs flipped at random.

    Fewer than six pairs have too few flips for anything to pass one in twenty.
    """
    rows = pairs.double()
    signs = 1.0 - 2.0 * torch.randint(2, (RESAMPLES, len(rows)), generator=torch.Generator().manual_seed(seed)).double()
    signs = torch.cat([torch.ones(1, len(rows), dtype=torch.float64), signs])
    floor = ROUNDING * float(rows.abs().max()) + torch.finfo(torch.float64).tiny
    mean = signs @ rows / len(rows)
    spread = (rows.square().mean(0) - mean.square()).clamp(min=0) / max(len(rows) - 1, 1)
    return _contrast(mean, (spread + floor**2).sqrt())


def _contrast(value: Tensor, error: Tensor) -> Contrast:
    """Of the first draw, the real one, against all others."""
    largest = (value[1:] / error[1:]).abs().amax(1)
    return Contrast(value[0].float(), error[0].float(), float(torch.quantile(largest, LEVEL)))


def largest_normal(n: int, freedom: int, draws: int = 20000, seed: int = 0) -> float:
    """The 95 % point of the largest of n independent t-distributed numbers with so many degrees of freedom, drawn."""
    generator = torch.Generator().manual_seed(seed)
    above = torch.randn(draws, n, generator=generator, dtype=torch.float64)
    squares = torch.randn(draws, freedom, generator=generator, dtype=torch.float64).square().mean(1, keepdim=True)
    return float(torch.quantile((above / squares.sqrt()).amax(1), LEVEL))


Named = Callable[[int], str]


def told(contrast: Contrast, name: Named, most: int = 3) -> str:
    """The clearest of what stands out, in words; ``none`` where nothing does."""
    found = contrast.found
    if not found:
        return "nothing beyond chance"
    listed = ", ".join(f"{name(i)} {float(contrast.value[i]):+.3g}" for i in found[:most])
    return listed + (f" and {len(found) - most} more" if len(found) > most else "")
