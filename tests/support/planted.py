"""Activations with a known truth, for tests of the distill steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tests.support.plans import random_basis
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.core.types import Activations, Directions, Moments, Sketch
from obliteratus.probe.frequent_directions import FrequentDirections

STREAMS, WIDTH, PROMPTS = 5, 64, 200
SHIFT = 4.0
SIZE = 64  # of a sketch, as recipes have it
LOOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-5}


def group(rows: Tensor, keep: bool = True) -> Moments:
    return Moments(len(rows), rows.double().mean(0).float(), rows if keep else None)


def planted(seed: int = 0, shift: float = SHIFT, keep: bool = True, n: int = PROMPTS) -> tuple[Activations, Tensor]:
    """Noise, four massive dimensions of constant offset, and a direction at each stream but 0 in the target.

    The group bypass is like control; the group keep is too, but for a direction of its own (`kept`).
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.randn(2, n, STREAMS, WIDTH, generator=generator) for _ in range(2)])
    rows[..., :4] += torch.tensor([300.0, -200.0, 150.0, 80.0])
    truth = torch.stack([random_basis(WIDTH, 1, seed + i)[0] for i in range(STREAMS)])
    rows[0] += shift * truth
    rows[3] += SHIFT * kept(truth, seed)
    rows[:, :, 0] = torch.randn(WIDTH, generator=generator)  # the template's last token: the same for all
    groups = zip(("target", "control", "bypass", "keep"), rows, strict=True)
    return Activations({name: group(x, keep) for name, x in groups}, -1), truth


def kept(truth: Tensor, seed: int = 0) -> Tensor:
    """At each stream, a unit vector at right angles to the truth."""
    other = torch.stack([random_basis(WIDTH, 1, 100 + seed + i)[0] for i in range(STREAMS)])
    return normalize(other - (other * truth).sum(1, keepdim=True) * truth, dim=1)


def shuffled(acts: Activations, seed: int = 3) -> Activations:
    """The same prompts under labels drawn by chance."""
    rows = torch.cat([acts["target"].rows, acts["control"].rows])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    half = len(rows) // 2
    return replace(acts, groups={**acts.groups, "target": group(rows[:half]), "control": group(rows[half:])})


def with_rows(acts: Activations, name: str, rows: Tensor) -> Activations:
    """The same activations with other rows in one group."""
    return replace(acts, groups={**acts.groups, name: group(rows)})


def sketch(rows: Tensor, size: int = SIZE, batch: int = 24) -> Sketch:
    running = FrequentDirections(rows.shape[1], rows.shape[2], size)
    for part in rows.split(batch):
        running.add(part)
    return running.sketch()


def sketched(acts: Activations, size: int = SIZE) -> Activations:
    """The same prompts as ``probe.keep = "sketch"`` would keep them."""

    def of(moments: Moments) -> Moments:
        assert moments.rows is not None
        return replace(moments, rows=None, sketch=sketch(moments.rows, size))

    return replace(acts, groups={name: of(moments) for name, moments in acts.groups.items()})


def cosine(found: Directions, truth: Tensor) -> Tensor:
    return (found.basis[:, 0] * truth).sum(1)[1:]


def projector(rows: Tensor) -> Tensor:
    """Onto the span of rows, in float64, by an orthogonalisation of its own."""
    q = torch.linalg.qr(rows.double().mT)[0]
    return q @ q.mT


def matrix_power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T
