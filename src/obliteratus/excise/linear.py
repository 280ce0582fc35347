"""The mathematics of an edit on bare tensors: W is [out, in], B [k, out] the directions, s the strength.

The edit of a writer is P W with P = I − s BᵀA. In an orthogonal projection A is B, whose rows are orthonormal (then
called Q); in an oblique one A [k, out] holds the covectors, with A Bᵀ = I. A norm rule then rescales the result:

=================  ==========================================  =====================================
rule               what keeps its length                       Q W′ = 0 at s = 1?
=================  ==========================================  =====================================
none               nothing                                     yes
columns            what each input writes (column of W)        yes: columns are only rescaled
rows               each output coordinate (row of W)           **no**: rescaling rows tilts the result
unit_rows          each output coordinate (row of W)           **no**: Q is removed from other rows
unit_rows_rank_3   each output coordinate, nearly              **no**
whole              the matrix (Frobenius)                      yes: one factor for all
=================  ==========================================  =====================================

``rows`` projects W and rescales the rows after. ``unit_rows`` projects the matrix of W's rows scaled to length 1, and
gives its rows the lengths of W's after: Heretic's full row normalization. As Heretic saves the change W′ − W as an
adapter of rank 3 by default, ``unit_rows_rank_3`` is the nearest matrix to that change of rank 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obliteratus.core.norms import NormRule
from obliteratus.core.shapes import Float

# A column (row, matrix) that keeps less than this share of its squared length holds only rounding errors, and
# rescaling it would amplify them: it is not rescaled. fp32 keeps about 7 digits.
MIN_REMAINING_SHARE = 1e-6
# Heretic 1.4's default rank of the adapter that holds its full row normalization.
LOW_RANK = 3
# Of the search for the nearest matrix of that rank: columns beyond the rank, and products with the matrix and back.
# With both, the change of rank 3 of SmolLM2-135M's writers is found to 3e-5 of its size.
SPARE_COLUMNS, ITERATIONS = 7, 6


@dataclass(frozen=True)
class MatrixProjections:
    """Products of W with the directions, computed once; every strength then costs O(k · width)."""

    along: Float[Tensor, "k in"]
    """V = A W."""
    spread: Float[Tensor, "out k"]
    """W Vᵀ."""
    on_basis: Float[Tensor, "k in"]
    """B W, which is V if the projection is orthogonal."""
    columns: Float[Tensor, " in"]
    """Squared length of each column."""
    rows: Float[Tensor, " out"]
    """Squared length of each row."""


@dataclass(frozen=True)
class Scales:
    """Factors of a norm rule: W′ = diag(outputs) · P W · diag(inputs). None means all ones."""

    inputs: Float[Tensor, " in"] | None = None
    outputs: Float[Tensor, " out"] | None = None


def project_matrix(
    weight: Float[Tensor, "out in"], basis: Float[Tensor, "k out"], covectors: Float[Tensor, "k out"] | None = None
) -> MatrixProjections:
    """Return the products of W with the directions: one pass over the weight, two for an oblique projection."""
    along = (basis if covectors is None else covectors) @ weight
    on_basis = along if covectors is None else basis @ weight
    return MatrixProjections(along, weight @ along.T, on_basis, weight.square().sum(0), weight.square().sum(1))


def project_unit_rows(
    weight: Float[Tensor, "out in"], basis: Float[Tensor, "k out"], covectors: Float[Tensor, "k out"] | None
) -> tuple[Float[Tensor, "k out"], Float[Tensor, "k out"]]:
    """Return (B N, A N⁻¹), with N the lengths of W's rows: what I − s BᵀA does to N⁻¹W, as it acts on W.

    N (I − s BᵀA) N⁻¹ W = W − s (B N)ᵀ(A N⁻¹) W. Rows of zeros stay zeros.
    """
    along, basis = fold_gain_reader(basis if covectors is None else covectors, basis, weight.norm(dim=1))
    return basis, along


def compute_norm_scales(m: MatrixProjections, basis: Float[Tensor, "k out"], strength: float, rule: NormRule) -> Scales:
    """Return the factors of a norm rule, in closed form.

    ‖P w‖² = ‖w‖² − 2s (Bw)·(Aw) + s² (Aw)ᵀBBᵀ(Aw) for a column w; with A = B = Q that is ‖w‖² − s(2 − s)‖Qw‖².
    A row i of P W is W_i − s b_i V, with b_i the i-th column of B. ``unit_rows`` expects the directions of
    `project_unit_rows`.
    """
    if rule in ("rows", *UNIT_ROWS):
        cross = (m.spread * basis.T).sum(1)
        inner = ((basis.T @ (m.along @ m.along.T)) * basis.T).sum(1)
        return Scales(outputs=_factor(m.rows, m.rows - 2 * strength * cross + strength**2 * inner))
    squared = ((basis @ basis.T) @ m.along * m.along).sum(0)
    after = m.columns - 2 * strength * (m.on_basis * m.along).sum(0) + strength**2 * squared
    if rule == "columns":
        return Scales(inputs=_factor(m.columns, after))
    if rule == "whole":
        return Scales(outputs=_factor(m.columns.sum(), after.sum()).expand(len(m.rows)))
    return Scales()


UNIT_ROWS = ("unit_rows", "unit_rows_rank_3")


def _factor(before: Tensor, after: Tensor) -> Tensor:
    """Return the factor that restores a length, from the squared lengths before and after an edit."""
    vanished = after <= MIN_REMAINING_SHARE * before
    return torch.where(vanished, torch.ones_like(before), (before / after.clamp(min=1e-38)).sqrt())


def restore_row_lengths(before: Float[Tensor, "n out"], after: Float[Tensor, "n out"]) -> Float[Tensor, "n out"]:
    """Rescale each row to its length before: the rule `columns` where outputs are columns of W, as in an embedding."""
    return after * _factor(before.square().sum(-1), after.square().sum(-1))[:, None]


def project(
    values: Float[Tensor, "*n out"],
    basis: Float[Tensor, "k out"],
    strength: float,
    covectors: Float[Tensor, "k out"] | None = None,
) -> Float[Tensor, "*n out"]:
    """Return y − s Bᵀ(A y) for every vector along the last axis."""
    return values - strength * (values @ (basis if covectors is None else covectors).T) @ basis


def edit_weight(
    weight: Float[Tensor, "out in"],
    basis: Float[Tensor, "k out"],
    strength: float,
    rule: NormRule = "none",
    span: tuple[int, int] | None = None,
    covectors: Float[Tensor, "k out"] | None = None,
) -> Float[Tensor, "out in"]:
    """Return W′ of a writer, in one pass over the weight and with one temporary of its size.

    span: edit only columns start … stop − 1, and take norms over them alone; all others keep every bit.
    """
    if span is not None:
        edited, columns = weight.clone(), slice(*span)
        edited[:, columns] = edit_weight(weight[:, columns], basis, strength, rule, None, covectors)
        return edited
    if rule == "unit_rows_rank_3":
        up, down = factorize_low_rank(weight, basis, strength, covectors)
        return weight + up @ down
    if rule == "unit_rows":
        basis, covectors = project_unit_rows(weight, basis, covectors)
    if rule == "none":
        return torch.addmm(weight, basis.T, (basis if covectors is None else covectors) @ weight, alpha=-strength)
    m = project_matrix(weight, basis, covectors)
    factors = compute_norm_scales(m, basis, strength, rule)
    edited = torch.addmm(weight, basis.T, m.along, alpha=-strength)
    if factors.inputs is not None:
        edited *= factors.inputs
    if factors.outputs is not None:
        edited *= factors.outputs[:, None]
    return edited


def factorize_low_rank(
    weight: Float[Tensor, "out in"],
    basis: Float[Tensor, "k out"],
    strength: float,
    covectors: Float[Tensor, "k out"] | None = None,
) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
    """Return factors of the nearest matrix of rank r ≤ 3 to the change by ``unit_rows``: the rule unit_rows_rank_3."""
    return nearest_of_rank(edit_weight(weight, basis, strength, "unit_rows", None, covectors) - weight, LOW_RANK)


def nearest_of_rank(matrix: Float[Tensor, "out in"], rank: int) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
    """Return U [out, r] and V [r, in] with U V the nearest matrix of this rank, found by subspace iteration.

    The start is drawn with a fixed seed, so that equal matrices give equal factors.
    """
    columns = min(*matrix.shape, rank + SPARE_COLUMNS)
    start = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(0)).to(matrix)
    span: Tensor = torch.linalg.qr(matrix @ start)[0]
    for _ in range(ITERATIONS):
        span = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ span)[0])[0]
    u, sizes, v = torch.linalg.svd(span.T @ matrix, full_matrices=False)
    return (span @ u[:, :rank]) * sizes[:rank], v[:rank]


def edit_reader(
    weight: Float[Tensor, "out in"],
    basis: Float[Tensor, "k in"],
    strength: float,
    covectors: Float[Tensor, "k in"] | None = None,
) -> Float[Tensor, "out in"]:
    """Return W′ = W (I − s BᵀA) of a reader: it acts on x as W does on x − s Bᵀ(A x)."""
    along = basis if covectors is None else covectors
    return torch.addmm(weight, weight @ basis.T, along, alpha=-strength)


def edit_bias(
    bias: Float[Tensor, " out"] | None,
    basis: Float[Tensor, "k out"],
    strength: float,
    anchor: Float[Tensor, " out"] | None,
    covectors: Float[Tensor, "k out"] | None = None,
) -> Float[Tensor, " out"] | None:
    """Return b′ = P b + s BᵀA μ, or None if there is no bias and none is needed. Norm rules leave biases alone."""
    edited = None if bias is None else project(bias, basis, strength, covectors)
    if anchor is None:
        return edited
    shift = kept_of_anchor(anchor, basis, strength, covectors)
    return shift if edited is None else edited + shift


def kept_of_anchor(
    anchor: Float[Tensor, " out"],
    basis: Float[Tensor, "k out"],
    strength: float,
    covectors: Float[Tensor, "k out"] | None = None,
) -> Float[Tensor, " out"]:
    """Return s BᵀA μ, which an anchored edit adds to each output. Outputs of an embedding are columns of W itself."""
    return strength * (anchor @ (basis if covectors is None else covectors).T) @ basis


def fold_gain_orthogonal(basis: Float[Tensor, "k out"], gain: Float[Tensor, " out"]) -> Float[Tensor, "k out"]:
    """Return Q′ = orth(γ ⊙ Q), which a writer before a norm with gain γ must lose for the stream to lose Q.

    y ⊥ γ⊙q exactly when γ⊙y ⊥ q, and the norm's own division by a length only rescales.
    """
    q: Tensor = torch.linalg.qr((basis * gain).T)[0]
    return q.T.contiguous()


# A gain smaller than this share of the largest hides its coordinate from the readers behind it: dividing by it would
# amplify rounding errors, and nothing is lost by leaving the coordinate out.
MIN_GAIN_SHARE = 1e-6


def fold_gain_reader(
    along: Float[Tensor, "k out"], basis: Float[Tensor, "k out"], gain: Float[Tensor, " out"]
) -> tuple[Float[Tensor, "k out"], Float[Tensor, "k out"]]:
    """Return (A ⊘ γ, γ ⊙ B): the projection x̂ ← x̂ − BᵀA x̂ as it acts on γ ⊙ x̂, the input of a reader."""
    seen = gain.abs() > MIN_GAIN_SHARE * gain.abs().max()
    return torch.where(seen, along / torch.where(seen, gain, 1.0), 0.0), basis * gain


def fold_gain_oblique(
    along: Float[Tensor, "k out"], basis: Float[Tensor, "k out"], gain: Float[Tensor, " out"]
) -> tuple[Float[Tensor, "k out"], Float[Tensor, "k out"]]:
    """Return (γ ⊙ A, B ⊘ γ): the oblique projection of a writer's output y by which γ ⊙ y loses Bᵀ A(γ ⊙ y)."""
    folded_basis, folded_along = fold_gain_reader(basis, along, gain)
    return folded_along, folded_basis


def center_rows(basis: Float[Tensor, "k out"]) -> Float[Tensor, "rows out"]:
    """Return orthonormal rows that span these rows minus their means, which is what passes a LayerNorm.

    Rows that are constant vanish, so fewer rows than given may come back.
    """
    rest = basis - basis.mean(1, keepdim=True)
    _, size, v = torch.linalg.svd(rest, full_matrices=False)
    centered: Tensor = v[size > MIN_REMAINING_SHARE**0.5]
    return centered.contiguous()
