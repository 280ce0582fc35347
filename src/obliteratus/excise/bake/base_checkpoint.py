"""The checkpoint files that a plan is baked into: the model's own, or the full-precision ones it was quantized from.

Every matrix in them is compared with the model in memory before it is edited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obliteratus.core.errors import UserError
from obliteratus.core.types import Plan, Site, Subject
from obliteratus.excise.bake.tensors import find_bias_switches
from obliteratus.excise.plan import check_fits
from obliteratus.weights.bitsandbytes import differing_codes, is_packed, same_matrix_limit
from obliteratus.weights.checkpoint import Checkpoint, find_own_checkpoint, open_checkpoint
from obliteratus.weights.matrices import has_bias, read_weight

NO_BASE = "none"
_OTHERWISE = f"give --base {NO_BASE}, or --save adapter"


def find_base_checkpoint(subject: Subject, base: str = "") -> Checkpoint | None:
    """Return the checkpoint whose files ``--save merged`` bakes into, or None if all weights come from memory.

    base: of a quantized model, the full-precision checkpoint (folder, organism:NAME or hub id); empty takes the one
    it was quantized from on loading, ``none`` takes no files. Any other model is baked into its own files.

    Raises UserError if ``base`` is not a full-precision checkpoint of this model, as far as the first packed matrix
    tells, or if files are missing or truncated.
    """
    packed = [site for site in subject.sites if is_packed(subject.module(site.path))]
    if base and not packed:
        raise UserError(f"--base {base}: {subject.source.id} is not quantized, and is edited itself; leave --base out")
    if not packed:
        return find_own_checkpoint(subject)
    name = base or subject.source.base
    if not name or name == NO_BASE:
        return None
    files = open_checkpoint(name, subject.model, "" if base else subject.source.revision)
    checkpoint = BaseCheckpoint(subject, files)
    if reason := checkpoint.explain_uneditable(packed[0]):
        raise UserError(f"{name}: {reason}; {_OTHERWISE}")
    checkpoint.check_same_matrix(packed[0], checkpoint.open_matrix(packed[0]))
    return files


@dataclass(frozen=True)
class BaseCheckpoint:
    """A model, and the files that its plan is baked into."""

    subject: Subject
    files: Checkpoint
    tied: tuple[str, str] | None = None
    """Parameter names of embedding and head, if they share their storage."""

    @property
    def quantized(self) -> bool:
        """Whether the model is quantized, so that these files are the full-precision checkpoint behind it."""
        return bool(self.subject.source.quantization)

    # --------------------------------------------------------------------------------------- names
    def find_stored_name(self, parameter: str) -> str | None:
        """Return the stored tensor that holds the parameter's numbers; for a tied head, that of the embedding."""
        tied = self.tied[0] if self.tied is not None and parameter == self.tied[1] else parameter
        return self.files.stored_name(parameter) or self.files.stored_name(tied)

    def choose_stored_name(self, parameter: str) -> str:
        """Return the name that the parameter is stored under, or will be if it is not stored yet."""
        return self.files.stored_name(parameter) or parameter

    def choose_bias_name(self, site: Site) -> str:
        """Return the name that the site's bias is or will be stored under: beside its matrix if it loads from there."""
        parameter = f"{site.path}.{site.bias}"
        beside = f"{self.choose_stored_name(site.parameter).removesuffix(site.weight)}{site.bias}"
        return self.files.stored_name(parameter) or (beside if self.loads_as(beside, parameter) else parameter)

    def loads_as(self, stored: str, parameter: str) -> bool:
        """Return whether a tensor of this stored name loads as the parameter, which the model may not have yet."""
        return self.files.names.parameter_of(stored, (parameter,)) == (parameter, "")

    def find_expert_names(self, site: Site) -> Sequence[tuple[str, ...]]:
        """Return the stored names of each expert's matrix; nothing if the stack is stored as one tensor."""
        stored = self.files.parameters.get(site.parameter)
        return stored.experts if stored else ()

    # ------------------------------------------------------------------------------------- numbers
    def explain_uneditable(self, site: Site) -> str:
        """Return why a site cannot be edited in the files, or an empty string if it can."""
        experts = self.find_expert_names(site)
        if self.find_stored_name(site.parameter) is None and not experts:
            return f"{site.parameter} is stored in another form, so the files cannot be edited one by one"
        in_parts = experts and len(experts[0]) > 1
        if experts and (has_bias(self.subject.module(site.path), site) or (in_parts and site.role == "writes")):
            return f"{site.parameter} is stored in parts that cannot be edited one by one"
        return ""

    def open_matrix(self, site: Site) -> nn.Module:
        """Return a module with the stored matrix and bias as views of the files, read on access."""
        weight, bias = self.find_stored_name(site.parameter), self.files.stored_name(f"{site.path}.{site.bias}")
        assert weight is not None, "`explain_unbakeable` comes first"
        module = nn.Module()
        module.register_parameter(site.weight, nn.Parameter(self.files.read(weight), requires_grad=False))
        if bias is not None:
            module.register_parameter(site.bias, nn.Parameter(self.files.read(bias), requires_grad=False))
        return module

    def check_same_matrix(self, site: Site, stored: nn.Module) -> None:
        """Raise UserError unless the matrix in ``stored`` is the model's own, up to quantization."""
        module = self.subject.module(site.path)
        if not is_packed(module):
            self._check_same(site, module.get_parameter(site.weight), stored.get_parameter(site.weight))
            return
        share = differing_codes(read_weight(stored, site).to(self.subject.device), module)
        if share > same_matrix_limit(module):
            raise UserError(
                f"{self.files.name}: {site.path} differs from the matrix that was quantized ({share:.1%} of its codes "
                f"differ); give the model's own base, or --base {NO_BASE} to requantize"
            )

    def check_same_expert(self, site: Site, part: Tensor, start: int) -> None:
        """Raise UserError unless ``part`` is that of the model's expert which begins at output ``start``."""
        stack = self.subject.module(site.path).get_parameter(site.weight)
        self._check_same(site, stack[site.expert, start : start + len(part)], part)

    def _check_same(self, site: Site, loaded: Tensor, stored: Tensor) -> None:
        quantized = self.quantized
        if loaded.is_meta or _is_same(loaded, stored, exact=not quantized):  # meta: it stayed on disk
            return
        if quantized:
            raise UserError(
                f"{self.files.name}: {site.path} differs from that of {self.subject.source.id}; "
                "give the model's own base"
            )
        raise UserError(
            f"{self.files.name}: {site.parameter} differs from what was loaded: its file was altered, or the model was "
            "changed in memory; restore the file and run again"
        )


