"""Edits of single experts, chosen by which experts the target prompts are routed to, each along its own direction."""

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
from obliteratus.core.types import Activations, Blend, Change, Edit, RoutingStatistics

Groups = Mapping[str, RoutingStatistics]


def split_by_expert(edits: Sequence[Change], acts: Activations, options: Experts) -> tuple[Change, ...]:
    """Replace each edit of a stack of experts by blends and edits of single experts; other changes stay.

    Raises NothingMatchedError if the model has stacks (``acts.routed``) and none is edited, UserError if ``own`` is
    combined with oblique directions.
    """
    if not acts.routed:  # recipes may ask for experts of models that have none
        note("experts", "the model has no stack of experts: each MLP is edited as a whole")
        return tuple(edits)
    if not any(map(_edits_stack, edits)):
        raise NothingMatchedError("excise.experts: no stack of experts is edited; leave excise.experts out")
    parts = (_split(e, acts.routed[e.site.path], options) if _edits_stack(e) else (e,) for e in edits)
    return tuple(change for part in parts for change in part)


def _edits_stack(change: Change) -> TypeGuard[Edit]:
    """Whether it is an edit of the output of a stack of experts."""
    return isinstance(change, Edit) and change.site.stacked and change.site.role == "writes"


def _split(edit: Edit, groups: Groups, options: Experts) -> tuple[Change, ...]:
    if options.own and edit.covectors is not None:
        raise UserError(
            "excise.experts.own: an expert's own direction is an orthogonal projection, and the distill steps gave "
            "oblique ones; set own=false or leave leace out"
        )
    chosen = set(select_preferred_experts(groups, options.share).tolist())
    experts = range(len(groups["target"].count))
    others = torch.tensor([e for e in experts if e not in chosen], dtype=torch.long)
    blends = [Blend(replace(edit.site, expert=e), others, options.blend) for e in sorted(chosen) if options.blend]
    factors = {e: 1.0 if e in chosen else options.rest for e in experts}
    edits = [_edit_expert(edit, groups, e, factor, options.own) for e, factor in factors.items() if factor]
    return (*blends, *edits)


def _edit_expert(edit: Edit, groups: Groups, expert: int, factor: float, own: bool) -> Edit:
    basis = turn_towards_expert(edit.basis, groups["target"], groups["control"], expert) if own else edit.basis
    anchor = None if edit.anchor is None else groups["control"].mean[expert]
    site = replace(edit.site, expert=expert)
    return replace(edit, site=site, basis=basis, strength=factor * edit.strength, anchor=anchor)


def turn_towards_expert(
    basis: Float[Tensor, "k width"], target: RoutingStatistics, control: RoutingStatistics, expert: int
) -> Float[Tensor, "k width"]:
    """Return the basis rotated so that it contains the expert's own difference δ, as far as δ is no noise.

    δ = mean target output − mean control output, over prompts routed to the expert. Its part in the basis is kept;
    the rest r is shrunk by the positive-part James–Stein factor 1 − E‖noise‖²/‖r‖² (James & Stein 1961). An expert
    that few or no prompts were routed to therefore keeps the layer's basis. The k rows stay orthonormal.
    """
    delta = (target.mean[expert] - control.mean[expert]).to(basis)
    inside = basis @ delta
    rest = delta - inside @ basis
    noise = float(target.noise[expert] + control.noise[expert]) * (1 - len(basis) / len(delta))
    shrinkage = max(0.0, 1 - noise / max(float(rest.square().sum()), TINY))
    if shrinkage == 0.0:
        return basis
    along = inside if float(inside.norm()) > TINY else torch.eye(len(basis)).to(basis)[0]
    along = along / along.norm()
    turned = torch.nn.functional.normalize(inside @ basis + shrinkage * rest, dim=0)
    return basis + torch.outer(along, turned - along @ basis)


TINY = 1e-30  # a vector this short has no direction


def select_preferred_experts(groups: Groups, share: float) -> Int[Tensor, " n"]:
    """Return the experts that gain most tokens from control to target prompts: this share of all, at least one."""
    order = (groups["target"].share - groups["control"].share).argsort(descending=True, stable=True)
    return order[: max(1, round(share * len(order)))].sort().values
