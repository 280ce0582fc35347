"""Explains the difference of one matrix: its class, its numbers, and the changes of a plan that make most of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from obliteratus.audit.fits import (
    LowRank,
    Projection,
    find_kept_norms,
    fit_factor,
    fit_factors,
    fit_left,
    fit_left_oblique,
    fit_low_rank_with_factors,
    fit_right,
    fit_right_oblique,
)
from obliteratus.audit.pairs import TensorPair
from obliteratus.audit.rounding import coarsest_unit, find_grid, is_rounding
from obliteratus.audit.spectra import Rank, count_rank, decompose, is_flat, top_factors
from obliteratus.core.shapes import Float
from obliteratus.core.types import Change, Edit, Mask, NormRule, Site, ZeroOutput
from obliteratus.excise.change import apply_change
from obliteratus.excise.linear import LOW_RANK as RANK_OF_UNIT_ROWS
from obliteratus.excise.linear import factorize_low_rank

Matrix = Float[Tensor, "out inp"]
# Classes of a tensor.
ROUNDING, REQUANTIZATION, NOISE, SCALING = "rounding", "requantization", "noise", "scaling"
PROJECTION, LOW_RANK, FULL_RANK, ZEROED, VECTOR, UNKNOWN = (
    *("projection", "low rank", "full rank", "zeroed", "vector", "unknown"),
)
# Thresholds. Chosen on edits, adapters and fine-tunes of the organisms in CHOOSING and of tiny random models, see
# docs/experiments/trace.md; the gaps between what is above and below them are given there.
SCALED = 0.98  # share of D that factors explain: 1.00 for scalings in fp32; at most 0.3 for all else that was tried
ORTHOGONAL = 0.9  # share of D that an orthogonal family explains; random changes of rank k have k ÷ inputs
SURE = 1.2  # how much more than expected rounding may have made: the mean of so many errors varies by less than 1 %
CLEAN = 1e-3  # share of ‖D‖² behind the counted singular values below which they are all: 1e-11 for adapters in fp32
KEPT_COLUMNS = 0.98  # share of columns that changed, above which an edit is of the whole matrix
FINE = 1 << 24  # numbers of a matrix up to which fits are in fp64
MOST_REPLACED = 0.5  # ‖D‖ ÷ ‖W‖ above which a matrix of full rank was replaced rather than trained: training moved 0.15
BETTER = 2e-3  # share that a less simple edit must explain beyond a simpler one to be preferred
MOSTLY = 0.5  # share of ‖D‖² in large singular values below which a matrix on a grid was only put there: at most 0.2
EXPLAINED = 1e-4  # share of ‖D‖² that a fit may leave to be taken without trying others
TRUNCATED = 1e-2  # fourth singular value over the third where a change was cut to rank 3: 1e-4 in fp32
ONE_STRENGTH = 0.02  # relative distance of strengths below which covectors are given for a strength of their own
WORTH_PLANNING = 0.3  # share of a tensor's difference that a change must explain to enter the plan


@dataclass(frozen=True)
class TensorTrace:
    """What was found out about one tensor that differs."""

    name: str
    part: str
    """Part of the site, as `Site.part`, or ``other``."""
    layer: int
    shape: tuple[int, ...]
    kind: str
    """The class."""
    energy: float
    """‖D‖², the squared Frobenius norm of the difference."""
    size: float
    """‖D‖ ÷ ‖W‖."""
    rounding: float
    """Squared length that storing in the two dtypes is expected to have given the difference."""
    rank: int = 0
    """Singular values that stand out of noise."""
    spectrum: tuple[float, ...] = ()
    """The largest singular values as shares of ‖D‖."""
    stable_rank: float = 0.0
    exact: bool = True
    """Whether all singular values were computed; otherwise a randomized method found the largest."""
    noise: float = 0.0
    """Share (0–1) of ‖D‖² that is like noise."""
    kept: tuple[str, ...] = ()
    """Lengths that stayed: of ``columns``, ``rows`` and the ``whole``."""
    rule: NormRule = "none"
    side: str = ""
    """``left`` (of the output) or ``right`` (of the input), for projections."""
    oblique: bool = False
    strength: float = 0.0
    factor: float = 1.0
    """Of a scaling."""
    grid: str = ""
    rest: float = 1.0
    """Share (0–1) of ‖D‖² that the changes leave, rounding and noise included."""
    changes: tuple[Change, ...] = ()
    site: Site | None = None
    directions: Tensor | None = None
    """What is removed, as orthonormal rows [k, width] in the coordinates of the residual stream; strongest first."""
    parts_edited: float = 1.0
    """Share of the columns that changed."""
    rows_reachable: float = 0.0
    """Share of a low-rank difference that some left projection could make."""
    trained_like: bool = False
    """Whether the rows of W′ still resemble those of W."""

    @property
    def explained(self) -> float:
        """Share (0–1) of what is beyond rounding that the changes explain."""
        whole = max(self.energy - self.rounding, 0.0)
        left_over = max(self.rest * self.energy - self.rounding, 0.0)
        return 1 - left_over / whole if whole > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain data for JSON."""
        left_out = ("changes", "site", "directions", "trained_like")
        plain = {key: value for key, value in vars(self).items() if key not in left_out}
        return plain | {"explained": self.explained, "shape": list(self.shape)}


