"""Several plans applied at once by hooks: each row of a batch runs as if its own plan alone were applied.

Plans that differ only in strengths cost what one plan costs. At any other site, the tokens of each plan are taken
together and edited as `hooks.applied` would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from obliteratus.core.shapes import Float, Int
from obliteratus.core.types import Change, Edit, Plan, Site, Subject
from obliteratus.excise.live.compile import (
    LiveOps,
    NormReadings,
    compile_changes,
    edit_input,
    edit_output,
    needs_stored_weight,
    run_edited_experts,
)
from obliteratus.excise.live.hooks import CompiledPlan, Removable, attached
from obliteratus.excise.plan import check_fits
from obliteratus.inference.row_plans import assign_prompt_variants, pass_variants
from obliteratus.summon.experts import Forward, replace_forward
from obliteratus.weights.matrices import execution_device

TokenEdit = Callable[[Tensor, tuple[Any, ...], Tensor], Tensor]
"""(values [tokens, width], the module's arguments, the index of each token's plan [tokens]) → values."""
GetOps = Callable[[], Sequence[LiveOps | None]]
"""Returns a module's operations under each plan, which may be compiled only when it first runs."""


@contextmanager
def applied_per_row(subject: Subject, plans: Sequence[Plan], plan_of_row: Sequence[int]) -> Iterator[None]:
    """Inside, row i of the prompts that run is under ``plans[plan_of_row[i]]``; afterwards the model is unchanged.

    Works for `first_token_log_probs`, `generate`, `read_hidden_states`, `token_losses` and `CachedPrompts`, on as many
    prompts as ``plan_of_row`` has; anything else that runs the model raises ValueError at the first edited site.
    Raises UserError for a plan that does not fit the model, ValueError for a row without a plan.
    """
    if not all(0 <= i < len(plans) for i in plan_of_row):
        raise ValueError(f"plan_of_row names plans beyond the {len(plans)} that are given")
    with attached(compile_per_row(subject, plans)), assign_prompt_variants(plan_of_row):
        yield


def compile_per_row(
    subject: Subject, plans: Sequence[Plan], readings: Sequence[NormReadings] | None = None
) -> CompiledPlan:
    """Return the plans in a form that `hooks.attached` can apply again and again, at the cost of registering hooks.

    Each pass says by `assign_pass_variants` which of the plans each of its rows is under. readings: for each plan, as
    for `hooks.compile_plan`. Raises UserError for a plan that does not fit the model.
    """
    for plan in plans:
        if plan.edits:
            check_fits(subject, plan)
    by_site = [plan.by_site() for plan in plans]
    compiled: CompiledPlan = []
    for name in dict.fromkeys(name for sites in by_site for name in sites):
        changes = [sites.get(name, ()) for sites in by_site]
        path = next(c for own in changes for c in own).site.path
        lazy = any(needs_stored_weight(subject, own) for own in changes if own)
        compiled.append(_compile_site(subject.module(path), changes, readings or [{} for _ in plans], lazy))
    return compiled


def _compile_site(
    module: nn.Module, changes: Sequence[Sequence[Change]], readings: Sequence[NormReadings], lazy: bool
) -> Callable[[], list[Removable]]:
    """Return what attaches the hooks of one site. changes: by plan. lazy: compile them when the module first runs."""
    site = next(c for own in changes for c in own).site
    shared = None if lazy else share_edits(changes, execution_device(module))
    if shared is not None:
        if site.role == "reads":
            return lambda: [_hook_input(module, _in_turn(shared[::-1]))]
        return lambda: [_hook_output(module, _in_turn(shared))]

    @cache
    def get_ops() -> list[LiveOps | None]:
        pairs = zip(changes, readings, strict=True)
        return [compile_changes(module, own, known) if own else None for own, known in pairs]

    known = () if lazy else [live for live in get_ops() if live is not None]
    if (lazy and site.stacked) or any(live.experts for live in known):
        return lambda: [replace_forward(module, _experts_forward(module, site, get_ops))]
    changes_output = lazy or any(live.output_ops or live.new_bias is not None for live in known)
    changes_input = lazy or any(live.input_ops or live.input_scale is not None for live in known)

    def attach() -> list[Removable]:
        after = [_hook_output(module, _by_plan(get_ops, edit_output))] if changes_output else []
        edit = _by_plan(get_ops, lambda x, args, live: edit_input(x, live))
        return [*after, _hook_input(module, edit)] if changes_input else [*after]

    return attach


# ------------------------------------------------------------------------------ plans that differ in strengths
@dataclass(frozen=True)
class SharedEdit:
    """y ← y − s((y − μ)Aᵀ)B with one strength s for each plan; fp32 on the module's device."""

    basis: Float[Tensor, "k width"]
    along: Float[Tensor, "k width"]
    anchor: Float[Tensor, " width"] | None
    strengths: Float[Tensor, " plans"]

    @classmethod
    def from_edits(cls, edits: Sequence[Edit | None], device: torch.device) -> SharedEdit:
        """Join edits, one for each plan, that differ only in strengths; a plan without one has strength 0."""
        edit = next(e for e in edits if e is not None)
        strengths = torch.tensor([0.0 if e is None else e.strength for e in edits], device=device)
        basis, along = (x.to(device, torch.float32) for x in (edit.basis, edit.along))
        return cls(basis, along, None if edit.anchor is None else edit.anchor.to(basis), strengths)

    def __call__(self, y: Tensor, args: tuple[Any, ...], plan: Tensor) -> Tensor:
        offset = y if self.anchor is None else y - self.anchor
        return torch.addmm(y, offset @ self.along.T * self.strengths[plan, None], self.basis, alpha=-1)


