"""How much of a model the table of architectures claims."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from transformers import PreTrainedModel

from obliteratus.core.types import Change, Edit, Mask, Plan, Site, Subject, ZeroOutput
from obliteratus.summon.architectures import Architecture
from obliteratus.summon.sites import architecture_of, blocks_of, branches_of
from obliteratus.weights.bitsandbytes import unpacked_shape
from obliteratus.weights.matrices import count_inputs, count_outputs, each_expert


@dataclass(frozen=True)
class Coverage:
    """How many matrix parameters of the backbone the sites claim, stacks of matrices included. Vectors (norms, biases)
    are not counted."""

    writers: int
    readers: int
    inner: int
    """Declared to stand between readers and writers, as convolutions do: not of the stream."""
    unclaimed: int
    paths: tuple[str, ...]
    """Matrices that no site claims: nothing is known of them, so each could be a writer that was missed."""

    @property
    def share(self) -> float:
        """Writing parameters found; every unclaimed one counts as missed."""
        return self.writers / max(self.writers + self.unclaimed, 1)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, `share` included."""
        return {**asdict(self), "paths": list(self.paths), "share": self.share}


def table_coverage(model: PreTrainedModel, sites: tuple[Site, ...], family: Architecture) -> Coverage:
    """Count over the decoder blocks and all that stands beside them: embeddings, and whatever else."""
    backbone = family.layers.rpartition(".")[0] + "."
    role: dict[str, str] = {**_inner(model, family), **{site.parameter: site.role for site in sites}}
    biases = {f"{site.path}.{site.bias}" for site in sites}  # those of a stack have two axes
    count = {"writes": 0, "reads": 0, "inner": 0, "": 0}
    unclaimed = []
    for path, parameter in model.named_parameters():
        if not path.startswith(backbone) or parameter.ndim < 2 or path in biases:
            continue  # a vector can move the stream by a constant only
        count[role.get(path, "")] += prod(unpacked_shape(parameter))
        if path not in role:
            unclaimed.append(path)
    return Coverage(count["writes"], count["reads"], count["inner"], count[""], tuple(unclaimed))


def _inner(model: PreTrainedModel, family: Architecture) -> dict[str, str]:
    found = dict.fromkeys(family.beside, "inner")
    for layer, block in enumerate(blocks_of(model, family)):
        for branch in branches_of(family, layer, block):
            found |= {f"{family.layers}.{layer}.{path}": "inner" for path in branch.inner}
    return found


def plan_coverage(subject: Subject, plan: Plan) -> dict[str, Any]:
    """Sites found, edited and skipped by part, the share of writing parameters edited, and what is unclaimed."""
    touched = plan.by_site()
    parts: dict[str, dict[str, Any]] = defaultdict(lambda: {"found": 0, "edited": 0, "skipped_layers": []})
    total, reached = 0, 0.0
    read = {c.site.part for c in plan.edits if c.site.role == "reads"}
    for site in subject.sites:
        if site.role == "reads" and site.part not in read:  # readers are edited only where that was asked for
            continue
        hit = site.parameter in touched
        parts[site.part]["found"] += 1
        parts[site.part]["edited"] += hit
        if not hit:
            parts[site.part]["skipped_layers"].append(site.layer)
        if site.role == "reads":
            continue
        size = _size(subject, site)
        total, reached = total + size, reached + size * _share(subject, site, touched.get(site.parameter, ()))
    known = table_coverage(subject.model, subject.sites, architecture_of(subject.model.config))
    for part in parts.values():
        part["why_skipped"] = _why(part["edited"], part["skipped_layers"])
    return {
        "parts": dict(parts),
        "warning": coverage_warning(known.share, len(known.paths)),
        "edited_share": reached / total,
        "found_share": known.share,
        "unclaimed": list(known.paths),
    }


def _why(edited: int, skipped: Sequence[int]) -> str:
    if not skipped:
        return ""
    return "no weight or no direction in these layers" if edited else "no edit of this part: not asked for, or weight 0"


ENOUGH = 0.99  # the rest of a model whose writers are all known but one of each block would be several per cent


def coverage_warning(found_share: float, unclaimed: int) -> str:
    """The warning where writers may have been missed; empty where they are not."""
    if found_share >= ENOUGH:
        return ""
    return f"{unclaimed} matrices are in no table: of what may write into the stream {found_share:.1%} is known"


def _share(subject: Subject, site: Site, changes: Sequence[Change]) -> float:
    """Share of the matrix that the changes reach: all of it, the columns of some heads or neurons, or some rows."""
    reached: set[int] = set()
    if changes and all(change.site.expert is not None for change in changes):
        return _experts_share(subject, site, changes)
    for change in changes:
        if isinstance(change, Mask):
            reached |= set(change.neurons.tolist())
        elif isinstance(change, ZeroOutput) and change.outputs is not None:
            return len(change.outputs) / count_outputs(subject.module(site.path), site)
        elif isinstance(change, ZeroOutput) or (isinstance(change, Edit) and change.site.span is None):
            return 1.0
        elif isinstance(change, Edit) and change.site.span is not None:
            reached |= set(range(*change.site.span))
    return len(reached) / count_inputs(subject.module(site.path), site) if reached else 0.0


def _experts_share(subject: Subject, site: Site, changes: Sequence[Change]) -> float:
    """Share of a stack's experts that the changes reach."""
    return len({change.site.expert for change in changes}) / len(each_expert(subject.module(site.path), site))


def _size(subject: Subject, site: Site) -> int:
    return prod(unpacked_shape(subject.module(site.path).get_parameter(site.weight)))
