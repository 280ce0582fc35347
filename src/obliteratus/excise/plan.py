"""Plans: made from directions and weights, saved and loaded as safetensors + JSON, and checked against a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from obliteratus.core.errors import NothingMatchedError, UserError
from obliteratus.core.norms import NormRule
from obliteratus.core.probing import WriterContrast
from obliteratus.core.registry import explain_validation_error
from obliteratus.core.run_folder import require_file
from obliteratus.core.settings import Excise, expand_part
from obliteratus.core.shapes import Float
from obliteratus.core.types import (
    Activations,
    Blend,
    Change,
    Directions,
    Edit,
    Mask,
    Plan,
    Shift,
    Site,
    Subject,
    ZeroOutput,
)
from obliteratus.excise.experts import split_by_expert
from obliteratus.excise.heads import split_by_head
from obliteratus.excise.least_change import choose_covectors, remove_difference
from obliteratus.excise.linear import center_rows, fold_gain_reader
from obliteratus.excise.needs import check_activations, check_shapes
from obliteratus.excise.neurons import make_masks
from obliteratus.excise.steer import make_shift, make_shift_where_possible
from obliteratus.excise.writers import fold_gain
from obliteratus.summon.model_samples import ModelSamples
from obliteratus.summon.sites import read_gain, read_norm_bias
from obliteratus.weights.matrices import count_inputs, count_outputs, expand_experts, has_bias
from obliteratus.weights.safetensors_io import tensor_bytes

FILES = ("plan.safetensors", "plan.json")
DEFAULT_OPTIONS = Excise()


def plan_edits(
    subject: Subject,
    directions: Directions,
    weights: Float[Tensor, " sites"] | None = None,
    acts: Activations | None = None,
    options: Excise = DEFAULT_OPTIONS,
) -> Plan:
    """Return a plan with one edit for each site of ``options.parts`` that has a direction and a weight.

    With ``options.heads`` the edit of an attention output becomes one for each chosen head, with ``experts`` that of a
    stack one for each expert; ``neurons`` and ``steer`` add masks and a shift.

    weights: one factor for each of ``subject.sites``, multiplied into ``options.strength``; None takes all as they are.
    acts: may be left out for edits along directions alone; with what `wanted_by` names if the options need it. Raises
    NothingMatchedError if nothing is edited, and UserError for directions of another model and for missing activations.

    >>> ob.plan_edits(subject, directions, options=ob.Excise(strength=0.7))
    <Plan: 12 changes in blocks 2 to 7 (attn.out, mlp.out), strength 0.7>
    """
    check_shapes(subject, directions, weights)
    weights = torch.ones(len(subject.sites)) if weights is None else weights
    acts = check_activations(subject, acts, options)
    parts = _select_parts(subject.sites, options.parts)
    site_edits = tuple(
        edit
        for site, weight in zip(subject.sites, weights, strict=True)
        if site.part in parts and float(weight) != 0
        for edit in _edit(subject, site, directions, float(weight) * options.strength, acts, options)
    )
    if not site_edits:
        raise NothingMatchedError(
            f"nothing to edit: no layer of the parts {', '.join(options.parts)} has both a direction and a "
            "weight; widen the recipe's weigh steps, or check that the two groups differ"
        )
    added = _add_beside(subject, site_edits, directions, acts, options)
    changes: tuple[Change, ...] = site_edits
    if options.heads is not None:
        changes = split_by_head(subject, site_edits, options.heads)
    if options.experts is not None:
        changes = split_by_expert(changes, acts, options.experts)
    return Plan((*changes, *added), subject.source.digest)


def _add_beside(
    subject: Subject, edits: Sequence[Edit], directions: Directions, acts: Activations, options: Excise
) -> list[Change]:
    """Return the masks of neurons and the shift that are wanted beside the edits."""
    added: list[Change] = []
    if options.neurons:
        added += make_masks(subject, edits, acts, options.neurons, "neurons" in options.where_possible)
    if options.steer and "steer" in options.where_possible:
        added += make_shift_where_possible(subject, edits, directions, acts, options.steer)
    elif options.steer:
        added.append(make_shift(edits, directions, acts, options.steer))
    return added


def _select_parts(sites: Sequence[Site], parts: Sequence[str]) -> set[str]:
    """Expand the names of parts. Raises NothingMatchedError for one that this model does not have."""
    existing = {s.part for s in sites}
    for part in parts:
        if existing.isdisjoint(expand_part(part)):
            known = ", ".join(sorted(existing))
            raise NothingMatchedError(f"excise.parts: '{part}' names no part of this model; it has {known}")
    return {part for name in parts for part in expand_part(name)}


def _edit(
    subject: Subject, site: Site, directions: Directions, strength: float, acts: Activations, options: Excise
) -> list[Edit]:
    """Return the edits of a site: none without a direction, and a second one for a writer's own difference."""
    rows = directions.basis[site.stream]
    nonzero = rows.norm(dim=1) > 0.5  # rows are of length 1, or 0 where no direction was found
    if not nonzero.any():
        return []
    rows = rows[nonzero]
    oblique = None if directions.covectors is None else directions.covectors[site.stream][nonzero]
    if site.role == "reads":
        return _edit_reader(subject, site, rows, oblique, strength)
    basis, covectors = fold_gain(subject, site, rows, oblique)
    if options.least_change:
        return _edit_least(site, basis, covectors, strength, acts.contrasts[site.path], options)
    anchor = acts.outputs[site.path] if options.anchored else None
    return [Edit(site, basis.contiguous(), strength, options.norm, anchor, covectors)]