def share_edits(changes: Sequence[Sequence[Change]], device: torch.device) -> list[SharedEdit] | None:
    """Return the edits of one site in their order if the plans differ only in strengths, else None."""
    size = max(map(len, changes))
    if not all(len(own) in (0, size) for own in changes):
        return None
    columns = [[own[j] if own else None for own in changes] for j in range(size)]
    return [SharedEdit.from_edits(c, device) for c in columns if _alike(c)] if all(map(_alike, columns)) else None


def _alike(changes: Sequence[Change | None]) -> TypeGuard[Sequence[Edit | None]]:
    """Whether all are edits along the same directions. Norm rules are not linear in the strength; heads read inputs."""
    given = [c for c in changes if c is not None]
    return all(isinstance(c, Edit) and _linear(c) and _same_directions(c, given[0]) for c in given)


def _linear(edit: Edit) -> bool:
    return edit.norm == "none" and edit.site.span is None and edit.site.expert is None


def _same_directions(edit: Edit, first: Change) -> bool:
    if not isinstance(first, Edit) or edit.site != first.site:
        return False
    pairs = [(edit.basis, first.basis), (edit.anchor, first.anchor), (edit.covectors, first.covectors)]
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _in_turn(edits: Sequence[SharedEdit]) -> TokenEdit:
    def change(y: Tensor, args: tuple[Any, ...], plan: Tensor) -> Tensor:
        for edit in edits:
            y = edit(y, args, plan)
        return y

    return change


# ----------------------------------------------------------------------------------------- all other plans
def _by_plan(get_ops: GetOps, edit: Callable[[Tensor, tuple[Any, ...], LiveOps], Tensor]) -> TokenEdit:
    """Edit the tokens of each plan together."""

    def change(y: Tensor, args: tuple[Any, ...], plan: Tensor) -> Tensor:
        y = y.clone()
        for i, live in enumerate(get_ops()):
            own = (plan == i).nonzero()[:, 0]
            if live is not None and len(own):
                y[own] = edit(y[own], _select_arguments(args, own, len(y)), live).to(y.dtype)
        return y

    return change


def _experts_forward(module: nn.Module, site: Site, get_ops: GetOps) -> Forward:
    """Run the tokens of each plan together, with their chosen experts and weights."""
    original = module.forward

    def forward(*args: Tensor) -> Tensor:
        plan = plan_of_token(pass_variants().to(args[0].device), len(args[0]))
        result = torch.empty_like(args[0])
        for i, live in enumerate(get_ops()):
            own = (plan == i).nonzero()[:, 0]
            x, chosen, weights = (arg[own] for arg in args)
            if live is not None and live.experts:
                output = run_edited_experts(module, site, live, (x, chosen, weights))
            else:
                output = original(x, chosen, weights)
            result[own] = output.to(result.dtype)
        return result

    return forward


def _select_arguments(args: tuple[Any, ...], own: Tensor, tokens: int) -> tuple[Any, ...]:
    """Return the arguments of some tokens, which edits of a head and changes of low rank read. Ids are dropped, as they
    are not by token."""
    x = args[0]
    by_token = x.is_floating_point() and x.shape[:-1].numel() == tokens
    return (x.reshape(tokens, -1)[own],) if by_token else ()


# ---------------------------------------------------------------------------------------------------- hooks
def _hook_output(module: nn.Module, edit: TokenEdit) -> RemovableHandle:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return _edit_rows(output, args, edit)

    return module.register_forward_hook(hook)


def _hook_input(module: nn.Module, edit: TokenEdit) -> RemovableHandle:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return _edit_rows(args[0], args, edit), *args[1:]

    return module.register_forward_pre_hook(hook)


def _edit_rows(x: Tensor, args: tuple[Any, ...], edit: TokenEdit) -> Tensor:
    """Edit values whose first axis is the rows, or rows × tokens, or 1 where all rows get the same."""
    plan_of_row = pass_variants().to(x.device)
    if x.ndim > 2 and len(x) == 1:
        x = x.expand(len(plan_of_row), *x.shape[1:])  # a table of positions, looked up once for all rows
    flat = x.reshape(-1, x.shape[-1])
    edited = edit(flat.float(), args, plan_of_token(plan_of_row, len(flat)))
    return edited.view(x.shape).to(x.dtype)


def plan_of_token(plan_of_row: Int[Tensor, " rows"], tokens: int) -> Int[Tensor, " tokens"]:
    """Return the index of each token's plan. Raises ValueError where the tokens are not whole rows."""
    if tokens % len(plan_of_row):
        raise ValueError(f"{tokens} tokens of {len(plan_of_row)} rows: this module does not see whole rows")
    return plan_of_row.repeat_interleave(tokens // len(plan_of_row))
