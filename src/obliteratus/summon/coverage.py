"""How much of a model the architecture table accounts for, and how much of that a plan edits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import prod
from typing import Any

from transformers import PreTrainedModel

from obliteratus.core.types import Change, Coverage, Edit, Mask, Plan, Site, Subject, ZeroOutput
from obliteratus.summon.architectures import Architecture
from obliteratus.summon.sites import choose_branches, list_blocks
from obliteratus.weights.adapters import plain_module
from obliteratus.weights.bitsandbytes import unpacked_shape
from obliteratus.weights.matrices import count_inputs, count_outputs, expand_experts

SUFFICIENT_SHARE = 0.99  # a table that misses one writer of each block leaves out several per cent


def count_coverage(model: PreTrainedModel, sites: tuple[Site, ...], architecture: Architecture) -> Coverage:
    """Count the values of all matrices in the blocks and beside them (embeddings and whatever else) by their role.

    `load.assemble_subject` calls this once and keeps the result in `Subject.coverage`.
    """
    backbone = architecture.layers.rpartition(".")[0] + "."
    roles: dict[str, str] = {**_inner_parameters(model, architecture), **{site.parameter: site.role for site in sites}}
    biases = {f"{site.path}.{site.bias}" for site in sites}  # the biases of a stack have two axes
    counts = {"writes": 0, "reads": 0, "inner": 0, "": 0}
    unclaimed = []
    for path, parameter in model.named_parameters():
        if not path.startswith(backbone) or parameter.ndim < 2 or path in biases:
            continue  # a vector can only move the stream by a constant
        counts[roles.get(path, "")] += prod(unpacked_shape(parameter))
        if path not in roles:
            unclaimed.append(path)
    return Coverage(counts["writes"], counts["reads"], counts["inner"], counts[""], tuple(unclaimed))


def _inner_parameters(model: PreTrainedModel, architecture: Architecture) -> dict[str, str]:
    inner = dict.fromkeys(architecture.inner_outside_blocks, "inner")
    for layer, block in enumerate(list_blocks(model, architecture)):
        for branch in choose_branches(architecture, layer, block):
            inner |= {f"{architecture.layers}.{layer}.{path}": "inner" for path in branch.inner}
    return inner


def summarize_plan_coverage(subject: Subject, plan: Plan) -> dict[str, Any]:
    """Return, as plain data, what a plan reaches: by part the sites found, edited and skipped (with the reason), the
    share (0–1) of writing values edited, the share known to the table, and the unclaimed matrices."""
    changes_by_site = plan.by_site()
    parts: dict[str, dict[str, Any]] = defaultdict(lambda: {"found": 0, "edited": 0, "skipped_layers": []})
    edited_values = 0.0
    edited_readers = {change.site.part for change in plan.edits if change.site.role == "reads"}
    for site in subject.sites:
        if site.role == "reads" and site.part not in edited_readers:  # readers are edited only on request
            continue
        changes = changes_by_site.get(site.parameter, ())
        parts[site.part]["found"] += 1
        parts[site.part]["edited"] += bool(changes)
        if not changes:
            parts[site.part]["skipped_layers"].append(site.layer)
        elif site.role == "writes":
            edited_values += _count_values(subject, site) * _edited_share(subject, site, changes)
    for part in parts.values():
        part["why_skipped"] = _explain_skipped(part["edited"], part["skipped_layers"])
    coverage = subject.coverage
    return {
        "parts": dict(parts),
        "warning": coverage_warning(coverage.share, len(coverage.paths)),
        "edited_share": edited_values / coverage.writers,
        "found_share": coverage.share,
        "unclaimed": list(coverage.paths),
    }


def coverage_warning(found_share: float, unclaimed: int) -> str:
    """Return the warning that writers may have been missed, or '' if the table knows enough.

    found_share: `Coverage.share`. unclaimed: the number of matrices that the table does not know.
    """
    if found_share >= SUFFICIENT_SHARE:
        return ""
    return (
        f"the architecture table does not know {unclaimed} matrices, so only {found_share:.1%} of the values that may "
        "write into the stream can be edited"
    )


def _explain_skipped(edited: int, skipped_layers: Sequence[int]) -> str:
    if not skipped_layers:
        return ""
    if edited:
        return "these layers have no direction or a weight of 0"
    return "no site of this part is edited: it was not asked for, or its weight is 0"


def _edited_share(subject: Subject, site: Site, changes: Sequence[Change]) -> float:
    """Return the share (0–1) of the matrix that the changes reach: all of it, the columns of some heads or neurons,
    some rows, or some experts of a stack."""
    module = subject.module(site.path)
    if all(change.site.expert is not None for change in changes):
        return len({change.site.expert for change in changes}) / len(expand_experts(module, site))
    columns: set[int] = set()
    for change in changes:
        if isinstance(change, Mask):
            columns |= set(change.neurons.tolist())
        elif isinstance(change, ZeroOutput) and change.outputs is not None:
            return len(change.outputs) / count_outputs(module, site)
        elif isinstance(change, ZeroOutput) or (isinstance(change, Edit) and change.site.span is None):
            return 1.0
        elif isinstance(change, Edit) and change.site.span is not None:
            columns |= set(range(*change.site.span))
    return len(columns) / count_inputs(module, site) if columns else 0.0


def _count_values(subject: Subject, site: Site) -> int:
    return prod(unpacked_shape(plain_module(subject.module(site.path)).get_parameter(site.weight)))
