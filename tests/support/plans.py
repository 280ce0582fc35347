"""Random plans, for tests of what executors do with any plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from obliteratus.core.norms import NormRule
from obliteratus.core.settings import expand_part
from obliteratus.core.types import Edit, Plan, Site, Subject

PlanMaker = Callable[..., Plan]


def random_basis(width: int, k: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return k orthonormal rows."""
    noise = torch.randn(width, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis: torch.Tensor = torch.linalg.qr(noise)[0].T.contiguous().to(dtype)
    return basis


def random_plan(
    subject: Subject,
    parts: Sequence[str] = ("attn.out", "mlp.out"),
    *,
    strength: float = 1.0,
    norm: NormRule = "none",
    k: int = 2,
    seed: int = 0,
    anchored: bool = False,
) -> Plan:
    """Return a plan with a random subspace at every site of the given parts."""
    expanded = {own for part in parts for own in expand_part(part)}
    sites: list[Site] = [site for site in subject.sites if site.part in expanded]
    edits = []
    for i, site in enumerate(sites):
        anchor = torch.randn(subject.width, generator=torch.Generator().manual_seed(seed + i)) if anchored else None
        edits.append(Edit(site, random_basis(subject.width, k, 100 * seed + i), strength, norm, anchor))
    return Plan(tuple(edits), subject.source.digest)
