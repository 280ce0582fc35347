"""What kind of edit makes one matrix of another: projections, scalings and low-rank changes, each fitted to it.

W is [out, in] before and W′ after. A change of low rank is D = U C with U [out, k] orthonormal. It is

- a left projection, as of writers, if D = −M W with M = U m Uᵀ (orthogonal family), or M = U A (oblique);
- a right projection, as of readers, likewise from the other side, where a norm's gain γ may stand before the matrix;
- only a change of low rank, as of a merged adapter, if no such M fits.

Norm rules hide the low rank: W′ = r (W + U C) c with factors r of rows or c of columns. These are fitted with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from obliteratus.audit.spectra import top_factors
from obliteratus.core.norms import NormRule
from obliteratus.core.shapes import Float

Matrix = Float[Tensor, "out inp"]
ROUNDS = 40  # of fitting factors and low rank in turns
RANKS = (1, 2, 4, 8, 16)  # tried in this order where factors hide the rank; eight directions in two passes make 16
# The rest behind a fit in turns that is like nothing: as a share of D's squared length, beside twice the rounding.
# Measured on edits of our methods in fp32: at most 1e-6 with the right rank and rule, at least 1e-2 otherwise.
FITTED = 1e-3
SINGULAR = 1e-10  # relative to the largest eigenvalue of W Wᵀ: directions below are not written at all


@dataclass(frozen=True)
class LowRank:
    """W′ = r (W + U C) c."""

    left: Float[Tensor, "out k"]
    """U, with orthonormal columns."""
    rows: Float[Tensor, "k inp"]
    """C."""
    inputs: Float[Tensor, " inp"] | None = None
    """c, or None for ones."""
    outputs: Float[Tensor, " out"] | None = None
    """r, or None for ones."""


@dataclass(frozen=True)
class Projection:
    """D = −M W (side ``left``) or −W M (``right``) with M = Bᵀ K A."""

    side: str
    basis: Float[Tensor, "k n"]
    """B: what is removed; orthonormal rows unless a gain stands before the matrix."""
    inner: Float[Tensor, "k k"]
    """K. Its eigenvalues are the strengths."""
    along: Float[Tensor, "k n"]
    """A: what is read."""
    share: float
    """Share (0–1) of D's squared length that it explains."""
    oblique: bool
    unit_rows: bool = False
    """Whether it holds of W with rows of length 1."""
    strengths: tuple[float, ...] = field(default=())
    """Real parts of K's eigenvalues for A Bᵀ = I, largest first."""


def fit_factor(before: Matrix, after: Matrix) -> tuple[float, float]:
    """Return the factor f with f W nearest to W′, and the share of the difference that it explains."""
    whole = float((after - before).square().sum())
    factor = float((before * after).sum() / before.square().sum().clamp(min=1e-300))
    return factor, 1 - float((after - factor * before).square().sum()) / max(whole, 1e-300)


def fit_factors(before: Matrix, after: Matrix, axis: int) -> tuple[Tensor, float]:
    """Return a factor for each column (axis 0) or row (axis 1), and the share of the difference that they explain."""
    whole = float((after - before).square().sum())
    factors = (before * after).sum(axis) / before.square().sum(axis).clamp(min=1e-300)
    rest = after - before * factors.unsqueeze(axis)
    return factors, 1 - float(rest.square().sum()) / max(whole, 1e-300)


def fit_low_rank_with_factors(before: Matrix, after: Matrix, axis: int, floor: float) -> LowRank | None:
    """Return the change of low rank behind factors of columns (axis 0) or rows (axis 1); None if there is none.

    Outside of the change's span, W′ is W times the factors, which gives the factors; without them the difference has
    a low rank, which gives the span. The two take turns. floor: squared length that rounding is known to have.
    """
    if axis == 1:
        turned = fit_low_rank_with_factors(before.mT.contiguous(), after.mT.contiguous(), 0, floor)
        if turned is None:
            return None
        u, c = top_factors(turned.rows.mT @ turned.left.mT, turned.left.shape[1])
        return LowRank(u, c, outputs=turned.inputs)
    whole = float((after - before).square().sum())
    for rank in RANKS:
        if 2 * rank >= min(before.shape):
            return None
        factors, rest, found = torch.ones_like(before[0]), float("inf"), None
        for _ in range(ROUNDS):
            difference = after / factors - before
            u, c = top_factors(difference, rank)
            left_over = float((difference - u @ c).square().sum())
            if left_over > 0.98 * rest:
                break
            rest, found = left_over, LowRank(u, c, inputs=factors)
            outside, moved = before - u @ (u.mT @ before), after - u @ (u.mT @ after)
            factors = (outside * moved).sum(0) / outside.square().sum(0).clamp(min=1e-300)
            factors = torch.where(factors > 0, factors, 1.0)
        if found is not None and rest <= FITTED * whole + 2 * floor:
            return found
    return None


