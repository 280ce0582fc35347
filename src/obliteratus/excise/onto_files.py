"""A plan baked onto a checkpoint's own files, tensor by tensor: those that the model was loaded from, or the
full-precision ones that it was quantised from. No model is built, and what the plan does not touch stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from obliteratus.errors import UserError
from obliteratus.excise.bake import bias_switches, new_biases, new_matrix, pieces
from obliteratus.excise.change import at, filled_by, needs_bias, new_weight
from obliteratus.excise.plan import check_fits
from obliteratus.excise.same import check_expert, check_same
from obliteratus.summon.checkpoint import Checkpoint, open_checkpoint, own_checkpoint
from obliteratus.summon.codec import has_bias, read_weight, stored
from obliteratus.summon.quantised import is_packed
from obliteratus.summon.shards import Pieces
from obliteratus.types import Change, Plan, Shift, Site, Subject

NO_BASE = "none"


def files_of(subject: Subject, base: str = "") -> Checkpoint | None:
    """The checkpoint whose files ``merged`` is baked onto: ``base`` (folder, organism:NAME, hub id), or the one that a
    quantised model was quantised from on loading, or a plain model's own; None where there is none, or for ``none``.

    UserError where ``base`` is no full-precision checkpoint of this model, as far as can be seen before baking: the
    first packed matrix is compared. Or where files are missing or cut short.
    """
    packed = [site for site in subject.sites if is_packed(subject.module(site.path))]
    if base and not packed:
        raise UserError(f"--base {base}: {subject.source.id} is not quantised, and is edited itself; leave --base out")
    if not packed:
        return own_checkpoint(subject)
    name = base or subject.source.base
    if not name or name == NO_BASE:
        return None
    known = open_checkpoint(name, subject.model, "" if base else subject.source.revision)
    onto = Onto(subject, known)
    if why := onto.why_not(packed[0]):
        raise UserError(f"{name}: {why}; {_OTHERWISE}")
    check_same(subject, packed[0], onto.holder(packed[0]), name)
    return known


_OTHERWISE = f"give --base {NO_BASE}, or --save adapter"


@dataclass(frozen=True)
class Onto:
    """A model, and the files that its plan is baked onto."""

    subject: Subject
    files: Checkpoint
    tied: tuple[str, str] | None = None
    """Parameter names of embedding and head, where they share their storage."""

    def source(self, parameter: str) -> str | None:
        """The stored tensor that holds the parameter's numbers: of a tied head, that of the embedding."""
        tied = self.tied[0] if self.tied is not None and parameter == self.tied[1] else parameter
        return self.files.key(parameter) or self.files.key(tied)

    def target(self, parameter: str) -> str:
        """The stored name that the parameter has or gets."""
        return self.files.key(parameter) or parameter

    def bias(self, site: Site) -> str:
        """The same of the site's bias: beside its matrix, under the name that loading finds it by."""
        parameter = f"{site.path}.{site.bias}"
        beside = f"{self.target(site.parameter).removesuffix(site.weight)}{site.bias}"
        found = self.files.key(parameter)
        return found or (beside if self.leads_to(beside, parameter) else parameter)

    def leads_to(self, key: str, parameter: str) -> bool:
        """Whether a tensor stored under ``key`` is loaded as the parameter, which the model may not have yet."""
        return self.files.naming.parameter(key, (parameter,)) == (parameter, "")

    def experts(self, site: Site) -> Sequence[tuple[str, ...]]:
        """The stored names of a stack's matrices; none where the stack is stored whole."""
        found = self.files.where.get(site.parameter)
        return found.experts if found else ()

    def why_not(self, site: Site) -> str:
        """Why what is at a site cannot be edited in the files; empty where it can."""
        apart = self.experts(site)
        if self.source(site.parameter) is None and not apart:
            return f"{site.parameter} is stored in another form, so the files cannot be edited one by one"
        if apart and (has_bias(self.subject.module(site.path), site) or (len(apart[0]) > 1 and site.role == "writes")):
            return f"{site.parameter} is stored in parts that cannot be edited one by one"
        return ""

    def holder(self, site: Site) -> nn.Module:
        """A module with the stored matrix and bias: views of the files, which are read as they are looked at."""
        key, bias = self.source(site.parameter), self.files.key(f"{site.path}.{site.bias}")
        assert key is not None, "`why_not` comes first"
        made = nn.Module()
        made.register_parameter(site.weight, nn.Parameter(self.files.tensor(key), requires_grad=False))
        if bias is not None:
            made.register_parameter(site.bias, nn.Parameter(self.files.tensor(bias), requires_grad=False))
        return made


@dataclass
class Edits:
    """What becomes of a checkpoint's tensors, by their stored names."""

    tensors: dict[str, Pieces]
    """New numbers, each computed when it is to be written."""
    added: dict[str, Tensor]
    """Shape and dtype of those that are not there yet."""
    config: dict[str, bool]
    """What the configuration must say."""


def why_not(onto: Onto, plan: Plan) -> str:
    """Why a plan cannot be baked onto these files, so that the model must be written from memory; empty where it can.
    UserError where a tensor is stored in a dtype that cannot be edited, or the plan cannot be merged at all."""
    check_fits(onto.subject, plan)
    sites = [*_switched(onto.subject, plan), *(changes[0].site for changes in plan.by_site().values())]
    for site in sites:
        if why := onto.why_not(site):
            return why
        keys = [key for keys in onto.experts(site) for key in keys] or [onto.source(site.parameter)]
        for key in keys:
            onto.files.like(str(key))
        if not onto.experts(site) and not onto.leads_to(onto.bias(site), f"{site.path}.{site.bias}"):
            return f"there is no name under which {site.path}.{site.bias} could be stored"
    return ""