@dataclass(frozen=True)
class PartFit:
    """A change of low rank of some columns of a matrix, and what it is."""

    edit: Edit | None
    projection: Projection | None
    rule: NormRule
    rest: float
    """Squared length of what the edit leaves; that of all if there is none."""
    low: LowRank


def explain_vector(pair: TensorPair) -> TensorTrace:
    """Return what is known of a vector, such as a norm's gain: whether it was rounded, and how far it moved."""
    before, after = pair.before.double(), pair.after.double()
    unit = coarsest_unit(after, pair.before.dtype, pair.after.dtype)
    difference = after - before
    kind = ROUNDING if is_rounding(difference, unit) else VECTOR
    energy, rounding = float(difference.square().sum()), float(unit.square().sum() / 12)
    size = energy**0.5 / max(float(before.norm()), 1e-30)
    part = "bias" if pair.bias_of else "other"
    layer = pair.bias_of.layer if pair.bias_of else -2
    return TensorTrace(pair.name, part, layer, tuple(before.shape), kind, energy, size, rounding, site=pair.bias_of)


def explain_matrix(pair: TensorPair, gain: Float[Tensor, " width"] | None, heads: int) -> TensorTrace | None:
    """Return what was done to one matrix; None if its numbers are the same.

    gain: of the norm between the matrix and the stream. heads: of attention, by which its output may have been edited.
    """
    dtype = torch.float64 if pair.before.numel() <= FINE else torch.float32
    before, after = pair.before.to(dtype), pair.after.to(dtype)
    difference = after - before
    if not difference.any():
        return None
    unit = coarsest_unit(after, pair.before.dtype, pair.after.dtype).to(dtype)
    trace = _measure(pair, before, difference, unit)
    if is_rounding(difference, unit):
        return replace(trace, kind=ROUNDING)
    if pair.site is not None and pair.site.role == "writes" and not after.any():
        return replace(trace, kind=ZEROED, changes=(ZeroOutput(pair.site),), rest=0.0)
    factor, share = fit_factor(before, after)
    if share >= SCALED:
        return replace(trace, kind=SCALING, factor=factor)
    return _explain_structure(trace, pair, before, after, unit.square().sum(0) / 12, gain, heads)


def _measure(pair: TensorPair, before: Matrix, difference: Matrix, unit: Tensor) -> TensorTrace:
    energy = float(difference.double().square().sum())
    whole = float(before.double().square().sum())
    site = pair.site
    return TensorTrace(
        name=pair.name,
        part=site.part if site else "other",
        layer=site.layer if site else -2,
        shape=tuple(before.shape),
        kind=UNKNOWN,
        energy=energy,
        size=(energy / max(whole, 1e-300)) ** 0.5,
        rounding=min(float(unit.double().square().sum() / 12), energy),
        site=site,
    )


