"""Orthogonal matching pursuit: directions written as sums of a few rows of a dictionary, many directions at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze.chance import ROUNDING
from obliteratus.core.shapes import Float, Int

NONE = -1  # in the place of an atom, where nothing is left to explain
TIE = 1e-6  # relative: of an atom and its opposite, which tie but for fp32 rounding (1e-7), the one along it is taken


@dataclass(frozen=True)
class Pursuit:
    """Of each direction, the atoms in the order they were taken."""

    atoms: Int[Tensor, "draws most"]
    """Rows of the dictionary; `NONE` from where on nothing is left that an atom explains."""
    share: Float[Tensor, "draws most"]
    """Of the direction's squared length, what the first 1, 2 … atoms span: 0–1, never falling; fp64."""


def matching_pursuit(units: Float[Tensor, "draws width"], dictionary: Float[Tensor, "n width"], most: int) -> Pursuit:
    """Each direction by at most ``most`` atoms: the one most along what is left, then all chosen are fitted anew.

    Pati, Rezaiifar and Krishnaprasad (1993). units: of length 1, fp64; a zero row takes no atom. dictionary: rows of
    length 1, or zero; of both signs, since a direction may be made of what fires less. Every step costs a product of
    draws × width × n in the dictionary's precision.
    """
    rest, places = units.clone(), []
    basis = torch.zeros(len(units), most, units.shape[1], dtype=units.dtype)
    shares = []
    for k in range(most):
        inner = rest.to(dictionary) @ dictionary.T
        atom = (inner.abs() * (1 + TIE * (inner > 0))).argmax(1)
        row = dictionary[atom].to(rest)
        some = (rest * row).sum(1).abs() > ROUNDING
        basis[:, k] = torch.where(some[:, None], _new(row, basis), 0.0)
        rest = rest - (rest * basis[:, k]).sum(1, keepdim=True) * basis[:, k]
        places.append(torch.where(some, atom, NONE))
        shares.append((units.square().sum(1) - rest.square().sum(1)).clamp(0, 1))
    return Pursuit(torch.stack(places, 1), torch.stack(shares, 1))


def _new(row: Float[Tensor, "draws width"], basis: Float[Tensor, "draws most width"]) -> Float[Tensor, "draws width"]:
    """What the rows have beside the basis, of length 1."""
    for _ in range(2):  # a second time takes out what rounding left of the first
        row = row - torch.einsum("dk,dkw->dw", torch.einsum("dkw,dw->dk", basis, row), basis)
    return normalize(row, dim=1)


def coefficients(unit: Float[Tensor, " width"], atoms: Float[Tensor, "k width"]) -> Float[Tensor, " k"]:
    """By which the atoms sum to the direction as nearly as they can (least squares); fp64."""
    made: Tensor = torch.linalg.lstsq(atoms.double().T, unit.double()[:, None]).solution
    return made[:, 0]
