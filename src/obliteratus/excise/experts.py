"""Experts one by one: which of them the groups' prompts are routed to, and in which direction each of them differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeGuard

import torch
from torch import Tensor

from obliteratus.core.errors import NothingMatchedError, UserError
from obliteratus.core.progress import note
from obliteratus.core.settings import Experts
from obliteratus.core.shapes import Float, Int
from obliteratus.core.types import Activations, Blend, Change, Edit, Routed

Groups = Mapping[str, Routed]


def split_by_expert(edits: Sequence[Change], acts: Activations, options: Experts) -> tuple[Change, ...]:
    """Each edit of a stack of experts as one edit for each expert that is to be edited, blends before them; the
    others as they are.

    Raises NothingMatchedError where the model has stacks (``acts.routed``) and none is edited, UserError where ``own``
    meets oblique directions.
    """
    if not acts.routed:  # recipes ask for experts of models that may have none
        note("experts", "none in stacks: what there is of an MLP is edited as one")
        return tuple(edits)
    if not any(map(_whole, edits)):
        raise NothingMatchedError("excise.experts: no stack of experts is edited; leave it out")
    parts = (_split(e, acts.routed[e.site.path], options) if _whole(e) else (e,) for e in edits)
    return tuple(change for part in parts for change in part)


def _whole(change: Change) -> TypeGuard[Edit]:
    """Whether it is an edit of what a stack writes."""
    return isinstance(change, Edit) and change.site.stacked and change.site.role == "writes"


def _split(edit: Edit, groups: Groups, options: Experts) -> tuple[Change, ...]:
    if options.own and edit.covectors is not None:
        raise UserError("excise.experts.own: an expert's own direction is orthogonal, those of distill are oblique")
    chosen = set(select_preferred_experts(groups, options.share).tolist())
    every = range(len(groups["target"].count))
    others = torch.tensor([e for e in every if e not in chosen], dtype=torch.long)
    blends = [Blend(replace(edit.site, expert=e), others, options.blend) for e in sorted(chosen) if options.blend]
    factors = {e: 1.0 if e in chosen else options.rest for e in every}
    edits = [_of_one(edit, groups, e, factor, options.own) for e, factor in factors.items() if factor]
    return (*blends, *edits)


def _of_one(edit: Edit, groups: Groups, expert: int, factor: float, own: bool) -> Edit:
    basis = turn_towards_expert(edit.basis, groups["target"], groups["control"], expert) if own else edit.basis
    anchor = None if edit.anchor is None else groups["control"].mean[expert]
    site = replace(edit.site, expert=expert)
    return replace(edit, site=site, basis=basis, strength=factor * edit.strength, anchor=anchor)


def turn_towards_expert(
    basis: Float[Tensor, "k width"], target: Routed, control: Routed, expert: int
) -> Float[Tensor, "k width"]:
    """The basis with its row along the expert's own difference turned towards that difference.

    δ = mean target output − mean control output, of the prompts routed to the expert. Its part p in the basis is
    kept; the rest r is shrunk by the positive-part James–Stein factor 1 − E‖noise‖²/‖r‖² (James & Stein 1961): an
    expert that few prompts were routed to, or none, loses the layer's direction. k rows stay k, orthonormal.
    """
    delta = (target.mean[expert] - control.mean[expert]).to(basis)
    inside = basis @ delta
    rest = delta - inside @ basis
    noise = float(target.noise[expert] + control.noise[expert]) * (1 - len(basis) / len(delta))
    kept = max(0.0, 1 - noise / max(float(rest.square().sum()), TINY))
    if kept == 0.0:
        return basis
    along = inside if float(inside.norm()) > TINY else torch.eye(len(basis)).to(basis)[0]
    along = along / along.norm()
    turned = torch.nn.functional.normalize(inside @ basis + kept * rest, dim=0)
    return basis + torch.outer(along, turned - along @ basis)


TINY = 1e-30  # a difference of nothing has no direction


def select_preferred_experts(groups: Groups, share: float) -> Int[Tensor, " n"]:
    """Experts that get more of the target prompts' tokens than of the control prompts': this share of all, the first,
    and at least one."""
    order = (groups["target"].share - groups["control"].share).argsort(descending=True, stable=True)
    return order[: max(1, round(share * len(order)))].sort().values