def _explain_structure(
    trace: TensorTrace,
    pair: TensorPair,
    before: Matrix,
    after: Matrix,
    rounding: Float[Tensor, " inp"],
    gain: Float[Tensor, " width"] | None,
    heads: int,
) -> TensorTrace:
    """Explain a difference that is neither rounding nor a scaling. rounding: squared length expected of each column."""
    site = pair.site
    difference = after - before
    spectrum = decompose(difference)
    rank = count_rank(difference, spectrum, SURE * trace.rounding)
    kept = find_kept_norms(before, after, trace.rounding)
    sizes = tuple((spectrum.sizes[:8] / max(trace.energy, 1e-300) ** 0.5).tolist())
    trace = replace(trace, rank=rank.count, spectrum=sizes, stable_rank=spectrum.stable_rank, exact=spectrum.exact)
    trace = replace(trace, kept=kept, noise=1 - rank.share if rank.ends else 0.0)
    grid = find_grid(_as_stored(pair))
    if grid and rank.share < MOSTLY and trace.size <= MOST_REPLACED:
        return replace(trace, kind=REQUANTIZATION, grid=grid, rank=0, noise=1.0)
    flat = rank.ends and (
        trace.noise * trace.energy <= max(SURE * trace.rounding, CLEAN * trace.energy)
        or is_flat(spectrum, rank.count, before.shape)
    )
    if flat and rank.count == 0:
        return replace(trace, kind=NOISE)
    flat = flat or bool(grid)
    trace = replace(trace, grid=grid)
    masked = _find_masked(site, before, after)
    parts = _find_parts(site, difference, rounding, masked, heads)
    fits = _fit_parts(before, after, rounding, parts, kept, site, gain, rank)
    if fits and all(_is_projection(fit) for fit in fits.values()):
        return _describe(trace, PROJECTION, fits, parts, masked, before, after, gain)
    if fits and flat and 2 * rank.count < min(before.shape):
        return _describe(trace, LOW_RANK, fits, parts, masked, before, after, gain)
    for axis in (0, 1):
        factors, share = fit_factors(before, after, axis)
        if share >= SCALED:
            return replace(trace, kind=SCALING, factor=float(factors.mean()))
    alike = trace.size <= MOST_REPLACED
    return replace(trace, kind=FULL_RANK if alike else UNKNOWN, trained_like=alike, rank=min(before.shape))


def _as_stored(pair: TensorPair) -> Tensor:
    flipped = pair.site is not None and pair.site.layout not in ("linear", "stack")
    return pair.after.mT if flipped else pair.after


# ------------------------------------------------------------------------------------ parts of a matrix
Part = tuple[int, int] | None
"""First column and the one after the last; None stands for all."""


def _find_masked(site: Site | None, before: Matrix, after: Matrix) -> Tensor:
    """Return the columns of a writer that were set to zero."""
    if site is None or site.part not in ("mlp.out", "attn.out", "shared.out", "expert.out"):
        return torch.zeros(0, dtype=torch.long)
    return ((after == 0).all(0) & (before != 0).any(0)).nonzero()[:, 0]


def _find_parts(site: Site | None, difference: Matrix, rounding: Tensor, masked: Tensor, heads: int) -> list[Part]:
    """Return the heads whose columns changed, or [None] if most columns did."""
    changed = difference.double().square().sum(0) > 9 * rounding.double()
    changed[masked] = True
    size, rest = divmod(difference.shape[1], max(heads, 1))
    if float(changed.float().mean()) >= KEPT_COLUMNS or site is None or site.part != "attn.out" or rest:
        return [None]
    by_head = changed.reshape(heads, size).float().mean(1) > 0.5
    return [(int(h) * size, (int(h) + 1) * size) for h in by_head.nonzero()[:, 0]] or [None]


