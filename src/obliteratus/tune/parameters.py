"""A plan's strengths and directions as trainable parameters. Gradients reach them through ordinary live edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.shapes import Float
from obliteratus.core.types import Change, Edit, Plan

What = Literal["both", "strengths", "directions"]


@dataclass(frozen=True)
class EditParameter:
    """The parameters of one edit. Everything else is taken from the edit that they started from."""

    edit: Edit
    strength: Float[Tensor, ""]
    basis: Float[Tensor, "k width"]
    """Unconstrained rows. `constrained_rows` turns them into those of an edit."""
    covectors: Float[Tensor, "k width"] | None

    def constrained_rows(self) -> tuple[Float[Tensor, "k width"], Float[Tensor, "k width"]]:
        """Return (B, A): B orthonormal and A = B; for oblique projections A Bᵀ = I. Covectors of least change are free.
        Rows of B that were not orthonormal keep their length."""
        if self.covectors is None:
            basis = _orthonormalize(self.basis)
            return basis, basis
        basis = _orthonormalize(self.basis) if self.started_orthonormal else self._restore_lengths()
        if not self.started_as_projection:
            return basis, self.covectors
        return basis, torch.linalg.solve(self.covectors @ basis.T, self.covectors)

    @cached_property
    def started_orthonormal(self) -> bool:
        """Whether the edit's rows are orthonormal. Those of oblique edits before a norm gain are not."""
        gram = self.edit.basis.double() @ self.edit.basis.double().T
        return torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), atol=1e-4)  # fp32 rows are, to about 1e-6

    @cached_property
    def started_as_projection(self) -> bool:
        """Whether A Bᵀ = I in the edit that they started from."""
        product = self.edit.along.double() @ self.edit.basis.double().T
        return torch.allclose(product, torch.eye(len(product), dtype=product.dtype), atol=1e-3)

    def _restore_lengths(self) -> Float[Tensor, "k width"]:
        length = self.edit.basis.to(self.basis).norm(dim=1, keepdim=True)
        rows: Tensor = self.basis * (length / self.basis.norm(dim=1, keepdim=True))
        return rows

    def to_live_edit(self) -> Edit:
        """Return the edit y − BᵀsA(y − μ) with gradients. Its covectors carry the strength."""
        basis, along = self.constrained_rows()
        return replace(self.edit, basis=basis, covectors=self.strength * along, strength=1.0)

    @torch.no_grad()
    def to_edit(self) -> Edit:
        """Return the edit as plans hold it: strength as a number, covectors only if they differ from the rows."""
        basis, along = (x.clone().cpu() for x in self.constrained_rows())
        oblique = None if self.covectors is None else along
        return replace(self.edit, basis=basis, covectors=oblique, strength=float(self.strength))


def _orthonormalize(rows: Float[Tensor, "k width"]) -> Float[Tensor, "k width"]:
    """Return orthonormal rows of the same span. Rows that are orthonormal already keep their signs."""
    q, r = torch.linalg.qr(rows.T)
    basis: Tensor = (q * r.diagonal().sign()).T
    return basis


class EditParameters:
    """The parameters of all edits of a plan. Other changes (masks, shifts) stay as they are."""

    def __init__(self, plan: Plan, device: torch.device, what: What) -> None:
        """Raises UserError for edits under a norm rule or of single heads, whose factors block gradients."""
        self.plan = plan
        edits = [e for e in plan.edits if isinstance(e, Edit)]
        if any(e.norm != "none" or e.site.span is not None for e in edits):
            raise UserError(
                "tune: gradients do not pass edits under a norm rule or of single heads; set excise.norm to none and "
                "leave excise.heads out"
            )
        self.edits = [_make_parameter(e, device, what != "strengths", what != "directions") for e in edits]

    @property
    def trainable(self) -> list[Tensor]:
        """All tensors that gradients reach."""
        tensors = (x for p in self.edits for x in (p.strength, p.basis, p.covectors) if x is not None)
        return [x for x in tensors if x.requires_grad]

    def finite(self) -> bool:
        """Whether no parameter is NaN or Inf."""
        return all(bool(torch.isfinite(x).all()) for x in self.trainable)

    def state(self) -> list[Tensor]:
        """Return copies of all trainable tensors, for `restore`."""
        return [x.detach().clone() for x in self.trainable]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Set the trainable tensors back to what `state` returned."""
        for x, saved in zip(self.trainable, state, strict=True):
            x.copy_(saved)

    @torch.no_grad()
    def scale(self, factor: float) -> None:
        """Multiply all strengths."""
        for p in self.edits:
            p.strength.mul_(factor)

    def groups(self, lr: float) -> list[dict[str, object]]:
        """Return the optimizer's parameter groups. Strengths move by ``lr``, rows by ``lr`` times their mean size."""
        strengths = [p.strength for p in self.edits if p.strength.requires_grad]
        rows = [x for p in self.edits for x in (p.basis, p.covectors) if x is not None and x.requires_grad]
        row_groups = [{"params": [x], "lr": lr * float(x.detach().square().mean().sqrt())} for x in rows]
        return [{"params": strengths, "lr": lr}] * bool(strengths) + row_groups

    def to_live_plan(self) -> Plan:
        """Return the plan with gradients."""
        return self._replace_edits([p.to_live_edit() for p in self.edits])

    def to_plan(self, min_strength: float = 0.0) -> Plan:
        """Return the plan as it stands, without edits whose |strength| is at most ``min_strength``."""
        return drop_weak_edits(self._replace_edits([p.to_edit() for p in self.edits]), min_strength)

    def mean_strength(self) -> Float[Tensor, ""]:
        """Return the mean |strength|, the L1 penalty that drives sites out of the plan."""
        return torch.stack([p.strength.abs() for p in self.edits]).mean()

    def _replace_edits(self, edits: Sequence[Edit]) -> Plan:
        tuned = iter(edits)
        changes: list[Change] = [next(tuned) if isinstance(c, Edit) else c for c in self.plan.edits]
        return replace(self.plan, edits=tuple(changes))


def drop_weak_edits(plan: Plan, strength: float) -> Plan:
    """Return the plan without edits whose |strength| is at most this. Other changes stay."""
    changes = (c for c in plan.edits if not isinstance(c, Edit) or abs(c.strength) > strength)
    return replace(plan, edits=tuple(changes))


def _make_parameter(edit: Edit, device: torch.device, train_rows: bool, train_strength: bool) -> EditParameter:
    def parameter(x: Tensor, trainable: bool) -> Tensor:
        return x.detach().to(device, torch.float32).clone().requires_grad_(trainable)

    covectors = None if edit.covectors is None else parameter(edit.covectors, train_rows)
    strength = parameter(torch.tensor(edit.strength), train_strength)
    return EditParameter(edit, strength, parameter(edit.basis, train_rows), covectors)
