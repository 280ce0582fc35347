"""Directions and weights become a plan; plans are saved and loaded as safetensors + JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from obliteratus.errors import NothingMatchedError, UserError
from obliteratus.excise.heads import on_heads
from obliteratus.excise.linear import through_gain
from obliteratus.shapes import Float
from obliteratus.summon.anatomy import gain_of
from obliteratus.summon.codec import columns
from obliteratus.types import Activations, Directions, Edit, Excise, Plan, Site, Subject

FILES = ("plan.safetensors", "plan.json")


def excise(
    subject: Subject,
    directions: Directions,
    weights: Float[Tensor, " sites"],
    acts: Activations,
    options: Excise,
) -> Plan:
    """One edit for each wanted site with a direction and a weight. Raises NothingMatchedError if there is none.

    With ``options.heads`` the edit of an attention output becomes one for each head that is kept.

    weights: one factor for each of ``subject.sites``, multiplied into ``options.strength``.
    """
    _check_parts(subject.sites, options.parts)
    edits = [
        _edit(subject, site, directions, float(weight) * options.strength, acts, options)
        for site, weight in zip(subject.sites, weights, strict=True)
        if site.part in options.parts and float(weight) != 0
    ]
    found = tuple(edit for edit in edits if edit is not None)
    if not found:
        raise NothingMatchedError(
            f"nothing to edit: no layer of the parts {', '.join(options.parts)} has both a direction and a "
            "weight; widen the recipe's weigh steps, or check that the two groups differ"
        )
    return Plan(found if options.heads is None else on_heads(subject, found, options.heads), subject.source.digest)


def _check_parts(sites: Sequence[Site], parts: Sequence[str]) -> None:
    writers = {s.part for s in sites if s.role == "writes"}
    for part in parts:
        if part not in writers:
            known = ", ".join(sorted(writers))
            raise NothingMatchedError(f"excise.parts: '{part}' names no writer of this model; it has {known}")


def _edit(
    subject: Subject, site: Site, directions: Directions, strength: float, acts: Activations, options: Excise
) -> Edit | None:
    rows = directions.basis[site.stream]
    rows = rows[rows.norm(dim=1) > 0.5]  # rows are of length 1, or 0 where nothing was found
    if not len(rows):
        return None
    gain = gain_of(subject, site)
    basis = rows if gain is None else through_gain(rows, gain.to(rows))
    anchor = acts.outputs[site.path] if options.anchored else None
    return Edit(site, basis.contiguous(), strength, options.norm, anchor)


# ------------------------------------------------------------------------------------------ on disk
def save_plan(plan: Plan, folder: Path) -> None:
    """Write plan.safetensors (fp32 bases and anchors) and plan.json (all else) into an existing folder."""
    tensors: dict[str, Tensor] = {}
    for i, edit in enumerate(plan.edits):
        tensors[f"{i}.basis"] = edit.basis.float().clone(memory_format=torch.contiguous_format)
        if edit.anchor is not None:  # clones: safetensors refuses two names of one tensor
            tensors[f"{i}.anchor"] = edit.anchor.float().clone(memory_format=torch.contiguous_format)
    save_file(tensors, folder / FILES[0])
    edits = [{"site": asdict(e.site), "strength": e.strength, "norm": e.norm} for e in plan.edits]
    (folder / FILES[1]).write_text(json.dumps({"version": 1, "model": plan.model, "edits": edits}, indent=1))


def load_plan(folder: Path) -> Plan:
    """The plan in a folder. Raises UserError where there is none, or where its two files disagree."""
    for name in FILES:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name} in this folder; give the output folder of a run, or of --save plan")
    try:
        data = json.loads((folder / FILES[1]).read_text())
        with safe_open(folder / FILES[0], "pt") as tensors:
            known = set(tensors.keys())
            edits = tuple(_loaded(i, item, tensors, known) for i, item in enumerate(data["edits"]))
        return Plan(edits, data["model"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: the plan cannot be read ({error}); run the method again") from error


def _loaded(i: int, item: dict[str, Any], tensors: Any, known: set[str]) -> Edit:
    start, stop = item["site"]["span"] or (None, None)
    site = item["site"] | {"span": None if start is None else (start, stop)}
    anchor = tensors.get_tensor(f"{i}.anchor") if f"{i}.anchor" in known else None
    return Edit(Site(**site), tensors.get_tensor(f"{i}.basis"), item["strength"], item["norm"], anchor)


def check_fits(subject: Subject, plan: Plan) -> None:
    """Raises UserError unless the plan was made for this model, all its numbers are finite, and its spans exist."""
    if plan.model != subject.source.digest:
        raise UserError(
            f"the plan was made for another model (its digest is {plan.model}, that of {subject.source.id} "
            f"is {subject.source.digest}); apply it to the model it was made for"
        )
    for edit in plan.edits:
        numbers = (edit.basis, torch.tensor(edit.strength), *(() if edit.anchor is None else (edit.anchor,)))
        if not all(bool(torch.isfinite(x).all()) for x in numbers):
            raise UserError(f"the plan holds NaN or Inf at {edit.site.path}; run the method again")
        if edit.site.span is not None:
            _check_span(subject, edit, edit.site.span)


def _check_span(subject: Subject, edit: Edit, span: tuple[int, int]) -> None:
    site = edit.site
    n = 0 if site.layout == "embedding" else columns(subject.module(site.path), site)  # a table has no heads
    if not 0 <= span[0] < span[1] <= n:
        raise UserError(f"the plan edits inputs {list(span)} of {site.path}, which has {n}; run the method again")
    if edit.anchor is not None:
        raise UserError(f"the plan anchors a single head at {site.path}; an anchor needs the whole; set only one")