def _edit_least(
    site: Site, basis: Tensor, covectors: Tensor | None, strength: float, contrast: WriterContrast, options: Excise
) -> list[Edit]:
    """Return the edits of least change; none where the groups do not differ in what the writer writes."""
    edits = [(basis.contiguous(), choose_covectors(basis, covectors, contrast))]
    if options.own_difference:
        edits.append(remove_difference(contrast, len(basis)))
    return [Edit(site, rows, strength, options.norm, None, along) for rows, along in edits if along.any()]


def _edit_reader(subject: Subject, site: Site, rows: Tensor, oblique: Tensor | None, strength: float) -> list[Edit]:
    """Return the edit of a reader's input, behind its norm, that removes what the stream holds along the rows.

    A LayerNorm's own bias is kept if the reader has a bias that can make up for it; otherwise it loses its part along
    the rows too. There is none if a LayerNorm removes the rows anyway.
    """
    if site.norm == "layer" and site.gain is not None:
        if oblique is not None:
            raise UserError(
                f"oblique directions (leace) cannot be removed behind the LayerNorm before {site.path}; leave readers "
                "out of excise.parts"
            )
        rows = center_rows(rows)
    gain = read_gain(subject.model, site)
    if gain is None or not len(rows):
        return [Edit(site, rows.contiguous(), strength, covectors=oblique)] if len(rows) else []
    along, basis = fold_gain_reader(rows if oblique is None else oblique, rows, gain.to(rows))
    biased = has_bias(subject.module(site.path), site)
    anchor = read_norm_bias(subject, site) if biased else None
    return [Edit(site, basis.contiguous(), strength, anchor=anchor, covectors=along.contiguous())]


# ------------------------------------------------------------------------------------------ on disk
KINDS: dict[str, type[Change]] = {"edit": Edit, "mask": Mask, "shift": Shift, "blend": Blend, "silence": ZeroOutput}


