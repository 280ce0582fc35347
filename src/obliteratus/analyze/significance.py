"""What chance alone would show, from permutations of what is exchangeable where there is no effect.

Every limit covers many numbers at once: in at most 1 of 20 data sets without any effect (`LEVEL`), at least one of them
exceeds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze.samples import LEVEL
from obliteratus.core.shapes import Float

RESAMPLES = 1000  # permutations; the 95 % point of a maximum then rests on 50 of them
LEAST_PAIRS = 6  # with fewer, even the rarest of all sign flips is no rarer than the level
MOST_PAIRS = 11  # up to here all 2^(pairs − 1) sign flips are tried, which are no more than `RESAMPLES`
SAME = 1e-9  # relative: two draws that differ by less are equal but for the rounding of fp64
# A sum of fp32 numbers has a rounding error of up to this share of the largest of them; a smaller difference is none.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Contrast:
    """Differences of means with their standard errors, and the size that the largest of them reaches by chance."""

    value: Float[Tensor, " n"]
    """Differences in their own unit; fp64."""
    error: Float[Tensor, " n"]
    """Standard errors in the same unit."""
    limit: float
    """The largest |value / error| exceeds this in at most 1 of 20 data sets without any effect."""

    @property
    def t(self) -> Float[Tensor, " n"]:
        """value / error."""
        return self.value / self.error

    @property
    def significant(self) -> list[int]:
        """Indices of the differences beyond the limit, largest |t| first."""
        order = self.t.abs().argsort(descending=True, stable=True)
        return [int(i) for i in order if abs(float(self.t[i])) > self.limit]

    def split(self, n: int) -> tuple[Contrast, Contrast]:
        """Return the first n differences and the others. Their limit stays that of all of them together."""
        first, others = (Contrast(self.value[i], self.error[i], self.limit) for i in (slice(n), slice(n, None)))
        return first, others


def contrast_between_groups(target: Float[Tensor, "a n"], control: Float[Tensor, "b n"], seed: int = 0) -> Contrast:
    """Return mean(target) − mean(control) for each of n numbers.

    t is Welch's; the limit comes from permuted labels (Westfall and Young 1993).
    """
    rows = torch.cat([target, control]).double()
    if not rows.shape[1]:
        return NO_CONTRAST
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
    """Return the mean over pairs for each of n numbers; the limit comes from flips of whole pairs' signs.

    Up to `MOST_PAIRS` pairs all flips are tried, so the level is exact; beyond, random ones. With fewer than six pairs
    there are too few flips for anything to be significant at 1 in 20.
    """
    rows = pairs.double()
    if not rows.shape[1]:
        return NO_CONTRAST
    signs = _draw_signs(len(rows), seed)
    floor = ROUNDING * float(rows.abs().max()) + torch.finfo(torch.float64).tiny
    mean = signs @ rows / len(rows)
    spread = (rows.square().mean(0) - mean.square()).clamp(min=0) / max(len(rows) - 1, 1)
    return _make_contrast(mean, (spread + floor**2).sqrt())


def _draw_signs(n: int, seed: int) -> Float[Tensor, "draws n"]:
    """Return signs ±1, all of the first row positive: every pattern that keeps one pair's sign, or random ones.

    To flip all signs changes no |t|.
    """
    if n <= MOST_PAIRS:
        bits = torch.arange(2 ** (n - 1))[:, None] >> torch.arange(n) & 1
    else:
        bits = torch.randint(2, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
        bits = torch.cat([torch.zeros_like(bits[:1]), bits])
    return 1.0 - 2.0 * bits.double()


def _make_contrast(value: Tensor, error: Tensor) -> Contrast:
    """Return the first draw, which is the data as observed, with the limit that a share `LEVEL` of all draws exceeds.

    The observed draw counts as one of them, so that its chance to be among those is at most the level.
    """
    largest = (value / error).abs().amax(1)
    beyond = int(LEVEL * len(largest))
    return Contrast(value[0], error[0], (1 + SAME) * float(largest.sort(descending=True).values[beyond]))


NO_CONTRAST = Contrast(torch.empty(0), torch.empty(0), torch.inf)


def describe_clearest(contrast: Contrast, name: Callable[[int], str], most: int = 3) -> str:
    """Return the names and values of the clearest significant differences, at most ``most`` of them, as text."""
    significant = contrast.significant
    if not significant:
        return "nothing beyond chance"
    listed = ", ".join(f"{name(i)} {float(contrast.value[i]):+.3g}" for i in significant[:most])
    return listed + (f" and {len(significant) - most} more" if len(significant) > most else "")


# ------------------------------------------------------------------------------------------- random directions
def draw_unit_vectors(n: int, width: int, seed: int) -> Float[Tensor, "n width"]:
    """Return unit vectors drawn uniformly from the sphere."""
    noise = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return normalize(noise, dim=1)
