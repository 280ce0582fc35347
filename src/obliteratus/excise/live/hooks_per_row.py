"""Several plans as live hooks at once: each row of a batch is under its own, as if it were run under that plan alone.

Plans that differ only in strengths cost what one plan costs. At any other site the rows of each plan are taken
together and edited as `live.applied` would.
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
from obliteratus.excise.live.attach import Removable
from obliteratus.excise.live.hooks import compile_changes, needs_stored_weight
from obliteratus.excise.live.ops import LiveOps, edit_input, edit_output, run_edited_experts
from obliteratus.excise.plan import check_fits
from obliteratus.inference.row_plans import variants_of_pass, with_variants
from obliteratus.summon.experts import Forward, replace_forward
from obliteratus.weights.matrices import device_of

Changed = Callable[[Tensor, tuple[Any, ...], Tensor], Tensor]
"""(values [tokens, width], the module's arguments, which plan each token is under [tokens]) → values."""
Lives = Callable[[], Sequence[LiveOps | None]]
"""By plan."""


@contextmanager
def applied_per_row(subject: Subject, plans: Sequence[Plan], of_row: Sequence[int]) -> Iterator[None]:
    """Inside, prompt i of a list that is run is under ``plans[of_row[i]]``; afterwards the model is untouched.

    For `logits.first_token_log_probs`, `generate.generate`, `forward.read` and a `Trunk`, on as many prompts as ``of_row`` has.
    Anything else that runs the model raises ValueError at the first edited site. Raises UserError for a plan that does
    not fit the model, ValueError for a row without a plan.
    """
    if not all(0 <= i < len(plans) for i in of_row):
        raise ValueError(f"of_row names plans beyond the {len(plans)} that are given")
    for plan in plans:
        if plan.edits:
            check_fits(subject, plan)
    sites = [plan.by_site() for plan in plans]
    handles: list[Removable] = []
    try:
        for name in dict.fromkeys(name for site in sites for name in site):
            changes = [site.get(name, ()) for site in sites]
            path = next(c for of_plan in changes for c in of_plan).site.path
            late = any(needs_stored_weight(subject, of_plan) for of_plan in changes if of_plan)
            handles += _attach(subject.module(path), changes, late)
        with with_variants(of_row):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(module: nn.Module, changes: Sequence[Sequence[Change]], late: bool) -> list[Removable]:
    """changes: of one site, by plan. late: make them ready when the module first runs."""
    first = next(c for of_plan in changes for c in of_plan).site
    shared = None if late else _shared(changes, device_of(module))
    if shared is not None:
        return [_before(module, _in_turn(shared[::-1])) if first.role == "reads" else _after(module, _in_turn(shared))]

    @cache
    def lives() -> list[LiveOps | None]:
        return [compile_changes(module, of_plan) if of_plan else None for of_plan in changes]

    handles: list[Removable] = []
    there = () if late else [live for live in lives() if live is not None]
    if (late and first.stacked) or any(live.experts for live in there):
        return [replace_forward(module, _experts_forward(module, first, lives))]
    if late or any(live.ops or live.after is not None for live in there):
        handles.append(_after(module, _grouped(lives, edit_output)))
    if late or any(live.feeds or live.inputs is not None for live in there):
        handles.append(_before(module, _grouped(lives, lambda x, args, live: edit_input(x, live))))
    return handles


# ------------------------------------------------------------------------------ plans that differ in strengths
@dataclass(frozen=True)
class _Shared:
    """y ← y − s((y − μ)Aᵀ)B with one s for each plan; fp32 on the module's device."""

    basis: Float[Tensor, "k width"]
    along: Float[Tensor, "k width"]
    anchor: Float[Tensor, " width"] | None
    strengths: Float[Tensor, " plans"]

    @classmethod
    def of(cls, edits: Sequence[Edit | None], device: torch.device) -> _Shared:
        """edits: the same but for strengths, by plan; a plan without one has strength 0."""
        edit = next(e for e in edits if e is not None)
        strengths = torch.tensor([0.0 if e is None else e.strength for e in edits], device=device)
        basis, along = (x.to(device, torch.float32) for x in (edit.basis, edit.along))
        return cls(basis, along, None if edit.anchor is None else edit.anchor.to(basis), strengths)

    def __call__(self, y: Tensor, args: tuple[Any, ...], plan: Tensor) -> Tensor:
        from_here = y if self.anchor is None else y - self.anchor
        return torch.addmm(y, from_here @ self.along.T * self.strengths[plan, None], self.basis, alpha=-1)


def _shared(changes: Sequence[Sequence[Change]], device: torch.device) -> list[_Shared] | None:
    """The plans' edits of one site in their order, if they are the same but for strengths."""
    size = max(map(len, changes))
    if not all(len(of_plan) in (0, size) for of_plan in changes):
        return None
    columns = [[of_plan[j] if of_plan else None for of_plan in changes] for j in range(size)]
    return [_Shared.of(c, device) for c in columns if _alike(c)] if all(map(_alike, columns)) else None


def _alike(changes: Sequence[Change | None]) -> TypeGuard[Sequence[Edit | None]]:
    """Whether all are edits along the same directions. Norm rules are not linear in the strength; heads see inputs."""
    there = [c for c in changes if c is not None]
    return all(isinstance(c, Edit) and _simple(c) and _same(c, there[0]) for c in there)


def _simple(edit: Edit) -> bool:
    return edit.norm == "none" and edit.site.span is None and edit.site.expert is None


def _same(edit: Edit, first: Change) -> bool:
    if not isinstance(first, Edit) or edit.site != first.site:
        return False
    pairs = [(edit.basis, first.basis), (edit.anchor, first.anchor), (edit.covectors, first.covectors)]
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _in_turn(edits: Sequence[_Shared]) -> Changed:
    def change(y: Tensor, args: tuple[Any, ...], plan: Tensor) -> Tensor:
        for edit in edits:
            y = edit(y, args, plan)
        return y

    return change


# ----------------------------------------------------------------------------------------- all other plans
def _grouped(lives: Lives, make: Callable[[Tensor, tuple[Any, ...], LiveOps], Tensor]) -> Changed:
    """Each plan's tokens taken together."""

    def change(y: Tensor, args: tuple[Any, ...], plan: Tensor) -> Tensor:
        y = y.clone()
        for i, live in enumerate(lives()):
            here = (plan == i).nonzero()[:, 0]
            if live is not None and len(here):
                y[here] = make(y[here], _part(args, here, len(y)), live).to(y.dtype)
        return y

    return change


def _experts_forward(module: nn.Module, site: Site, lives: Lives) -> Forward:
    """Each plan's tokens taken together, experts and their weights too."""
    own = module.forward

    def forward(*given: Tensor) -> Tensor:
        plan = _of_token(variants_of_pass().to(given[0].device), len(given[0]))
        result = torch.empty_like(given[0])
        for i, live in enumerate(lives()):
            here = (plan == i).nonzero()[:, 0]
            x, chosen, weights = (one[here] for one in given)
            if live is not None and live.experts:
                made = run_edited_experts(module, site, live, (x, chosen, weights))
            else:
                made = own(x, chosen, weights)
            result[here] = made.to(result.dtype)
        return result

    return forward


def _part(args: tuple[Any, ...], here: Tensor, tokens: int) -> tuple[Any, ...]:
    """The arguments of some tokens. Only edits of a head look at them; what is not by token, as ids are, stays away."""
    x = args[0]
    by_token = x.is_floating_point() and x.shape[:-1].numel() == tokens
    return (x.reshape(tokens, -1)[here],) if by_token else ()


# ---------------------------------------------------------------------------------------------------- hooks
def _after(module: nn.Module, change: Changed) -> RemovableHandle:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return _by_row(output, args, change)

    return module.register_forward_hook(hook)


def _before(module: nn.Module, change: Changed) -> RemovableHandle:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return _by_row(args[0], args, change), *args[1:]

    return module.register_forward_pre_hook(hook)


def _by_row(x: Tensor, args: tuple[Any, ...], change: Changed) -> Tensor:
    """A change of values whose first axis is the rows, or rows × tokens, or 1 where all rows are given the same."""
    of_row = variants_of_pass().to(x.device)
    if x.ndim > 2 and len(x) == 1:
        x = x.expand(len(of_row), *x.shape[1:])  # a table of positions, looked up once for all rows
    flat = x.reshape(-1, x.shape[-1])
    changed = change(flat.float(), args, _of_token(of_row, len(flat)))
    return changed.view(x.shape).to(x.dtype)


def _of_token(of_row: Int[Tensor, " rows"], tokens: int) -> Int[Tensor, " tokens"]:
    if tokens % len(of_row):
        raise ValueError(f"{tokens} tokens of {len(of_row)} rows: this module does not see whole rows")
    return of_row.repeat_interleave(tokens // len(of_row))
