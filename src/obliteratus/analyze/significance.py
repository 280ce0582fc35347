"""What chance alone would show, by exchange of what would be exchangeable if there were nothing to find.

Each limit is for many numbers at once: in one of twenty data sets without any effect, one or more of them pass it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.core.shapes import Float

# The 95 % point of a maximum then rests on 50 permutations.
RESAMPLES = 1000
LEVEL = 0.95
# Sums of fp32 numbers carry so much of the largest of them as rounding; what lies below it is no difference.
ROUNDING = 1e-6
# Data sets simulated where a limit has no permutations to go by: the 95 % point then rests on a thousand.
DRAWN = 20000


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


def contrast_between_groups(target: Float[Tensor, "a n"], control: Float[Tensor, "b n"], seed: int = 0) -> Contrast:
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


def contrast_within_pairs(pairs: Float[Tensor, "pairs n"], seed: int = 0) -> Contrast:
    """Mean over pairs for each of n numbers; t, the signs of whole pairs flipped at random.

    Fewer than six pairs have too few flips for anything to pass one in twenty.
    """
    rows = pairs.double()
    if not rows.shape[1]:
        return Contrast(torch.empty(0), torch.empty(0), torch.inf)
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


def degrees_of_freedom(spread: float) -> float:
    """ν for which the logarithm of a χ²-distributed number has this variance: trigamma(ν/2). Within 0.01 to 10 000."""
    low, high = 0.01, 10000.0
    for _ in range(60):  # halvings of the interval: to the last digit
        middle = (low * high) ** 0.5
        too_wide = float(torch.polygamma(1, torch.tensor(middle / 2, dtype=torch.float64))) > spread
        low, high = (middle, high) if too_wide else (low, middle)
    return low


def largest_ratio(n: int, draws: int, freedom: float, seed: int = 0) -> float:
    """The 95 % point of the largest of n ratios, each of a χ²-like number to the mean of so many others like it."""
    generator = np.random.default_rng(seed)
    own = generator.gamma(freedom / 2, size=(DRAWN, n))
    others = generator.gamma(freedom / 2 * draws, size=(DRAWN, n)) / draws
    tiny = np.finfo(np.float64).tiny
    return float(np.quantile((own / np.maximum(others, tiny)).max(1), LEVEL))


Named = Callable[[int], str]


def describe_clearest(contrast: Contrast, name: Named, most: int = 3) -> str:
    """The clearest of what stands out, in words; ``none`` where nothing does."""
    found = contrast.found
    if not found:
        return "nothing beyond chance"
    listed = ", ".join(f"{name(i)} {float(contrast.value[i]):+.3g}" for i in found[:most])
    return listed + (f" and {len(found) - most} more" if len(found) > most else "")


def random_units(n: int, width: int, seed: int) -> Float[Tensor, "n width"]:
    """Unit vectors from the uniform distribution on the sphere, seeded."""
    noise = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return normalize(noise, dim=1)


def random_rows(k: int, width: int, seed: int) -> Float[Tensor, "k width"]:
    """k orthonormal rows, drawn uniformly, seeded."""
    noise = torch.randn(width, k, generator=torch.Generator().manual_seed(seed))
    q: Tensor = torch.linalg.qr(noise)[0]
    return q.T.contiguous()
