"""The mathematics of an edit on bare tensors. W is [out, in], Q [k, out] with orthonormal rows, s the strength.

The edit is P W with P = I − s QᵀQ; a norm rule then rescales the result:

=========  ==========================================  =====================================
rule       what keeps its length                       Q W′ = 0 at s = 1?
=========  ==========================================  =====================================
none       nothing                                     yes
columns    what each input writes (column of W)        yes: columns are only rescaled
rows       each output coordinate (row of W)           **no**: rescaling rows tilts the result
whole      the matrix (Frobenius)                      yes: one factor for all
=========  ==========================================  =====================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from obliteratus.shapes import Float
from obliteratus.types import NormRule

# Below this share of its length a column (row, matrix) has nothing but rounding left, and stretching it back
# would blow up noise: it is left as it is. fp32 keeps about 7 digits, and the share is of squares.
NOTHING_LEFT = 1e-6


@dataclass(frozen=True)
class Measured:
    """Taken from W once; every further strength then costs O(k · width)."""

    along: Float[Tensor, "k in"]
    """V = Q W."""
    spread: Float[Tensor, "out k"]
    """W Vᵀ."""
    columns: Float[Tensor, " in"]
    """Squared length of each column."""
    rows: Float[Tensor, " out"]
    """Squared length of each row."""


@dataclass(frozen=True)
class Scales:
    """W′ = diag(outputs) · P W · diag(inputs); None is all ones."""

    inputs: Float[Tensor, " in"] | None = None
    outputs: Float[Tensor, " out"] | None = None


def measure(weight: Float[Tensor, "out in"], basis: Float[Tensor, "k out"]) -> Measured:
    """One pass over the weight."""
    along = basis @ weight
    return Measured(along, weight @ along.T, weight.square().sum(0), weight.square().sum(1))


def scales(m: Measured, basis: Float[Tensor, "k out"], strength: float, rule: NormRule) -> Scales:
    """The factors that a norm rule asks for, in closed form.

    ‖P w‖² = ‖w‖² − s(2 − s)‖Q w‖² for a column w. A row i of P W is W_i − s q_i V, with q_i the i-th column of Q.
    """
    lost = strength * (2 - strength)
    if rule == "columns":
        return Scales(inputs=_factor(m.columns, m.columns - lost * m.along.square().sum(0)))
    if rule == "rows":
        cross = (m.spread * basis.T).sum(1)
        inner = ((basis.T @ (m.along @ m.along.T)) * basis.T).sum(1)
        return Scales(outputs=_factor(m.rows, m.rows - 2 * strength * cross + strength**2 * inner))
    if rule == "whole":
        total = m.columns.sum()
        factor = _factor(total, total - lost * m.along.square().sum())
        return Scales(outputs=factor.expand(len(m.rows)))
    return Scales()


def _factor(before: Tensor, after: Tensor) -> Tensor:
    nothing = after <= NOTHING_LEFT * before
    return torch.where(nothing, torch.ones_like(before), (before / after.clamp(min=1e-38)).sqrt())


def restretched(before: Float[Tensor, "n out"], after: Float[Tensor, "n out"]) -> Float[Tensor, "n out"]:
    """Each row of ``after`` at the length of its row before: the rule `columns` for outputs that are columns of W."""
    return after * _factor(before.square().sum(-1), after.square().sum(-1))[:, None]


def project(values: Float[Tensor, "*n out"], basis: Float[Tensor, "k out"], strength: float) -> Float[Tensor, "*n out"]:
    """y ← y − s Qᵀ(Q y) for every vector along the last axis."""
    return values - strength * (values @ basis.T) @ basis


def edit_weight(
    weight: Float[Tensor, "out in"],
    basis: Float[Tensor, "k out"],
    strength: float,
    rule: NormRule = "none",
    span: tuple[int, int] | None = None,
) -> Float[Tensor, "out in"]:
    """W′, in one pass over the weight and one temporary of its size.

    span: only columns start … stop − 1 are edited, and norm rules look at them alone; all others keep every bit.
    """
    if span is not None:
        edited, columns = weight.clone(), slice(*span)
        edited[:, columns] = edit_weight(weight[:, columns], basis, strength, rule)
        return edited
    m = measure(weight, basis)
    factors = scales(m, basis, strength, rule)
    edited = torch.addmm(weight, basis.T, m.along, alpha=-strength)
    if factors.inputs is not None:
        edited *= factors.inputs
    if factors.outputs is not None:
        edited *= factors.outputs[:, None]
    return edited


def edit_bias(
    bias: Float[Tensor, " out"] | None,
    basis: Float[Tensor, "k out"],
    strength: float,
    anchor: Float[Tensor, " out"] | None,
) -> Float[Tensor, " out"] | None:
    """b′ = P b + s QᵀQ μ. Norm rules are about weights: they leave the bias alone."""
    edited = None if bias is None else project(bias, basis, strength)
    if anchor is None:
        return edited
    kept = strength * (anchor @ basis.T) @ basis
    return kept if edited is None else edited + kept


def through_gain(basis: Float[Tensor, "k out"], gain: Float[Tensor, " out"]) -> Float[Tensor, "k out"]:
    """Q′ = orth(γ ⊙ Q): what a writer before a norm with gain γ must lose for the stream to lose Q.

    (The norm's own division by a length only rescales. y ⊥ γ⊙q ⟺ γ⊙y ⊥ q.)
    """
    q: Tensor = torch.linalg.qr((basis * gain).T)[0]
    return q.T.contiguous()