def _switched(subject: Subject, plan: Plan) -> list[Site]:
    """Sites that get a bias because their half of the block does."""
    halves = bias_switches(subject, plan)
    return [site for site in subject.sites if site.part.partition(".")[0] in halves]


def edits_of(onto: Onto, plan: Plan) -> Edits:
    """All that a plan changes, if `why_not` does not speak against it."""
    made = Edits({}, {}, dict.fromkeys(bias_switches(onto.subject, plan).values(), True))
    for site in _switched(onto.subject, plan):
        _add_bias(onto, site, made)
    if onto.tied is not None and any(name in onto.tied for name in plan.by_site()):
        _part(onto, onto.tied, made)
    filling = _filling(onto, plan.by_site())
    for changes in plan.by_site().values():
        apart = onto.experts(changes[0].site)
        made.tensors |= _one_by_one(onto, changes, filling) if apart else _edited(onto, changes)
    return made


def _add_bias(onto: Onto, site: Site, made: Edits) -> None:
    key = onto.source(site.parameter)
    like, name = onto.files.like(str(key)), onto.bias(site)
    if not onto.files.holds(name):
        made.added[name] = like[:, 0] if site.layout == "linear" else like[0]
        made.tensors[name] = partial(_zeros, made.added[name])


def _zeros(like: Tensor) -> Iterator[Tensor]:
    yield torch.zeros(like.shape, dtype=like.dtype)


def _part(onto: Onto, tied: tuple[str, str], made: Edits) -> None:
    """Embedding and head part, for the plan edits one: the other stays as it was."""
    made.config["tie_word_embeddings"] = False
    source, head = onto.source(tied[0]), onto.target(tied[1])
    if source is not None and not onto.files.holds(head):
        made.added[head] = onto.files.like(source)
        made.tensors[head] = partial(_as_stored, onto.files, source)


def _as_stored(files: Checkpoint, key: str) -> Iterator[Tensor]:
    yield files.tensor(key)


def _edited(onto: Onto, changes: Sequence[Change]) -> Mapping[str, Pieces]:
    """The edited matrix, and its bias if it has one or gets one."""
    site = changes[0].site
    made: dict[str, Pieces] = {}
    if not all(isinstance(change, Shift) for change in changes):
        made[onto.target(site.parameter)] = partial(_matrix, onto, changes)
    if onto.files.key(f"{site.path}.{site.bias}") or any(map(needs_bias, changes)):
        made[onto.bias(site)] = partial(_bias, onto, changes)
    return made


def _matrix(onto: Onto, changes: Sequence[Change]) -> Iterator[Tensor]:
    """Edited in fp32 as it is stored, and rounded once to the stored dtype: that of the loaded model may be coarser, and
    an edit of what was rounded before would round twice; or finer, and the file would grow without saying more."""
    site = changes[0].site
    holder = onto.holder(site)
    check_same(onto.subject, site, holder, onto.files.name)
    yield from pieces(new_matrix(holder, changes))


def _bias(onto: Onto, changes: Sequence[Change]) -> Iterator[Tensor]:
    site = changes[0].site
    holder = onto.holder(site)
    if all(isinstance(change, Shift) for change in changes):  # then nobody else looks at the matrix
        check_same(onto.subject, site, holder, onto.files.name)
    bias = new_biases(holder, changes)
    assert bias is not None, "asked for only where there is one"
    yield bias.to(holder.get_parameter(site.bias if has_bias(holder, site) else site.weight).dtype)


# ---------------------------------------------------------------------------- experts stored one by one
Filling = Callable[[str], Sequence[Change]]


def _filling(onto: Onto, by_site: Mapping[str, Sequence[Change]]) -> Filling:
    """The changes of a stack, by its parameter, with the mean of blends' donors: only the last stack's is held, and
    files have a stack's matrices in a row."""

    def whole(name: str) -> Sequence[Change]:
        return filled_by(by_site[name], partial(_expert, onto), lambda site: None)

    return lru_cache(maxsize=1)(whole)


def _one_by_one(onto: Onto, changes: Sequence[Change], filling: Filling) -> Mapping[str, Pieces]:
    """Of a reading stack stored in parts, each part by itself: its outputs are edited each alone."""
    made: dict[str, Pieces] = {}
    for expert, keys in enumerate(onto.experts(changes[0].site)):
        site = replace(changes[0].site, expert=expert)
        if at(changes, site):
            made |= {key: partial(_new_expert, onto, filling, site, key) for key in keys}
    return made


def _expert(onto: Onto, site: Site) -> Tensor:
    """One expert's matrix, as `read_weight` gives it."""
    assert site.expert is not None, "a donor is one expert"
    (key,) = onto.experts(site)[site.expert]
    return read_weight(*_alone(onto.files.tensor(key), site))


def _alone(matrix: Tensor, site: Site) -> tuple[nn.Module, Site]:
    """A stack of this one matrix, and its site."""
    made = nn.Module()
    made.register_parameter(site.weight, nn.Parameter(matrix[None], requires_grad=False))
    return made, replace(site, expert=0)


def _new_expert(onto: Onto, filling: Filling, site: Site, key: str) -> Iterator[Tensor]:
    matrix = onto.files.tensor(key)
    before = onto.experts(site)[site.expert or 0]
    start = sum(len(onto.files.like(other)) for other in before[: before.index(key)])
    check_expert(onto.subject, site, matrix, start, onto.files.name)
    holder, alone = _alone(matrix, site)
    mine = [replace(change, site=alone) for change in at(filling(site.parameter), site)]
    yield stored(new_weight(holder, mine), alone, matrix)
