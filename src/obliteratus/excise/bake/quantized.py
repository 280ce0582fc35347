"""Edits of packed matrices: unpacked once for all changes, edited in fp32, packed once, and what that loses counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from obliteratus.core.types import Change, Edit
from obliteratus.excise.change import apply_change, edit_bias_with_weight, needs_bias, needs_weight
from obliteratus.weights.bitsandbytes import Entries, pad_notes, requantize
from obliteratus.weights.matrices import read_bias, read_weight

Lazy = Callable[[], Tensor]


@dataclass(frozen=True)
class RequantizationLoss:
    """What packing cost one matrix: squared Frobenius norms, and the product of the error with the edit."""

    error: float
    """‖stored − W′‖²."""
    whole: float
    """‖W′‖²."""
    edit: float
    """‖W′ − W‖²."""
    against: float
    """⟨stored − W′, W′ − W⟩: below 0 where packing takes some of the edit back."""


@dataclass
class RequantizationLosses:
    """The same by site path."""

    by_path: dict[str, RequantizationLoss] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """``matrices``: how many; ``error``: ‖stored − W′‖ / ‖W′‖ over all of them; ``worst``: of one; ``kept``: the
        share of the edit that is in what is stored, 1 where none of it was rounded away."""
        all_of = self.by_path.values()
        error, whole, edit, against = (
            sum(values) for values in zip(*((x.error, x.whole, x.edit, x.against) for x in all_of), strict=True)
        )
        worst = max(x.error / max(x.whole, TINY) for x in all_of)
        sizes = {"error": (error / max(whole, TINY)) ** 0.5, "worst": worst**0.5}
        return {"matrices": float(len(self.by_path)), **sizes, "kept": 1 + against / max(edit, TINY)}


TINY = 1e-30  # a matrix of zeros loses nothing


def requantize_module(
    path: str, module: nn.Module, changes: Sequence[Change], dtype: torch.dtype, losses: RequantizationLosses | None
) -> dict[str, Lazy]:
    """All that the edited module saves, by name in the model: codes, scales, and the bias (dtype: of a new one)."""
    names = list(module.state_dict())
    if "bias" not in names and any(needs_bias(c) for c in changes):
        names.append("bias")
    once = SharedEntries(partial(_made, path, module, changes, dtype, losses))
    return {f"{path}.{name}": partial(once.take, name) for name in names}


def _made(
    path: str, module: nn.Module, changes: Sequence[Change], dtype: torch.dtype, losses: RequantizationLosses | None
) -> Entries:
    before = read_weight(module, changes[0].site)
    bias = edit_bias_with_weight(module, changes, before if needs_weight(changes) else None)
    weight = before
    for change in changes:
        weight = apply_change(change, weight)
    if weight is before:  # only the bias changes
        entries: Entries = pad_notes(module.state_dict())
    else:
        entries, lost = requantize(weight, module, span_of_edits(changes))
        if losses is not None:
            edit = before.neg_().add_(weight)
            losses.by_path[path] = RequantizationLoss(
                _squared(lost), _squared(weight), _squared(edit), float((lost * edit).sum())
            )
    if bias is not None:
        old = read_bias(module, changes[0].site)
        entries["bias"] = bias.to(dtype if old is None else module.get_parameter("bias").dtype)
    return entries


def span_of_edits(changes: Sequence[Change]) -> Tensor | None:
    """Orthonormal rows that span all directions which the changes take off or measure by; None of readers."""
    edits = [c for c in changes if isinstance(c, Edit) and c.site.role == "writes"]
    if not edits:
        return None
    rows = torch.cat([x for edit in edits for x in (edit.basis.double(), edit.along.double())])
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    kept: Tensor = basis[sizes > SAME * sizes[0]]
    return kept.float()


SAME = 1e-4  # of the longest: below it rows only repeat the others, to within fp32


def _squared(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix)) ** 2


class SharedEntries:
    """Entries of one module, all made when the first is asked for; each is handed out once and then forgotten."""

    def __init__(self, make: Callable[[], Entries]) -> None:
        self._make = make
        self._left: Entries = {}

    def take(self, name: str) -> Tensor:
        if name not in self._left:
            self._left = self._make()
        return self._left.pop(name)
