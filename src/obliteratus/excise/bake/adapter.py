"""A plan saved as a PEFT adapter: exact, of rank Σk, without a norm rule; otherwise the nearest of a given rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from obliteratus.core.errors import UserError
from obliteratus.core.shapes import Float
from obliteratus.core.types import Change, Edit, Mask, Plan, Subject, ZeroOutput
from obliteratus.excise.change import apply_change, compute_bias_difference
from obliteratus.excise.plan import check_fits
from obliteratus.weights.matrices import read_weight

# With a norm rule the change has full rank with a long tail of small singular values: 32 holds the directions of every
# recipe (k ≤ 8, passes ≤ 3) and the largest of the rest. The error is measured and reported.
MAX_RANK = 32

Factors = tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]


def save_adapter(subject: Subject, plan: Plan, folder: Path, max_rank: int | None = MAX_RANK) -> dict[str, float]:
    """Write adapter_model.safetensors and adapter_config.json, which PEFT loads onto the same model.

    max_rank: rank limit of edits with a norm rule; None keeps full rank (exact, as large as the matrix).
    Returns ``rank`` and ``error``, the largest ‖ΔW − BA‖ / ‖ΔW‖ over all sites. Raises UserError for layouts that an
    adapter cannot hold.
    """
    check_fits(subject, plan)
    _check_layouts(subject, plan)
    tensors, ranks, errors, biased = {}, [], [0.0], False
    for edits in plan.by_site().values():
        path = edits[0].site.path
        (b, a), error = factorize_changes(subject.module(path), edits, max_rank)
        shift = compute_bias_difference(subject.module(path), edits)
        biased |= shift is not None
        ranks.append(a.shape[0])
        errors.append(error)
        tensors[path] = (edits[0].site.layout, a, b, shift)
    rank = max(ranks)
    state: dict[str, Tensor] = {}
    for path, (layout, a, b, shift) in tensors.items():
        state |= _name_for_peft(
            path, layout, _pad_rank(a, 0, rank), _pad_rank(b, 1, rank), shift if biased else None, biased
        )
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _make_config(subject, plan, rank, biased).save_pretrained(str(folder))
    return {"rank": float(rank), "error": max(errors)}


# PEFT refuses adapters on the output projections of state spaces: kernels read that weight without calling its module.
NO_OUT_PROJ = ("falcon_h1", "nemotron_h")


def _check_layouts(subject: Subject, plan: Plan) -> None:
    """Raise UserError for state spaces and for stacks of experts, which PEFT stores in a layout of its own."""
    if subject.model.config.model_type in NO_OUT_PROJ:
        raise UserError(
            f"PEFT cannot hold an adapter of the state spaces of a '{subject.model.config.model_type}' model; "
            "use --save merged or plan"
        )
    if stacked := next((change.site.parameter for change in plan.edits if change.site.stacked), None):
        raise UserError(f"{stacked} holds all experts, which an adapter cannot edit; use --save merged or plan")


def factorize_changes(module: nn.Module, changes: Sequence[Change], max_rank: int | None) -> tuple[Factors, float]:
    """Return B [out, r] and A [r, in] with W + BA = W′, and the relative error of that product."""
    return factorize_matrix(read_weight(module, changes[0].site), changes, max_rank)


def factorize_matrix(
    original: Float[Tensor, "out in"], changes: Sequence[Change], max_rank: int | None
) -> tuple[Factors, float]:
    """Do the same as `factorize_changes` for the matrix itself."""
    weight, outs, ins = original, [original.new_zeros(len(original), 0)], [original.new_zeros(0, original.shape[1])]
    for change in changes:
        b, a = _factorize(change, weight)
        outs, ins = [*outs, b], [*ins, a]
        weight = apply_change(change, weight)
    if all(not isinstance(c, Edit) or c.norm == "none" for c in changes):
        return (torch.cat(outs, 1), torch.cat(ins, 0)), 0.0
    return _truncate(weight - original, max_rank)


@singledispatch
def _factorize(change: Change, weight: Float[Tensor, "out in"]) -> Factors:
    """Return the change of W, without a norm rule, as a product of two factors."""
    return weight.new_zeros(len(weight), 0), weight.new_zeros(0, weight.shape[1])


@_factorize.register
def _(change: Edit, weight: Float[Tensor, "out in"]) -> Factors:
    basis, along = change.basis.to(weight), change.along.to(weight)
    if change.site.role == "reads":
        return -change.strength * weight @ basis.T, along
    read = along @ weight
    if change.anchor is not None and change.site.layout == "embedding":
        read = read - (along @ change.anchor.to(weight))[:, None]
    return -change.strength * basis.T, _keep_span(read, change.site.span)


@_factorize.register
def _(change: Mask, weight: Float[Tensor, "out in"]) -> Factors:
    neurons = change.neurons.to(weight.device)
    return -weight[:, neurons], torch.eye(weight.shape[1]).to(weight)[neurons]


@_factorize.register
def _(change: ZeroOutput, weight: Float[Tensor, "out in"]) -> Factors:
    rows = torch.arange(len(weight)) if change.outputs is None else change.outputs
    rows = rows.to(weight.device)
    if len(rows) <= weight.shape[1]:
        return torch.eye(len(weight)).to(weight)[:, rows], -weight[rows]
    return -torch.eye(len(weight)).to(weight)[:, rows] @ weight[rows], torch.eye(weight.shape[1]).to(weight)


def _keep_span(along: Float[Tensor, "k in"], span: tuple[int, int] | None) -> Float[Tensor, "k in"]:
    """Return V with all columns outside the span set to zero."""
    if span is None:
        return along
    inside = torch.zeros_like(along)
    inside[:, slice(*span)] = along[:, slice(*span)]
    return inside


def _truncate(change: Float[Tensor, "out in"], max_rank: int | None) -> tuple[Factors, float]:
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    rank = len(s) if max_rank is None else min(max_rank, len(s))
    lost = float(s[rank:].square().sum().sqrt() / s.square().sum().sqrt().clamp(min=1e-30))
    return (u[:, :rank] * s[:rank], v[:rank]), lost


def _pad_rank(matrix: Tensor, dim: int, rank: int) -> Tensor:
    missing = rank - matrix.shape[dim]
    shape = list(matrix.shape)
    shape[dim] = missing
    return torch.cat([matrix, matrix.new_zeros(shape)], dim).contiguous().cpu()


def _name_for_peft(
    path: str, layout: str, a: Tensor, b: Tensor, shift: Tensor | None, biased: bool
) -> dict[str, Tensor]:
    """Return one module's tensors under PEFT's names."""
    stem = f"base_model.model.{path}"
    if layout == "embedding":
        return {f"{stem}.lora_embedding_A": a, f"{stem}.lora_embedding_B": b}
    state = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    if biased:
        state[f"{stem}.lora_B.bias"] = b.new_zeros(len(b)) if shift is None else shift.cpu().contiguous()
    return state


def _make_config(subject: Subject, plan: Plan, rank: int, biased: bool) -> Any:
    """Return PEFT's configuration of the adapter."""
    from peft import LoraConfig  # imported here because it takes a second

    conv = any(e.site.layout == "conv1d" for e in plan.edits)
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=subject.source.id,
        r=rank,
        lora_alpha=rank,  # PEFT scales by alpha / r: one
        lora_bias=biased,
        fan_in_fan_out=conv,
        target_modules=sorted({change.site.path for change in plan.edits}),
        inference_mode=True,
    )
