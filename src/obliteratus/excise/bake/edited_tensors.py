"""What a plan makes of the tensors of a checkpoint's files, each computed when it is to be written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from obliteratus.core.types import Change, Plan, Shift, Site
from obliteratus.excise.bake.base_files import BaseCheckpoint, find_new_bias_sites
from obliteratus.excise.bake.check_base import check_same_expert, check_same_matrix
from obliteratus.excise.bake.tensors import bake_in_pieces, find_bias_switches, edit_biases, edit_parameter
from obliteratus.excise.change import select_changes, fill_donor_means_from, needs_bias, edit_module_weight
from obliteratus.weights.checkpoint import Checkpoint
from obliteratus.weights.matrices import has_bias, read_weight, convert_to_stored
from obliteratus.weights.safetensors_io import Pieces


@dataclass
class TensorEdits:
    """What becomes of a checkpoint's tensors, by their stored names."""

    tensors: dict[str, Pieces]
    """New numbers, each computed when it is to be written."""
    added: dict[str, Tensor]
    """Shape and dtype of those that are not there yet."""
    config: dict[str, bool]
    """What the configuration must say."""


def edit_tensors(onto: BaseCheckpoint, plan: Plan) -> TensorEdits:
    """All that a plan changes, if `why_not` does not speak against it."""
    made = TensorEdits({}, {}, dict.fromkeys(find_bias_switches(onto.subject, plan).values(), True))
    for site in find_new_bias_sites(onto.subject, plan):
        _add_bias(onto, site, made)
    if onto.tied is not None and any(name in onto.tied for name in plan.by_site()):
        _part(onto, onto.tied, made)
    filling = _filling(onto, plan.by_site())
    for changes in plan.by_site().values():
        apart = onto.experts(changes[0].site)
        made.tensors |= _one_by_one(onto, changes, filling) if apart else _edited(onto, changes)
    return made


def _add_bias(onto: BaseCheckpoint, site: Site, made: TensorEdits) -> None:
    key = onto.source(site.parameter)
    like, name = onto.files.like(str(key)), onto.bias(site)
    if not onto.files.holds(name):
        made.added[name] = like[:, 0] if site.layout == "linear" else like[0]
        made.tensors[name] = partial(_zeros, made.added[name])


def _zeros(like: Tensor) -> Iterator[Tensor]:
    yield torch.zeros(like.shape, dtype=like.dtype)


def _part(onto: BaseCheckpoint, tied: tuple[str, str], made: TensorEdits) -> None:
    """Embedding and head part, for the plan edits one: the other stays as it was."""
    made.config["tie_word_embeddings"] = False
    source, head = onto.source(tied[0]), onto.target(tied[1])
    if source is not None and not onto.files.holds(head):
        made.added[head] = onto.files.like(source)
        made.tensors[head] = partial(_as_stored, onto.files, source)


def _as_stored(files: Checkpoint, key: str) -> Iterator[Tensor]:
    yield files.tensor(key)


def _edited(onto: BaseCheckpoint, changes: Sequence[Change]) -> Mapping[str, Pieces]:
    """The edited matrix, and its bias if it has one or gets one."""
    site = changes[0].site
    made: dict[str, Pieces] = {}
    if not all(isinstance(change, Shift) for change in changes):
        made[onto.target(site.parameter)] = partial(_matrix, onto, changes)
    if onto.files.key(f"{site.path}.{site.bias}") or any(map(needs_bias, changes)):
        made[onto.bias(site)] = partial(_bias, onto, changes)
    return made


def _matrix(onto: BaseCheckpoint, changes: Sequence[Change]) -> Iterator[Tensor]:
    """Edited in fp32 as it is stored, and rounded once to the stored dtype: that of the loaded model may be coarser,
    and an edit of what was rounded before would round twice; or finer, and the file would grow without saying more."""
    site = changes[0].site
    holder = onto.holder(site)
    check_same_matrix(onto.subject, site, holder, onto.files.name)
    yield from bake_in_pieces(edit_parameter(holder, changes))


def _bias(onto: BaseCheckpoint, changes: Sequence[Change]) -> Iterator[Tensor]:
    site = changes[0].site
    holder = onto.holder(site)
    if all(isinstance(change, Shift) for change in changes):  # then nobody else looks at the matrix
        check_same_matrix(onto.subject, site, holder, onto.files.name)
    bias = edit_biases(holder, changes)
    assert bias is not None, "asked for only where there is one"
    yield bias.to(holder.get_parameter(site.bias if has_bias(holder, site) else site.weight).dtype)


# ---------------------------------------------------------------------------- experts stored one by one
Filling = Callable[[str], Sequence[Change]]


def _filling(onto: BaseCheckpoint, by_site: Mapping[str, Sequence[Change]]) -> Filling:
    """The changes of a stack, by its parameter, with the mean of blends' donors: only the last stack's is held, and
    files have a stack's matrices in a row."""

    def whole(name: str) -> Sequence[Change]:
        return fill_donor_means_from(by_site[name], partial(_expert, onto), lambda site: None)

    return lru_cache(maxsize=1)(whole)


def _one_by_one(onto: BaseCheckpoint, changes: Sequence[Change], filling: Filling) -> Mapping[str, Pieces]:
    """Of a reading stack stored in parts, each part by itself: its outputs are edited each alone."""
    made: dict[str, Pieces] = {}
    for expert, keys in enumerate(onto.experts(changes[0].site)):
        site = replace(changes[0].site, expert=expert)
        if select_changes(changes, site):
            made |= {key: partial(_new_expert, onto, filling, site, key) for key in keys}
    return made


def _expert(onto: BaseCheckpoint, site: Site) -> Tensor:
    """One expert's matrix, as `read_weight` gives it."""
    assert site.expert is not None, "a donor is one expert"
    (key,) = onto.experts(site)[site.expert]
    return read_weight(*_alone(onto.files.tensor(key), site))


def _alone(matrix: Tensor, site: Site) -> tuple[nn.Module, Site]:
    """A stack of this one matrix, and its site."""
    made = nn.Module()
    made.register_parameter(site.weight, nn.Parameter(matrix[None], requires_grad=False))
    return made, replace(site, expert=0)


def _new_expert(onto: BaseCheckpoint, filling: Filling, site: Site, key: str) -> Iterator[Tensor]:
    matrix = onto.files.tensor(key)
    before = onto.experts(site)[site.expert or 0]
    start = sum(len(onto.files.like(other)) for other in before[: before.index(key)])
    check_same_expert(onto.subject, site, matrix, start, onto.files.name)
    holder, alone = _alone(matrix, site)
    mine = [replace(change, site=alone) for change in select_changes(filling(site.parameter), site)]
    yield convert_to_stored(edit_module_weight(holder, mine), alone, matrix)