# Two roundings of one plain tensor, by way of bf16 and of fp16, differ by less than this share of a value.
ROUNDING = 2.0**-7
SUBNORMAL = 1e-6  # below it fp16's numbers are further apart than that share
CHUNK = 1 << 20  # values compared at once: 4 MB in fp32, so that comparing holds no second matrix


def _is_same(loaded: Tensor, stored: Tensor, exact: bool) -> bool:
    if loaded.shape != stored.shape:
        return False
    rows = max(1, CHUNK * len(loaded) // max(loaded.numel(), 1))
    chunks = ((a.cpu(), b.to(a.dtype)) for a, b in zip(loaded.split(rows), stored.split(rows), strict=True))
    if exact:  # loading casts once, so the same cast gives the same bits
        return all(torch.equal(a, b) for a, b in chunks)
    return all(torch.allclose(a.float(), b.float(), rtol=ROUNDING, atol=SUBNORMAL) for a, b in chunks)


# ------------------------------------------------------------------------------------ a whole plan
def explain_unbakeable(base: BaseCheckpoint, plan: Plan) -> str:
    """Return why a plan cannot be baked into these files but only saved from memory, or an empty string if it can.

    Raises UserError if a tensor is stored in a dtype that cannot be edited, if the plan cannot be merged at all, or
    if the model is quantized: its weights in memory are no substitute for the files.
    """
    check_fits(base.subject, plan)
    sites = [*find_new_bias_sites(base.subject, plan), *(changes[0].site for changes in plan.by_site().values())]
    for site in sites:
        reason = base.explain_uneditable(site)
        if reason and base.quantized:
            raise UserError(f"{base.files.name}: {reason}; {_OTHERWISE}")
        if reason:
            return reason
        experts = base.find_expert_names(site)
        for stored in [name for names in experts for name in names] or [str(base.find_stored_name(site.parameter))]:
            base.files.meta_tensor(stored)
        for parameter, stored in _names_to_add(base, site):
            if not experts and not base.loads_as(stored, parameter):
                return f"there is no name under which {parameter} could be stored"
    return ""


def _names_to_add(base: BaseCheckpoint, site: Site) -> list[tuple[str, str]]:
    """Return parameters that an edit of the site may add, each with the name it would be stored under."""
    head = [(base.tied[1], base.choose_stored_name(base.tied[1]))] if base.tied and site.parameter in base.tied else []
    return [(f"{site.path}.{site.bias}", base.choose_bias_name(site)), *head]


def find_new_bias_sites(subject: Subject, plan: Plan) -> list[Site]:
    """Return the sites that get a bias because the architecture switches biases on for their half of each block."""
    halves = find_bias_switches(subject, plan)
    return [site for site in subject.sites if site.part.partition(".")[0] in halves]
