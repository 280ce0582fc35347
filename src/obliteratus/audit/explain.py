"""Explains the difference of one matrix: its class, its numbers, and the changes of a plan that make most of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from obliteratus.audit.changes import SURE, PartFit, fit_change, is_orthogonal
from obliteratus.audit.fits import Projection, find_kept_norms, fit_factor, fit_factors
from obliteratus.audit.pairs import TensorPair
from obliteratus.audit.rounding import coarsest_unit, find_grid, is_rounding
from obliteratus.audit.spectra import Rank, Spectrum, count_rank, decompose, is_flat
from obliteratus.audit.tensor_trace import (
    FULL_RANK,
    LOW_RANK,
    NOISE,
    PROJECTION,
    REQUANTIZATION,
    ROUNDING,
    SCALING,
    UNKNOWN,
    VECTOR,
    ZEROED,
    TensorTrace,
)
from obliteratus.core.shapes import Float
from obliteratus.core.types import Change, Mask, Site, ZeroOutput
from obliteratus.excise.change import apply_change

Matrix = Float[Tensor, "out inp"]
# Thresholds. Chosen on edits, adapters and copies of the organism astronomy and of tiny random models;
# docs/experiments/trace.md has the gaps between what is above and below them.
SCALED = 0.98  # share of D that factors explain: 1.00 for scalings in fp32, at most 0.003 for copies and noise
CLEAN = 1e-3  # share of ‖D‖² behind the counted singular values below which they are all: 1e-11 for adapters in fp32
KEPT_COLUMNS = 0.98  # share of columns that changed, above which an edit is of the whole matrix
FINE = 1 << 24  # numbers of a matrix up to which fits are in fp64
MOST_REPLACED = 0.5  # ‖D‖ ÷ ‖W‖ above which full rank means replaced, not trained: exchange moves 1.4, training 0.06
MOSTLY = 0.5  # share of ‖D‖² in large singular values below which a matrix on a grid was only put there: at most 0.21
WORTH_PLANNING = 0.3  # share of a tensor's difference that a change must explain to enter the plan


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
    flat = _ends_in_noise(trace, rank, spectrum)
    trace = replace(trace, kept=kept, noise=1 - rank.share if flat else 0.0)
    grid = find_grid(_as_stored(pair))
    if grid and rank.share < MOSTLY and trace.size <= MOST_REPLACED:
        return replace(trace, kind=REQUANTIZATION, grid=grid, rank=0, noise=1.0)
    if flat and rank.count == 0:
        return replace(trace, kind=NOISE)
    flat = flat or bool(grid)
    trace = replace(trace, grid=grid)
    masked = _find_masked(site, before, after)
    parts = _find_parts(site, difference, rounding, masked, heads)
    fits = _fit_parts(before, after, rounding, parts, kept, site, gain, rank)
    if fits and all(is_orthogonal(fit) and (flat or _explains(fit)) for fit in fits.values()):
        return _describe(trace, PROJECTION, fits, parts, masked, before, after, gain)
    if fits and flat and 2 * rank.count < min(before.shape):
        return _describe(trace, LOW_RANK, fits, parts, masked, before, after, gain)
    return _explain_full_rank(trace, before, after)


def _ends_in_noise(trace: TensorTrace, rank: Rank, spectrum: Spectrum) -> bool:
    """Return whether what lies behind the large singular values is rounding or like noise."""
    rest = (1 - rank.share) * trace.energy
    if not rank.ends or (rest > MOSTLY * trace.energy and trace.size > MOST_REPLACED):
        return False
    known = rest <= max(SURE * trace.rounding, CLEAN * trace.energy)
    return known or is_flat(spectrum, rank.count, trace.shape)


def _explains(fit: PartFit) -> bool:
    """Return whether the edit explains most of its part, which a fit of a few singular values alone need not."""
    return fit.rest <= (1 - MOSTLY) * fit.whole


def _explain_full_rank(trace: TensorTrace, before: Matrix, after: Matrix) -> TensorTrace:
    """Tell rows or columns that were scaled from a matrix that was trained, and that from one that was replaced."""
    for axis in (0, 1):
        factors, share = fit_factors(before, after, axis)
        if share >= SCALED:
            return replace(trace, kind=SCALING, factor=float(factors.mean()))
    alike = trace.size <= MOST_REPLACED
    return replace(trace, kind=FULL_RANK if alike else UNKNOWN, rank=min(trace.shape))


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
    if together is not None and (len(parts) == 1 or is_orthogonal(together)):
        return dict.fromkeys(parts, together)
    if len(parts) == 1:
        return {}
    alone = {part: fit(_select(part, masked, before.shape[1])) for part in parts}
    return {part: one for part, one in alone.items() if one is not None} if all(alone.values()) else {}


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
    return replace(
        trace,
        kind=kind,
        rank=main.low.left.shape[1],
        rule=main.rule if kind == PROJECTION else "none",
        side=projection.side if projection else "",
        oblique=bool(projection and projection.oblique),
        strength=_median(projection.strengths) if projection else 0.0,
        rest=rest,
        noise=min(trace.noise, rest) if changes else trace.noise,
        changes=tuple(changes),
        directions=_to_stream(trace.site, projection, gain) if projection else None,
        parts_edited=sum(part[1] - part[0] for part in parts if part) / before.shape[1] or 1.0,
        rows_reachable=projection.share if projection else 0.0,
    )


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


def _to_stream(site: Site | None, projection: Projection, gain: Tensor | None) -> Tensor | None:
    """Return the directions in the coordinates of the stream as orthonormal rows, strongest first, or None."""
    left = projection.side == "left"
    if site is None or left != (site.role == "writes"):
        return None  # it acts on the other side of the matrix, which is not the stream's
    rows = projection.basis if left or projection.oblique else projection.along
    if projection.side == "right" and projection.oblique:
        rows = projection.along
    if gain is not None and rows.shape[1] == len(gain):
        rows = rows / gain if left and not projection.oblique else rows * gain
    basis: Tensor = torch.linalg.qr(rows.double().mT)[0].mT
    return basis.float().contiguous()
