"""Activations with a known truth, for tests of distill steps and analyses."""

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


def make_moments(rows: Tensor, keep: bool = True) -> Moments:
    return Moments(len(rows), rows.double().mean(0).float(), rows if keep else None)


def planted(seed: int = 0, shift: float = SHIFT, keep: bool = True, n: int = PROMPTS) -> tuple[Activations, Tensor]:
    """Return activations of noise with four massive dimensions, and the direction planted in the target's streams.

    Stream 0 has no direction: all rows are equal there. The group bypass is like control, and so is the group keep but
    for a direction of its own (`keep_directions`).
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat([torch.randn(2, n, STREAMS, WIDTH, generator=generator) for _ in range(2)])
    rows[..., :4] += torch.tensor([300.0, -200.0, 150.0, 80.0])
    truth = torch.stack([random_basis(WIDTH, 1, seed + i)[0] for i in range(STREAMS)])
    rows[0] += shift * truth
    rows[3] += SHIFT * keep_directions(truth, seed)
    rows[:, :, 0] = torch.randn(WIDTH, generator=generator)  # the template's last token is the same for all
    groups = zip(("target", "control", "bypass", "keep"), rows, strict=True)
    return Activations({name: make_moments(x, keep) for name, x in groups}, -1), truth


def keep_directions(truth: Tensor, seed: int = 0) -> Tensor:
    """Return the direction of the group keep: at each stream, a unit vector orthogonal to the truth."""
    other = torch.stack([random_basis(WIDTH, 1, 100 + seed + i)[0] for i in range(STREAMS)])
    return normalize(other - (other * truth).sum(1, keepdim=True) * truth, dim=1)


def shuffled(acts: Activations, seed: int = 3) -> Activations:
    """Return the same prompts with randomly permuted labels."""
    rows = torch.cat([acts["target"].rows, acts["control"].rows])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    half = len(rows) // 2
    return replace(
        acts, groups={**acts.groups, "target": make_moments(rows[:half]), "control": make_moments(rows[half:])}
    )


def with_rows(acts: Activations, name: str, rows: Tensor) -> Activations:
    """Return the same activations with other rows in one group."""
    return replace(acts, groups={**acts.groups, name: make_moments(rows)})


def make_sketch(rows: Tensor, size: int = SIZE, batch: int = 24) -> Sketch:
    running = FrequentDirections(rows.shape[1], rows.shape[2], size)
    for part in rows.split(batch):
        running.add(part)
    return running.sketch()


def with_sketches(acts: Activations, size: int = SIZE) -> Activations:
    """Return the same prompts as ``probe.keep = "sketch"`` keeps them."""

    def of(moments: Moments) -> Moments:
        assert moments.rows is not None
        return replace(moments, rows=None, sketch=make_sketch(moments.rows, size))

    return replace(acts, groups={name: of(moments) for name, moments in acts.groups.items()})


def cosine(found: Directions, truth: Tensor) -> Tensor:
    return (found.basis[:, 0] * truth).sum(1)[1:]


def projector(rows: Tensor) -> Tensor:
    """Return the projector onto the span of the rows, in float64, computed apart from the library."""
    q = torch.linalg.qr(rows.double().mT)[0]
    return q @ q.mT


def matrix_power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T
