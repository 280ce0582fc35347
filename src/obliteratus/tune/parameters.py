"""A plan's strengths and directions as parameters that gradients reach, through the ordinary live edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.shapes import Float
from obliteratus.core.types import Change, Edit, Plan

What = Literal["both", "strengths", "directions"]


@dataclass(frozen=True)
class EditParameter:
    """One edit's parameters; the edit that they started as says all else."""

    edit: Edit
    strength: Float[Tensor, ""]
    basis: Float[Tensor, "k width"]
    """Free rows; the edit's are made of them (`rows`)."""
    covectors: Float[Tensor, "k width"] | None

    def rows(self) -> tuple[Float[Tensor, "k width"], Float[Tensor, "k width"]]:
        """(B, A): B orthonormal and A = B; or, for oblique edits, A Bᵀ = I, rows of B as long as they were."""
        if self.covectors is None:
            basis = _orthonormal(self.basis)
            return basis, basis
        basis = _orthonormal(self.basis) if self.square else self._as_long()
        return basis, torch.linalg.solve(self.covectors @ basis.T, self.covectors)

    @property
    def square(self) -> bool:
        """Whether the rows started orthonormal: those of oblique edits behind a norm's gain do not."""
        gram = self.edit.basis.double() @ self.edit.basis.double().T
        return torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), atol=1e-4)  # fp32 rows are, to about 1e-6

    def _as_long(self) -> Float[Tensor, "k width"]:
        length = self.edit.basis.to(self.basis).norm(dim=1, keepdim=True)
        rows: Tensor = self.basis * (length / self.basis.norm(dim=1, keepdim=True))
        return rows

    def live(self) -> Edit:
        """The edit with gradients: y − BᵀsA(y − μ), so that what executors see as covectors carries the strength."""
        basis, along = self.rows()
        return replace(self.edit, basis=basis, covectors=self.strength * along, strength=1.0)

    @torch.no_grad()
    def fixed(self) -> Edit:
        """The edit as plans hold it: strength apart, covectors only where they differ from the rows."""
        basis, along = (x.clone().cpu() for x in self.rows())
        oblique = None if self.covectors is None else along
        return replace(self.edit, basis=basis, covectors=oblique, strength=float(self.strength))


def _orthonormal(rows: Float[Tensor, "k width"]) -> Float[Tensor, "k width"]:
    """Orthonormal rows of the same span; the rows themselves where they are orthonormal, not their opposites."""
    q, r = torch.linalg.qr(rows.T)
    basis: Tensor = (q * r.diagonal().sign()).T
    return basis


class EditParameters:
    """All edits of a plan. Other changes (masks, shifts) stay as they are."""

    def __init__(self, plan: Plan, device: torch.device, what: What) -> None:
        """Raises UserError for edits under a norm rule or of single heads, whose factors gradients do not pass."""
        self.plan = plan
        edits = [e for e in plan.edits if isinstance(e, Edit)]
        if any(e.norm != "none" or e.site.span is not None for e in edits):
            raise UserError("tune: gradients pass edits without norm rule and heads; set excise.norm none, leave heads")
        turned, pulled = what != "strengths", what != "directions"
        self.knobs = [_knob(e, device, turned, pulled) for e in edits]

    @property
    def free(self) -> list[Tensor]:
        """All parameters that gradients reach."""
        every = (x for k in self.knobs for x in (k.strength, k.basis, k.covectors) if x is not None)
        return [x for x in every if x.requires_grad]

    def finite(self) -> bool:
        """Whether all parameters are numbers still."""
        return all(bool(torch.isfinite(x).all()) for x in self.free)

    def state(self) -> list[Tensor]:
        """Copies of all free parameters, for `restore`."""
        return [x.detach().clone() for x in self.free]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Back to what `state` gave."""
        for x, before in zip(self.free, state, strict=True):
            x.copy_(before)

    def groups(self, lr: float) -> list[dict[str, object]]:
        """Parameters for an optimiser; a row's entries move by ``lr`` of their mean size, strengths by ``lr``."""
        strengths = [k.strength for k in self.knobs if k.strength.requires_grad]
        rows = [x for k in self.knobs for x in (k.basis, k.covectors) if x is not None and x.requires_grad]
        sized = [{"params": [x], "lr": lr * float(x.detach().square().mean().sqrt())} for x in rows]
        return [{"params": strengths, "lr": lr}] * bool(strengths) + sized

    def live(self) -> Plan:
        """The plan with gradients."""
        return self._plan([k.live() for k in self.knobs])

    def fixed(self, least: float = 0.0) -> Plan:
        """The plan as it stands, without edits weaker than ``least``: those of sites that are left alone."""
        plan = self._plan([k.fixed() for k in self.knobs])
        kept = (c for c in plan.edits if not isinstance(c, Edit) or abs(c.strength) > least)
        return replace(plan, edits=tuple(kept))

    def size(self) -> Float[Tensor, ""]:
        """Mean |strength|: the L1 penalty that lets sites drop out."""
        return torch.stack([k.strength.abs() for k in self.knobs]).mean()

    def _plan(self, edits: Sequence[Edit]) -> Plan:
        tuned = iter(edits)
        changes: list[Change] = [next(tuned) if isinstance(c, Edit) else c for c in self.plan.edits]
        return replace(self.plan, edits=tuple(changes))


def _knob(edit: Edit, device: torch.device, turned: bool, pulled: bool) -> EditParameter:
    def parameter(x: Tensor, free: bool) -> Tensor:
        return x.detach().to(device, torch.float32).clone().requires_grad_(free)

    along = None if edit.covectors is None else parameter(edit.covectors, turned)
    return EditParameter(edit, parameter(torch.tensor(edit.strength), pulled), parameter(edit.basis, turned), along)
