"""Activations made of sparse features with a known truth, for tests of sparse autoencoders."""

from __future__ import annotations

import torch
from torch import Tensor

from obliteratus.core.types import Activations, Moments

WIDTH, FEATURES, ROWS = 48, 10, 400


def moments(rows: Tensor) -> Moments:
    return Moments(len(rows), rows.mean(0), rows)


def sparse_rows(n: int, seed: int = 0, streams: int = 1) -> tuple[Tensor, Tensor]:
    """Rows [n, streams, width] of a few features each, of sizes 1–2, with a little noise; features [10, width].

    Feature 0 is the behavior: on in nine of ten of the first half, in none of the second.
    """
    generator = torch.Generator().manual_seed(seed)
    truth = torch.nn.functional.normalize(torch.randn(FEATURES, WIDTH, generator=generator), dim=1)
    on = torch.rand(n, streams, FEATURES, generator=generator) < 0.1
    on[:, :, 0] = torch.rand(n, streams, generator=generator) < 0.9
    on[n // 2 :, :, 0] = False
    size = 1 + torch.rand(n, streams, FEATURES, generator=generator)
    return (on * size) @ truth + 0.05 * torch.randn(n, streams, WIDTH, generator=generator), truth


def acts_of(rows: Tensor) -> Activations:
    half = len(rows) // 2
    return Activations({"target": moments(rows[:half]), "control": moments(rows[half:])}, -1)
