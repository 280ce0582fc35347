"""Edits of quantized matrices: dequantized once, edited in fp32 and requantized once, with the loss measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
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
    """What requantization cost one matrix: squared Frobenius norms, and the inner product of error and edit."""

    error: float
    """‖stored − W′‖²."""
    weight: float
    """‖W′‖²."""
    edit: float
    """‖W′ − W‖²."""
    against: float
    """⟨stored − W′, W′ − W⟩: negative if requantization takes back some of the edit."""


@dataclass
class RequantizationLosses:
    """The losses of all requantized matrices."""

    by_path: dict[str, RequantizationLoss] = field(default_factory=dict)

    def add(self, path: str, loss: RequantizationLoss) -> None:
        """Add the loss of a matrix, or of some part of it."""
        old = self.by_path.get(path, RequantizationLoss(0.0, 0.0, 0.0, 0.0))
        self.by_path[path] = RequantizationLoss(*map(sum, zip(astuple(old), astuple(loss), strict=True)))

    def summary(self) -> dict[str, float]:
        """Return the losses over all matrices.

        ``matrices``: their number; ``error``: ‖stored − W′‖ / ‖W′‖ over all of them; ``worst``: of the worst one;
        ``kept``: the share of the edit that the stored weights hold, 1 if none of it was rounded away.
        """
        losses = self.by_path.values()
        error, weight, edit, against = (
            sum(values) for values in zip(*((x.error, x.weight, x.edit, x.against) for x in losses), strict=True)
        )
        worst = max(x.error / max(x.weight, TINY) for x in losses)
        sizes = {"error": (error / max(weight, TINY)) ** 0.5, "worst": worst**0.5}
        return {"matrices": float(len(self.by_path)), **sizes, "kept": 1 + against / max(edit, TINY)}


TINY = 1e-30  # a matrix of zeros loses nothing


def requantize_module(
    path: str, module: nn.Module, changes: Sequence[Change], dtype: torch.dtype, losses: RequantizationLosses | None
) -> dict[str, Lazy]:
    """Return functions that compute what the edited module stores, by name: codes, scales and the bias.

    dtype: of a new bias. losses: where the loss of this matrix is added.
    """
    names = list(module.state_dict())
    if "bias" not in names and any(needs_bias(c) for c in changes):
        names.append("bias")
    once = SharedEntries(partial(_requantize, path, module, changes, dtype, losses))
    return {f"{path}.{name}": partial(once.take, name) for name in names}


def _requantize(
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
    """Return orthonormal rows that span all bases and covectors of the edits of a writer; None for a reader."""
    edits = [c for c in changes if isinstance(c, Edit) and c.site.role == "writes"]
    if not edits:
        return None
    rows = torch.cat([x for edit in edits for x in (edit.basis.double(), edit.along.double())])
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    independent: Tensor = basis[sizes > MIN_SINGULAR_VALUE * sizes[0]]
    return independent.float()


MIN_SINGULAR_VALUE = 1e-4  # as a share of the largest: below it rows repeat the others, to within fp32


def _squared(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix)) ** 2


class SharedEntries:
    """Entries of one module, all computed when the first is taken; each can be taken once and is then released."""

    def __init__(self, make: Callable[[], Entries]) -> None:
        self._make = make
        self._entries: Entries = {}

    def take(self, name: str) -> Tensor:
        if name not in self._entries:
            self._entries = self._make()
        return self._entries.pop(name)
