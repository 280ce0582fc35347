"""A model and a checkpoint's own files that its plan can be baked onto: those that it was loaded from, or the
full-precision ones that it was quantized from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from obliteratus.core.errors import UserError
from obliteratus.core.types import Plan, Site, Subject
from obliteratus.excise.bake.check_base import check_same_matrix
from obliteratus.excise.bake.tensors import find_bias_switches
from obliteratus.excise.plan import check_fits
from obliteratus.weights.bitsandbytes import is_packed
from obliteratus.weights.checkpoint import Checkpoint, open_checkpoint, find_own_checkpoint
from obliteratus.weights.matrices import has_bias

NO_BASE = "none"


def find_base_checkpoint(subject: Subject, base: str = "") -> Checkpoint | None:
    """The checkpoint whose files ``merged`` is baked onto: ``base`` (folder, organism:NAME, hub id), or the one that a
    quantized model was quantized from on loading, or a plain model's own; None where there is none, or for ``none``.

    UserError where ``base`` is no full-precision checkpoint of this model, as far as can be seen before baking: the
    first packed matrix is compared. Or where files are missing or cut short.
    """
    packed = [site for site in subject.sites if is_packed(subject.module(site.path))]
    if base and not packed:
        raise UserError(f"--base {base}: {subject.source.id} is not quantized, and is edited itself; leave --base out")
    if not packed:
        return find_own_checkpoint(subject)
    name = base or subject.source.base
    if not name or name == NO_BASE:
        return None
    known = open_checkpoint(name, subject.model, "" if base else subject.source.revision)
    onto = BaseCheckpoint(subject, known)
    if why := onto.why_not(packed[0]):
        raise UserError(f"{name}: {why}; {_OTHERWISE}")
    check_same_matrix(subject, packed[0], onto.holder(packed[0]), name)
    return known


_OTHERWISE = f"give --base {NO_BASE}, or --save adapter"


@dataclass(frozen=True)
class BaseCheckpoint:
    """A model, and the files that its plan is baked onto."""

    subject: Subject
    files: Checkpoint
    tied: tuple[str, str] | None = None
    """Parameter names of embedding and head, where they share their storage."""

    @property
    def quantized(self) -> bool:
        """Whether the model is, and these are the full-precision files that stand for it."""
        return bool(self.subject.source.quantization)

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
        assert key is not None, "`explain_unbakeable` comes first"
        made = nn.Module()
        made.register_parameter(site.weight, nn.Parameter(self.files.tensor(key), requires_grad=False))
        if bias is not None:
            made.register_parameter(site.bias, nn.Parameter(self.files.tensor(bias), requires_grad=False))
        return made


def explain_unbakeable(onto: BaseCheckpoint, plan: Plan) -> str:
    """Why a plan cannot be baked onto these files, so that the model must be written from memory; empty where it can.
    UserError where a tensor is stored in a dtype that cannot be edited, or the plan cannot be merged at all."""
    check_fits(onto.subject, plan)
    sites = [*find_new_bias_sites(onto.subject, plan), *(changes[0].site for changes in plan.by_site().values())]
    for site in sites:
        why = onto.why_not(site)
        if why and onto.quantized:
            raise UserError(f"{onto.files.name}: {why}; {_OTHERWISE}")
        if why:
            return why
        apart = onto.experts(site)
        for key in [key for keys in apart for key in keys] or [str(onto.source(site.parameter))]:
            onto.files.like(key)
        for name, key in _names(onto, site):
            if not apart and not onto.leads_to(key, name):
                return f"there is no name under which {name} could be stored"
    return ""


def _names(onto: BaseCheckpoint, site: Site) -> list[tuple[str, str]]:
    """Parameters that may have to be added for a site, and the names that they would be stored under."""
    head = [(onto.tied[1], onto.target(onto.tied[1]))] if onto.tied and site.parameter in onto.tied else []
    return [(f"{site.path}.{site.bias}", onto.bias(site)), *head]


def find_new_bias_sites(subject: Subject, plan: Plan) -> list[Site]:
    """Sites that get a bias because their half of the block does."""
    halves = find_bias_switches(subject, plan)
    return [site for site in subject.sites if site.part.partition(".")[0] in halves]
