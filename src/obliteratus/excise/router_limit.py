"""The router limit: router edits are scaled down if a check finds that they send control prompts to other experts."""

from __future__ import annotations

from dataclasses import replace

import torch

from obliteratus.core.errors import UserError
from obliteratus.core.probing import ProbeRequest
from obliteratus.core.progress import note
from obliteratus.core.shapes import Float, Int
from obliteratus.core.types import Change, Plan, Prompt, Subject
from obliteratus.excise.kl_budget import CHECK_PROMPTS, find_largest_factor
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.hidden_states import read_hidden_states

# The share of the experts chosen for control prompts that may change. A model whose experts are interchangeable loses
# little by it, and none was seen to keep its answers when most of them change.
MAX_CHANGED_SHARE = 0.25
BISECTION_STEPS = 4  # the factor to 1/16: routing changes in steps, and finer factors showed no difference


def limit_router_edits(subject: Subject, done: Plan, new: Plan, prompts: tuple[Prompt, ...]) -> Plan:
    """Scale the router edits of the new plan down until at most a quarter of control prompts' experts change.

    Experts are compared at the last token of the first 48 prompts, with those under the same plan without router
    edits. A plan without router edits, or whose edits change little, is returned as it is. Raises UserError if even
    1/16 of the strength changes more.
    """
    stacks = [s.path for s in subject.sites if s.stacked and s.role == "writes"]
    if not stacks or not any(map(_edits_router, new.edits)):
        return new
    ids = render_prompts(subject, prompts[:CHECK_PROMPTS])

    def experts_at(factor: float) -> Int[torch.Tensor, "rows stacks k"]:
        with applied(subject, done + _scale_router_edits(new, factor)):
            return read_chosen_experts(subject, ids, stacks)

    before = experts_at(0.0)
    factor, share = find_largest_factor(
        lambda factor: float(compute_changed_share(before, experts_at(factor)).mean()),
        MAX_CHANGED_SHARE,
        BISECTION_STEPS,
    )
    if factor == 0:
        raise UserError(
            f"excise.parts: even 1/{2**BISECTION_STEPS} of the strength on routers changes more than "
            f"{MAX_CHANGED_SHARE:.0%} of the experts chosen for control prompts; leave the part router out"
        )
    note("routers", f"{factor:.0%} of the strength, {share:.0%} of control prompts' experts change")
    return _scale_router_edits(new, factor)


def read_chosen_experts(subject: Subject, ids: Ids, stacks: list[str]) -> Int[torch.Tensor, "rows stacks k"]:
    """Return the experts chosen at each prompt's last token. All stacks of a model choose the same number."""
    by_row: dict[int, torch.Tensor] = {}
    for reading in read_hidden_states(subject, ids, request=ProbeRequest(expert_modules=stacks), title="routers"):
        each = torch.stack([reading.routing[path].chosen for path in stacks], 1)
        by_row |= dict(zip(reading.rows, each, strict=True))
    return torch.stack([by_row[row] for row in range(len(ids))])


def compute_changed_share(
    before: Int[torch.Tensor, "rows stacks k"], after: Int[torch.Tensor, "rows stacks k"]
) -> Float[torch.Tensor, "rows stacks"]:
    """Return the share of experts chosen before that are not among those chosen after, whatever their order."""
    unchanged = (before.unsqueeze(-1) == after.unsqueeze(-2)).any(-1)
    return 1 - unchanged.float().mean(-1)


def _edits_router(change: Change) -> bool:
    return change.site.part == "router"


def _scale_router_edits(plan: Plan, factor: float) -> Plan:
    """Multiply the strength of the plan's router edits by the factor; at 0 leave them out."""
    parts = (
        Plan((c,)).scaled(factor).edits if _edits_router(c) else (c,)
        for c in plan.edits
        if factor or not _edits_router(c)
    )
    return replace(plan, edits=tuple(change for part in parts for change in part))
