"""What chance alone would show, from permutations of what is exchangeable where there is no effect.

Every limit covers many numbers at once: in 1 of 20 data sets without any effect, at least one of them exceeds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.core.shapes import Float

RESAMPLES = 1000  # permutations; the 95 % point of a maximum then rests on 50 of them
QUANTILE = 0.95
# A sum of fp32 numbers has a rounding error of up to this share of the largest of them; a smaller difference is none.
ROUNDING = 1e-6
SIMULATIONS = 20000  # data sets simulated where nothing can be permuted; the 95 % point then rests on 1000 of them


@dataclass(frozen=True)
class Contrast:
    """Differences of means with their standard errors, and the size that the largest of them reaches by chance."""

    value: Float[Tensor, " n"]
    """Differences in their own unit."""
    error: Float[Tensor, " n"]
    """Standard errors in the same unit."""
    limit: float
    """The largest |value / error| exceeds this in 1 of 20 data sets without any effect."""

    @property
    def t(self) -> Float[Tensor, " n"]:
        """value / error."""
        return self.value / self.error

    @property
    def significant(self) -> list[int]:
        """Indices of the differences beyond the limit, largest |t| first."""
        order = self.t.abs().argsort(descending=True, stable=True)
        return [int(i) for i in order if abs(float(self.t[i])) > self.limit]


def contrast_between_groups(target: Float[Tensor, "a n"], control: Float[Tensor, "b n"], seed: int = 0) -> Contrast:
    """Return mean(target) − mean(control) for each of n numbers.

    t is Welch's; the limit comes from permuted labels (Westfall and Young 1993).
    """
    rows = torch.cat([target, control]).double()
    if not rows.shape[1]:
        return Contrast(torch.empty(0), torch.empty(0), torch.inf)
    rows = rows - rows.mean(0)
    a, n = len(target), len(rows)
    labels = _draw_shuffles(n, seed) < a
    mask = torch.cat([(torch.arange(n) < a)[None], labels]).double()
    floor = ROUNDING * float(torch.cat([target, control]).abs().max()) + torch.finfo(torch.float64).tiny
    value, error = _compute_welch(mask, rows, floor)
    return _make_contrast(value, error)


def _draw_shuffles(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(RESAMPLES, n, generator=generator).argsort(dim=1)


def _compute_welch(mask: Tensor, rows: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return differences of means and standard errors [draws, n]; mask [draws, rows] is 1 in the first group."""
    means, errors = [], []
    for inside in (mask, 1 - mask):
        count = inside.sum(1, keepdim=True)
        mean = inside @ rows / count
        spread = (inside @ rows.square() / count - mean.square()).clamp(min=0)
        means.append(mean)
        errors.append(spread / (count - 1).clamp(min=1))
    return means[0] - means[1], (errors[0] + errors[1] + floor**2).sqrt()


def contrast_within_pairs(pairs: Float[Tensor, "pairs n"], seed: int = 0) -> Contrast:
    """Return the mean over pairs for each of n numbers; the limit comes from random flips of whole pairs' signs.

    With fewer than six pairs there are too few flips for anything to be significant at 1 in 20.
    """
    rows = pairs.double()
    if not rows.shape[1]:
        return Contrast(torch.empty(0), torch.empty(0), torch.inf)
    signs = 1.0 - 2.0 * torch.randint(2, (RESAMPLES, len(rows)), generator=torch.Generator().manual_seed(seed)).double()
    signs = torch.cat([torch.ones(1, len(rows), dtype=torch.float64), signs])
    floor = ROUNDING * float(rows.abs().max()) + torch.finfo(torch.float64).tiny
    mean = signs @ rows / len(rows)
    spread = (rows.square().mean(0) - mean.square()).clamp(min=0) / max(len(rows) - 1, 1)
    return _make_contrast(mean, (spread + floor**2).sqrt())


def _make_contrast(value: Tensor, error: Tensor) -> Contrast:
    """Compare the first draw, which is the data as observed, with all other draws."""
    largest = (value[1:] / error[1:]).abs().amax(1)
    return Contrast(value[0].float(), error[0].float(), float(torch.quantile(largest, QUANTILE)))


def describe_clearest(contrast: Contrast, name: Callable[[int], str], most: int = 3) -> str:
    """Return the names and values of the clearest significant differences, at most ``most`` of them, as text."""
    significant = contrast.significant
    if not significant:
        return "nothing beyond chance"
    listed = ", ".join(f"{name(i)} {float(contrast.value[i]):+.3g}" for i in significant[:most])
    return listed + (f" and {len(significant) - most} more" if len(significant) > most else "")


def estimate_degrees_of_freedom(spread: float) -> float:
    """Return the ν, from 0.01 to 10,000, for which the logarithm of a χ² variable has the variance ``spread``.

    That variance is trigamma(ν/2).
    """
    low, high = 0.01, 10000.0
    for _ in range(60):  # halvings of the interval: to the last digit
        middle = (low * high) ** 0.5
        too_wide = float(torch.polygamma(1, torch.tensor(middle / 2, dtype=torch.float64))) > spread
        low, high = (middle, high) if too_wide else (low, middle)
    return low


def compute_ratio_limit(n: int, draws: int, freedom: float, seed: int = 0) -> float:
    """Return the 95 % point of the largest of n ratios, each of a χ²-like number to the mean of ``draws`` others."""
    generator = np.random.default_rng(seed)
    own = generator.gamma(freedom / 2, size=(SIMULATIONS, n))
    others = generator.gamma(freedom / 2 * draws, size=(SIMULATIONS, n)) / draws
    tiny = np.finfo(np.float64).tiny
    return float(np.quantile((own / np.maximum(others, tiny)).max(1), QUANTILE))


# ------------------------------------------------------------------------------------------- random directions
def draw_unit_vectors(n: int, width: int, seed: int) -> Float[Tensor, "n width"]:
    """Return unit vectors drawn uniformly from the sphere."""
    noise = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return normalize(noise, dim=1)


def draw_subspace(k: int, width: int, seed: int) -> Float[Tensor, "k width"]:
    """Return k orthonormal rows drawn uniformly."""
    noise = torch.randn(width, k, generator=torch.Generator().manual_seed(seed))
    q: Tensor = torch.linalg.qr(noise)[0]
    return q.T.contiguous()
