"""How far two plans are apart: bit by bit, and in what they do to each matrix."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obliteratus.core.shapes import Float
from obliteratus.core.types import Blend, Change, Edit, Mask, Plan, Shift, ZeroOutput
from obliteratus.excise.plan import plan_digest

SAME_STRENGTH = 1e-9  # of a change that removes nothing, whose relative difference would be 0 ÷ 0


@dataclass(frozen=True)
class PlanComparison:
    """What differs between two plans."""

    bitwise: bool
    """Whether every bit is the same."""
    structure: str = ""
    """What differs in kind, such as other matrices; '' if every change has its counterpart."""
    largest: float = 0.0
    """Largest relative difference of a change, in the Frobenius norm of what it does: 0 is none, 1 a change that is
    missing, and √2 a direction at a right angle."""
    where: str = ""
    """The matrix with the largest difference."""

    def is_within(self, tolerance: float) -> bool:
        """Return whether the plans count as the same."""
        return self.bitwise or (not self.structure and self.largest <= tolerance)


def compare_plans(then: Plan, now: Plan) -> PlanComparison:
    """Return how far the plan of now is from that of then."""
    if plan_digest(then) == plan_digest(now) or _same_bits(then, now):
        return PlanComparison(True)
    if reason := _compare_structure(then, now):
        return PlanComparison(False, reason)
    pairs = list(zip(then.edits, now.edits, strict=True))
    sizes = [measure_difference(first, second) for first, second in pairs]
    worst = max(range(len(sizes)), key=lambda i: sizes[i])
    return PlanComparison(False, "", sizes[worst], pairs[worst][0].site.parameter)


def _same_bits(then: Plan, now: Plan) -> bool:
    """Compare value by value: digests also differ where a later release describes sites in more words."""
    return (
        then.model == now.model
        and len(then.edits) == len(now.edits)
        and all(_is_equal(vars(a), vars(b)) for a, b in zip(then.edits, now.edits, strict=True))
        and all(type(a) is type(b) for a, b in zip(then.edits, now.edits, strict=True))
    )


def _is_equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    if first.keys() != second.keys():
        return False
    return all(
        torch.equal(value, second[name])
        if isinstance(value, Tensor) and isinstance(second[name], Tensor)
        else not isinstance(second[name], Tensor) and value == second[name]
        for name, value in first.items()
    )


def _compare_structure(then: Plan, now: Plan) -> str:
    """Return what differs between the lists of changes, or '' if they are of the same kinds on the same matrices."""
    if then.model != now.model:
        return f"it is for another model ({now.model}, was {then.model})"
    first, second = ([_describe(change) for change in plan.edits] for plan in (then, now))
    if first == second:
        return ""
    gone, new = Counter(first) - Counter(second), Counter(second) - Counter(first)
    if not gone and not new:
        return "the same changes come in another order"
    named = next(iter((gone or new).elements()))
    return f"{gone.total()} of {len(first)} changes are gone and {new.total()} are new, such as {named}"


def _describe(change: Change) -> str:
    """Return what two changes must share to be compared: kind, matrix, head or expert, and norm rule."""
    site, rule = change.site, change.norm if isinstance(change, Edit) else ""
    parts = [type(change).__name__.lower(), f"of {site.parameter}"]
    parts += [f"head at column {site.span[0]}"] if site.span else []
    parts += [f"expert {site.expert}"] if site.expert is not None else []
    return " ".join([*parts, *([f"norm {rule}"] if rule not in ("", "none") else [])])


def measure_difference(then: Change, now: Change) -> float:
    """Return the relative difference of two changes of one kind on one matrix."""
    if isinstance(then, Edit) and isinstance(now, Edit):
        return max(_compare_edits(then, now), _compare_anchors(then, now))
    if isinstance(then, Shift) and isinstance(now, Shift):
        return _relative(now.vector - then.vector, then.vector)
    if isinstance(then, Mask) and isinstance(now, Mask):
        return _compare_sets(then.neurons, now.neurons)
    if isinstance(then, Blend) and isinstance(now, Blend):
        return max(_compare_sets(then.donors, now.donors), abs(now.share - then.share) / max(then.share, SAME_STRENGTH))
    if isinstance(then, ZeroOutput) and isinstance(now, ZeroOutput):
        return 0.0 if _is_equal(vars(then), vars(now)) else 1.0
    raise TypeError(f"{type(then).__name__} and {type(now).__name__} cannot be compared")


def _compare_edits(then: Edit, now: Edit) -> float:
    """Return ‖s·BᵀA − s′·B′ᵀA′‖ ÷ ‖s·BᵀA‖, which no rotation of a basis within its subspace changes."""
    difference = _product_norm(
        torch.cat([then.basis.double(), now.basis.double()]),
        torch.cat([then.strength * then.along.double(), -now.strength * now.along.double()]),
    )
    whole = _product_norm(then.basis.double(), then.strength * then.along.double())
    return difference / whole if whole > SAME_STRENGTH else difference


def _product_norm(left: Float[Tensor, "k width"], right: Float[Tensor, "k width"]) -> float:
    """Return the Frobenius norm of leftᵀ·right [width, width] without building it: ‖Q₁R₁(Q₂R₂)ᵀ‖ = ‖R₁R₂ᵀ‖."""
    first, second = (torch.linalg.qr(rows.mT, mode="r").R for rows in (left, right))
    return float((first @ second.mT).norm())


def _compare_anchors(then: Edit, now: Edit) -> float:
    """Return the relative difference of what is kept of the control group's mean, s·Bᵀ(A μ)."""
    if then.anchor is None or now.anchor is None:
        return 0.0 if then.anchor is now.anchor else 1.0
    kept = [e.strength * e.basis.double().mT @ (e.along.double() @ e.anchor.double()) for e in (then, now)]  # type: ignore[union-attr]
    return _relative(kept[1] - kept[0], kept[0])


def _relative(difference: Tensor, whole: Tensor) -> float:
    size = float(whole.double().norm())
    return float(difference.double().norm()) / size if size > SAME_STRENGTH else float(difference.double().norm())


def _compare_sets(then: Tensor, now: Tensor) -> float:
    """Return the share of numbers that only one of the two has."""
    first, second = set(then.tolist()), set(now.tolist())
    return len(first ^ second) / max(len(first | second), 1)