# --------------------------------------------------------------------------------------- projections
def fit_left(before: Matrix, low: LowRank, unit_rows: bool = False) -> Projection:
    """Return the orthogonal family: D = −U K Uᵀ W, with K by least squares. unit_rows: of W with rows of length 1."""
    u, c = low.left, low.rows
    if unit_rows:
        lengths = before.norm(dim=1).clamp(min=1e-30)
        before = before / lengths[:, None]
        q, r = torch.linalg.qr(u / lengths[:, None])
        u, c = q, r @ c
    seen = u.mT @ before
    inner = -torch.linalg.lstsq(seen.mT, c.mT).solution.mT
    share = _share(c, c + inner @ seen)
    return Projection("left", u.mT, inner, u.mT, share, False, unit_rows, _strengths(inner))


def fit_left_oblique(before: Matrix, low: LowRank, noise: float) -> Projection:
    """Return D = −U A W with the smallest A that explains C = −A W as well as its noise allows.

    noise: squared length of the errors of one row of C. Of covectors that W does not tell apart, the ridge takes the
    smaller.
    """
    gram = before @ before.mT
    prior = float(low.rows.square().sum()) / max(float(before.square().sum()), 1e-300) / len(low.rows)
    ridge = noise / before.shape[1] / max(prior, 1e-300) + SINGULAR * float(gram.diagonal().sum())
    system = gram + ridge * torch.eye(len(gram)).to(gram)
    along = -torch.linalg.solve(system, before @ low.rows.mT).mT
    share = _share(low.rows, low.rows + along @ before)
    strengths = _strengths(along @ low.left)
    return Projection("left", low.left.mT, torch.eye(len(along)).to(along), along, share, True, False, strengths)


def fit_right(before: Matrix, low: LowRank, gain: Float[Tensor, " inp"] | None) -> Projection:
    """Return the orthogonal family from the right: D = −W Bᵀ K A, with A = Q ⊘ γ and B = Q ⊙ γ."""
    v = torch.linalg.qr(low.rows.mT)[0]
    basis, along = v.mT, v.mT
    if gain is not None:
        q = torch.linalg.qr(v * gain[:, None])[0]
        seen = gain.abs() > 1e-6 * gain.abs().max()  # as `linear.fold_gain_reader`
        basis, along = (q * gain[:, None]).mT, (q * torch.where(seen, 1 / gain, 0.0)[:, None]).mT
    product = before @ basis.mT
    difference = low.left @ low.rows
    inner = -torch.linalg.lstsq(product, difference @ torch.linalg.pinv(along)).solution
    share = _share(difference, difference + product @ inner @ along)
    return Projection("right", basis, inner, along, share, False, False, _strengths(inner))


def fit_right_oblique(before: Matrix, low: LowRank, noise: float) -> Projection:
    """Return D = −W Bᵀ A with A orthonormal and the smallest B that explains it."""
    right = torch.linalg.qr(low.rows.mT)[0]
    heights = low.left @ (low.rows @ right)
    mirrored = fit_left_oblique(before.mT, LowRank(right, heights.mT), noise)
    along = right.mT
    eye = mirrored.inner
    return Projection("right", mirrored.along, eye, along, mirrored.share, True, False, mirrored.strengths)


def _share(whole: Tensor, rest: Tensor) -> float:
    return 1 - float(rest.square().sum()) / max(float(whole.square().sum()), 1e-300)


def _strengths(inner: Tensor) -> tuple[float, ...]:
    return tuple(sorted(torch.linalg.eigvals(inner.double()).real.tolist(), reverse=True))


# --------------------------------------------------------------------------------------- norms kept
def find_kept_norms(before: Matrix, after: Matrix, noise: float) -> tuple[str, ...]:
    """Return which lengths stayed: of ``columns``, of ``rows``, of the ``whole`` matrix.

    noise: squared length that rounding is known to have. A length counts as kept if it changed by no more than
    rounding would change it: with independent errors, by σ for a vector of any length.
    """
    sigma = (noise / max(before.numel(), 1)) ** 0.5
    kept = []
    for name, axis in (("columns", 0), ("rows", 1)):
        old, new = before.norm(dim=axis), after.norm(dim=axis)
        allowed = 3 * sigma + KEPT_LENGTH * old
        if float(((new - old).abs() <= allowed).float().mean()) >= KEPT_MOST:
            kept.append(name)
    old, new = float(before.norm()), float(after.norm())
    if abs(new - old) <= 3 * sigma + noise / max(old, 1e-300) + KEPT_LENGTH * old:
        kept.append("whole")
    return tuple(kept)


# In fp32 an edit keeps a length to 3e-7 of it; removing a direction of 576 without a rule changes the median column of
# SmolLM2's writers by 2e-4, and the least changed tenth by 3e-6.
KEPT_LENGTH = 2e-6
KEPT_MOST = 0.97  # of the rows or columns: a few short ones hold nothing but errors

RULES: dict[str, NormRule] = {"columns": "columns", "rows": "rows", "whole": "whole"}