def save_plan(plan: Plan, folder: str | Path, samples: ModelSamples | None = None) -> None:
    """Write plan.safetensors (bases, anchors and other tensors, fp32) and plan.json (all else) into a folder.

    samples: of the plan's model, by which GGUF files of it are recognized. The folder is made if it is missing. Raises
    UserError if that cannot be.

    >>> ob.save_plan(plan, "plan")
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be made ({error.strerror}); name another") from error
    tensors: dict[str, Tensor] = {}
    edits = []
    for i, change in enumerate(plan.edits):
        fields = vars(change)
        own = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
        for name, value in own.items():  # clones: safetensors refuses two names of one tensor
            exact = value if not value.is_floating_point() else value.float()
            tensors[f"{i}.{name}"] = exact.clone(memory_format=torch.contiguous_format)
        kind = next(name for name, known in KINDS.items() if type(change) is known)
        rest = {name: value for name, value in fields.items() if name not in own and value is not None}
        edits.append({"kind": kind, **rest, "site": asdict(change.site)})
    known = {} if samples is None else {"samples": samples.to_dict()}
    save_file(tensors, folder / FILES[0])
    (folder / FILES[1]).write_text(
        json.dumps({"version": 2, "model": plan.model, "edits": edits, **known}, indent=1), encoding="utf-8"
    )


def load_plan(folder: str | Path) -> Plan:
    """Load the plan in a folder. Raises UserError if there is none, or if it is unreadable or contradicts itself.

    >>> ob.save_plan(plan.scaled(0.5), "half")
    >>> ob.load_plan("half")
    <Plan: 12 changes in blocks 2 to 7 (attn.out, mlp.out), strength 0.5>
    """
    folder = Path(folder)
    for name in FILES:
        require_file(folder, name, "the output folder of a run, or of --save plan")
    try:
        data = json.loads((folder / FILES[1]).read_text(encoding="utf-8"))
        with safe_open(folder / FILES[0], "pt") as tensors:
            names = [name.partition(".") for name in tensors.keys()]  # noqa: SIM118 — no mapping
            own: list[dict[str, Tensor]] = [{} for _ in data["edits"]]
            for number, _, name in names:
                own[int(number)][name] = tensors.get_tensor(f"{number}.{name}")
        edits = tuple(_load_change(item, fields) for item, fields in zip(data["edits"], own, strict=True))
        plan = Plan(edits, str(data["model"]))
    except (SafetensorError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder}: the plan cannot be read ({error}); run the method again") from error
    _check_rules(plan, folder)
    return plan


def load_samples(folder: str | Path) -> ModelSamples:
    """Load what a saved plan says of its model; it is empty if the plan was saved without. Raises UserError."""
    file = Path(folder) / FILES[1]
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return ModelSamples.from_dict(data["samples"]) if "samples" in data else ModelSamples()
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{file}: the samples of the model cannot be read ({error}); run the method again") from error


def plan_digest(plan: Plan) -> str:
    """Return the SHA-256 of everything in the plan: only equal plans have equal digests."""
    digest = hashlib.sha256(plan.model.encode())
    for change in plan.edits:
        for name, value in vars(change).items():
            digest.update(f"{type(change).__name__} {name} ".encode())
            digest.update(tensor_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    return digest.hexdigest()


def _load_change(item: dict[str, Any], tensors: Mapping[str, Any]) -> Change:
    if unknown := item["site"].keys() - {field.name for field in fields_of(Site)}:
        raise ValueError(f"site: there is no {', '.join(sorted(unknown))}")
    try:
        site = SITE.validate_json(json.dumps(item["site"]), strict=True)
    except ValidationError as error:
        raise ValueError(f"site: {explain_validation_error(error)}") from error
    rest = {name: value for name, value in item.items() if name not in ("kind", "site")}
    for name, value in rest.items():
        if not OPTIONS[name](value):
            raise TypeError(f"{name} is {value!r}")
    fields: dict[str, Any] = {
        **tensors,
        **{name: float(value) if name != "norm" else value for name, value in rest.items()},
    }
    return KINDS[item.get("kind", "edit")](site=site, **fields)


SITE = TypeAdapter(Site)
MOST = 1e30  # fp32 ends at 3e38, and an edit multiplies
# The values of changes that are no tensors.
OPTIONS: dict[str, Callable[[Any], bool]] = {
    "strength": lambda value: type(value) in (int, float) and abs(value) < MOST,
    "share": lambda value: type(value) in (int, float) and abs(value) < MOST,
    "norm": lambda value: value in get_args(NormRule),
}


def _check_rules(plan: Plan, folder: Path) -> None:
    for name, changes in plan.by_site().items():
        rules = {c.norm for c in changes if isinstance(c, Edit)}
        if len(rules) > 1:
            raise UserError(
                f"{folder}: the plan has two norm rules ({', '.join(sorted(rules))}) on {name}; give each site one rule"
            )


def check_fits(subject: Subject, plan: Plan) -> None:
    """Raise UserError unless the plan was made for this model, is finite, and edits only what the model has."""
    if plan.model != subject.source.digest:
        raise UserError(
            f"the plan was made for another model (its digest is {plan.model}, that of {subject.source.id} "
            f"is {subject.source.digest}); apply it to the model it was made for"
        )
    known = {site.parameter for site in subject.sites}
    for change in plan.edits:
        if change.site.parameter not in known:
            raise UserError(
                f"the plan edits {change.site.parameter}, which the model does not have; run the method again"
            )
        numbers = [torch.as_tensor(x) for x in vars(change).values() if isinstance(x, float | Tensor)]
        if not all(bool(torch.isfinite(x).all()) for x in numbers):
            raise UserError(f"the plan holds NaN or Inf at {change.site.path}; run the method again")
        _check_site(subject, change)
        _check_rule(change)


def _check_rule(change: Change) -> None:
    """Raise UserError for a change of low rank of an embedding, whose inputs are no vectors."""
    if isinstance(change, Edit) and change.norm == "unit_rows_rank_3" and change.site.layout == "embedding":
        raise UserError(
            f"{change.site.path} is an embedding, to which the norm rule unit_rows_rank_3 does not apply; run the "
            "method again"
        )


def _check_site(subject: Subject, change: Change) -> None:
    """Raise UserError unless heads, neurons and experts exist, and changes for writers only are on writers."""
    site = change.site
    in_part = site.span is not None or site.expert is not None
    if site.role == "reads" and (not isinstance(change, Edit) or change.norm != "none" or in_part):
        raise UserError(
            f"{site.path} is a reader; masks, shifts, norm rules, heads and single experts apply only to writers; run "
            "the method again"
        )
    if isinstance(change, Mask):
        n = count_inputs(subject.module(site.path), site)
        whole_stack = site.stacked and site.expert is None  # experts have no neurons in common
        if whole_stack or site.part not in (*expand_part("mlp.out"), "attn.out") or not _inside(change.neurons, n):
            raise UserError(f"the plan masks inputs that {site.path} does not have; run the method again")
    if isinstance(change, ZeroOutput) and change.outputs is not None:
        n = count_outputs(subject.module(site.path), site)
        if not _inside(change.outputs, n):
            raise UserError(f"the plan zeroes outputs that {site.path} does not have; run the method again")
    if isinstance(change, Blend) or site.expert is not None:
        _check_experts(subject, change)
    if isinstance(change, Edit) and site.span is not None:
        _check_span(subject, change, site.span)


def _inside(indices: Tensor, n: int) -> bool:
    return bool(((indices >= 0) & (indices < n)).all())


def _check_experts(subject: Subject, change: Change) -> None:
    """Raise UserError unless the edited expert, and the donors of a blend, are in the stack."""
    site = change.site
    n = len(expand_experts(subject.module(site.path), replace(site, expert=None))) if site.stacked else 0
    experts = [-1 if site.expert is None else site.expert]
    experts += change.donors.tolist() if isinstance(change, Blend) else []
    if not all(0 <= expert < n for expert in experts):
        raise UserError(f"the plan edits experts {experts} of {site.path}, which has {n}; run the method again")


def _check_span(subject: Subject, edit: Edit, span: tuple[int, int]) -> None:
    site = edit.site
    n = 0 if site.layout == "embedding" else count_inputs(subject.module(site.path), site)  # a table has no heads
    if not 0 <= span[0] < span[1] <= n:
        raise UserError(f"the plan edits inputs {list(span)} of {site.path}, which has {n}; run the method again")
    if edit.anchor is not None:
        raise UserError(
            f"the plan anchors a single head of {site.path}, but an anchor needs the whole matrix; run the method again"
        )
