"""Fits one change of low rank, under the norm rules that may hide it, and makes it an edit of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from obliteratus.audit.fits import (
    LowRank,
    Projection,
    find_kept_norms,
    fit_left,
    fit_left_oblique,
    fit_low_rank_with_factors,
    fit_right,
    fit_right_oblique,
)
from obliteratus.audit.spectra import Rank, count_rank, decompose, top_factors
from obliteratus.core.norms import NormRule
from obliteratus.core.shapes import Float
from obliteratus.core.types import Edit, Site
from obliteratus.excise.change import apply_change
from obliteratus.excise.linear import LOW_RANK as RANK_OF_UNIT_ROWS
from obliteratus.excise.linear import factorize_low_rank

Matrix = Float[Tensor, "out inp"]
# Thresholds: see docs/experiments/trace.md for what they were chosen on.
ORTHOGONAL = (
    0.9  # share of D that an orthogonal family explains: 1.00 for ours, k ÷ inputs for random changes of rank k
)
SURE = 1.2  # how much more than expected rounding may have made: the mean of so many errors varies by less than 1 %
BETTER = 2e-3  # share that a less simple edit must explain beyond a simpler one to be preferred
EXPLAINED = 1e-4  # share of ‖D‖² that a fit may leave to be taken without trying others
TRUNCATED = 1e-2  # fourth singular value over the third where a change was cut to rank 3: 1e-4 in fp32
ONE_STRENGTH = 0.02  # relative distance of strengths below which covectors are given for a strength of their own


@dataclass(frozen=True)
class PartFit:
    """A change of low rank of some columns of a matrix, and what it is."""

    edit: Edit | None
    projection: Projection | None
    rule: NormRule
    rest: float
    """Squared length of what the edit leaves; that of all if there is none."""
    low: LowRank
    whole: float
    """Squared length of the difference."""


def is_orthogonal(fit: PartFit) -> bool:
    """Return whether the change is a projection of the orthogonal family."""
    return fit.projection is not None and not fit.projection.oblique


def fit_change(
    before: Matrix, after: Matrix, floor: float, site: Site | None, gain: Tensor | None, rank: Rank | None = None
) -> PartFit | None:
    """Return the change of low rank that explains most of a difference; None if it has no low rank.

    floor: squared length that rounding is known to have. rank: of the difference, if it is known.
    """
    difference = after - before
    whole = float(difference.double().square().sum())
    spectrum = decompose(difference) if rank is None else None
    known = rank if spectrum is None else count_rank(difference, spectrum, SURE * floor)
    assert known is not None, "it was given, or has just been counted"
    fits: list[PartFit] = []
    if known.ends and known.count > 0 and 2 * known.count < min(before.shape):
        low = LowRank(*top_factors(difference, known.count))
        fits.append(_fit_rule(before, after, low, "none", site, gain, floor))
        edit = fits[0].edit
        if edit is not None and edit.covectors is None and fits[0].rest <= EXPLAINED * whole + 2 * floor:
            return fits[0]
    for low, rule in _list_rules(before, after, floor):
        fits.append(_fit_rule(before, after, low, rule, site, gain, floor))
    return _choose(fits, whole) if fits else None


def _list_rules(before: Matrix, after: Matrix, floor: float) -> Iterator[tuple[LowRank, NormRule]]:
    """Yield the norm rules that may hide a change of low rank, each with that change."""
    kept, difference = find_kept_norms(before, after, floor), after - before
    if "columns" in kept or "whole" in kept:
        low = fit_low_rank_with_factors(before, after, 0, floor)
        if low is not None:
            yield low, "columns" if "columns" in kept else "whole"
    if "rows" in kept and "columns" not in kept:
        low = fit_low_rank_with_factors(before, after, 1, floor)
        if low is not None:
            yield low, "rows"
            yield low, "unit_rows"
    left, rows = top_factors(difference, RANK_OF_UNIT_ROWS + 1)
    sizes = torch.linalg.svdvals(rows)
    if float(sizes[RANK_OF_UNIT_ROWS]) < TRUNCATED * float(sizes[RANK_OF_UNIT_ROWS - 1]):
        yield LowRank(left[:, :RANK_OF_UNIT_ROWS], rows[:RANK_OF_UNIT_ROWS]), "unit_rows_rank_3"


def _choose(fits: Sequence[PartFit], whole: float) -> PartFit:
    """Return the fit that leaves least; of nearly equal ones the simplest."""
    least = min(fit.rest for fit in fits)
    near = [fit for fit in fits if fit.rest <= least + EXPLAINED * whole]
    return min(near, key=lambda fit: (not is_orthogonal(fit), fit.edit is None or fit.edit.covectors is not None))


def _fit_rule(
    before: Matrix, after: Matrix, low: LowRank, rule: NormRule, site: Site | None, gain: Tensor | None, floor: float
) -> PartFit:
    """Return the best projection for one low-rank change under a norm rule, with what the edit leaves."""
    whole = float((after - before).double().square().sum())
    noise = floor / max(len(before), 1)  # errors of a row of C = UᵀD are those of one row of D
    if rule in ("unit_rows", "unit_rows_rank_3"):
        candidates: Iterable[Projection] = [_fit_unit_rows(before, after, low, rule)]
    else:
        candidates = _list_projections(before, after, low, rule, site, gain, noise)
    side = "right" if _reads(site) else "left"
    best: tuple[Edit | None, float] = (None, whole)
    projection: Projection | None = None
    for one in candidates:
        orthogonal = not one.oblique and one.share >= ORTHOGONAL
        edits = _make_edit(site, one, rule) if site is not None and one.side == side else []
        made = _best_edit(edits, before, after, whole) if orthogonal or one.oblique else (None, whole)
        if projection is None or (projection.oblique and orthogonal):
            projection = one if orthogonal or one.oblique else None
        if made[0] is not None and made[1] < best[1] - BETTER * whole:
            best = made
        if orthogonal and (best[1] <= EXPLAINED * whole + 2 * floor or one.side != side):
            break
    return PartFit(best[0], projection, rule, best[1], low, whole)


def _list_projections(
    before: Matrix, after: Matrix, low: LowRank, rule: NormRule, site: Site | None, gain: Tensor | None, noise: float
) -> Iterator[Projection]:
    """Yield projections that may make a change of low rank: those that the site is edited by come first."""
    tail = float((after - before - low.left @ low.rows).double().square().sum()) if rule == "none" else 0.0
    noise = max(noise, tail / max(len(before), 1))
    reads = _reads(site)
    left, right = partial(fit_left, before, low), partial(fit_right, before, low, gain if reads else None)
    yield right() if reads else left()
    yield left() if reads else right()
    yield fit_right_oblique(before, low, noise) if reads else fit_left_oblique(before, low, noise)


def _reads(site: Site | None) -> bool:
    return site is not None and site.role == "reads"


def _fit_unit_rows(before: Matrix, after: Matrix, low: LowRank, rule: NormRule) -> Projection:
    """Return the projection of the matrix with rows of length 1.

    The nearest matrix of rank 3 also holds a part of the rows' rescaling, so its first vector is turned until the edit
    that it makes has the difference's first vector.
    """
    if rule == "unit_rows":
        return fit_left(before, low, unit_rows=True)
    lengths = before.norm(dim=1).clamp(min=1e-30)
    wanted, sizes, _ = torch.linalg.svd(low.left @ torch.linalg.qr(low.rows.mT, mode="r").R.mT, full_matrices=False)
    target, size = wanted[:, 0], float(sizes[0])
    row = target / lengths
    row, strength = row / row.norm(), 1.0
    for _ in range(10):  # each turn shrinks the error about tenfold
        up, down = factorize_low_rank(before, row[None], strength)
        u, s, _ = torch.linalg.svd(up @ torch.linalg.qr(down.mT, mode="r").R.mT, full_matrices=False)
        first = u[:, 0] * torch.sign(u[:, 0] @ target)
        strength = strength * size / max(float(s[0]), 1e-300)
        row = row + (target - first) / lengths * (row * lengths).norm()
        row = row / row.norm()
    made = up @ down
    difference = after - before
    share = 1 - float((difference - made).square().sum() / difference.square().sum().clamp(min=1e-300))
    inner = torch.full((1, 1), strength).to(before)
    return Projection("left", row[None], inner, row[None], share, False, True, (strength,))


def _make_edit(site: Site, fit: Projection, rule: NormRule) -> list[Edit]:
    """Return edits of one strength without covectors, and with them."""
    norm: NormRule = rule if site.role == "writes" else "none"
    strength = sum(fit.strengths) / len(fit.strengths)
    apart = max(abs(one - strength) for one in fit.strengths)
    if fit.oblique and (
        abs(strength) < ONE_STRENGTH or apart > ONE_STRENGTH * abs(strength) or abs(strength - 1) > 0.9
    ):
        strength = 1.0
    covectors = (fit.inner @ fit.along / strength).float().contiguous()
    basis = fit.basis.float().contiguous()
    edits = [Edit(site, basis, strength, norm, covectors=covectors)]
    if not fit.oblique:
        along = None if fit.along is fit.basis or torch.equal(fit.along, fit.basis) else fit.along.float().contiguous()
        edits.insert(0, Edit(site, basis, strength, norm, covectors=along))
    return edits


def _best_edit(edits: Sequence[Edit], before: Matrix, after: Matrix, whole: float) -> tuple[Edit | None, float]:
    """Return the simplest edit that explains about as much as the best, and the squared length that it leaves."""
    rests = []
    for edit in edits:
        bare = replace(edit, site=replace(edit.site, span=None, layout="linear"))
        rests.append(float((after - apply_change(bare, before)).double().square().sum()))
    if not rests or min(rests) > whole:
        return None, whole
    chosen = next(i for i, rest in enumerate(rests) if rest <= min(rests) + BETTER * whole)
    return edits[chosen], rests[chosen]