def _select(part: Part | Sequence[Part], masked: Tensor, columns: int) -> Tensor:
    """Return the numbers of the columns of a part, or of several, that are not masked."""
    chosen = torch.zeros(columns, dtype=torch.bool)
    for one in [part] if part is None or isinstance(part, tuple) else part:
        chosen[slice(*one) if one else slice(None)] = True
    chosen[masked] = False
    return chosen.nonzero()[:, 0]


def _fit_parts(
    before: Matrix,
    after: Matrix,
    rounding: Tensor,
    parts: Sequence[Part],
    kept: Sequence[str],
    site: Site | None,
    gain: Tensor | None,
    rank: Rank,
) -> dict[Part, PartFit]:
    """Return a fit for each part: the same for all of them if one explains all, else one of its own each."""

    def fit(columns: Tensor) -> PartFit | None:
        first, second = before[:, columns], after[:, columns]
        return fit_change(first, second, float(rounding[columns].sum()), site, gain, rank if parts == [None] else None)

    masked = _find_masked(site, before, after)
    together = fit(_select(parts, masked, before.shape[1]))
    if together is not None and (len(parts) == 1 or _is_projection(together)):
        return dict.fromkeys(parts, together)
    if len(parts) == 1:
        return {}
    alone = {part: fit(_select(part, masked, before.shape[1])) for part in parts}
    return {part: one for part, one in alone.items() if one is not None} if all(alone.values()) else {}


def _is_projection(fit: PartFit) -> bool:
    return fit.projection is not None and not fit.projection.oblique


# ---------------------------------------------------------------------------------------- one change
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
    if known.ends and 0 < known.count and 2 * known.count < min(before.shape):
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
    return min(near, key=lambda fit: (not _is_projection(fit), fit.edit is None or fit.edit.covectors is not None))


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
    return PartFit(best[0], projection, rule, best[1], low)


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


# --------------------------------------------------------------------------------------- putting together
def _describe(
    trace: TensorTrace,
    kind: str,
    fits: dict[Part, PartFit],
    parts: Sequence[Part],
    masked: Tensor,
    before: Matrix,
    after: Matrix,
    gain: Tensor | None,
) -> TensorTrace:
    """Return the trace with the changes that the fits make, and what they leave."""
    changes: list[Change] = []
    for part, fit in fits.items():
        if fit.edit is not None:
            changes.append(replace(fit.edit, site=replace(fit.edit.site, span=part)))
    if len(masked) and trace.site is not None:
        changes.append(Mask(trace.site, masked))
    made = before
    for change in changes:
        made = apply_change(change, made)
    rest = float((after - made).double().square().sum()) / max(trace.energy, 1e-300)
    if 1 - rest < WORTH_PLANNING:
        changes, rest = [], 1.0
    main = max(fits.values(), key=lambda fit: float(fit.low.rows.square().sum()))
    projection = main.projection
    known = projection is not None
    return replace(
        trace,
        kind=kind,
        rank=main.low.left.shape[1],
        rule=main.rule if kind == PROJECTION else "none",
        side=projection.side if projection else "",
        oblique=bool(projection and projection.oblique),
        strength=_median(projection.strengths) if projection else 0.0,
        rest=rest,
        changes=tuple(changes),
        directions=_to_stream(main, projection, gain) if projection and known else None,
        parts_edited=sum(b - a for a, b in parts if (a, b)) / before.shape[1] if parts != [None] else 1.0,  # type: ignore[misc]
        rows_reachable=projection.share if projection else 0.0,
    )


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


def _to_stream(fit: PartFit, projection: Projection, gain: Tensor | None) -> Tensor:
    """Return the directions in the coordinates of the stream, strongest first, as orthonormal rows."""
    left = projection.side == "left"
    rows = projection.basis if left or projection.oblique else projection.along
    if projection.side == "right" and projection.oblique:
        rows = projection.along
    if gain is not None and rows.shape[1] == len(gain):
        rows = rows / gain if left else rows * gain
    return torch.linalg.qr(rows.double().mT)[0].mT.float().contiguous()
