"""A plan made on a quantised model, baked into the full-precision checkpoint that it was quantised from: file by file,
tensor by tensor, so that no model is built from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from obliteratus.errors import UserError
from obliteratus.excise.bake import bias_switches
from obliteratus.excise.change import bias_after, changed, needs_bias, needs_weight
from obliteratus.excise.packed import Lazy, Once
from obliteratus.excise.plan import check_fits
from obliteratus.summon.checkpoint import Checkpoint, open_checkpoint
from obliteratus.summon.codec import read_weight, stored
from obliteratus.summon.files import INDEX
from obliteratus.summon.quantised import differing, is_packed, near
from obliteratus.types import Change, Plan, Site, Subject

NO_BASE = "none"
# Two roundings of one plain tensor, by way of bf16 and of fp16, differ by less than this share of a value.
ROUNDING = 2.0**-7


def base_of(subject: Subject, base: str = "") -> Checkpoint | None:
    """The full-precision checkpoint to bake into: ``base`` (folder, organism:NAME, hub id), else the one that the model
    was quantised from on loading; None for ``none``, where neither is known, or the model is not quantised.

    UserError where ``base`` is no full-precision checkpoint of this model, as far as can be seen before baking: the
    first packed matrix is compared.
    """
    packed = [site for site in subject.sites if is_packed(subject.module(site.path))]
    if base and not packed:
        raise UserError(f"--base {base}: {subject.source.id} is not quantised, and is edited itself; leave --base out")
    name = base or subject.source.base
    if not packed or not name or name == NO_BASE:
        return None
    known = open_checkpoint(name, subject.model, "" if base else subject.source.revision)
    _holder(subject, known, packed[0].path, None)
    return known


def write_onto(
    subject: Subject, plan: Plan, base: Checkpoint, folder: Path, tied: tuple[str, str] | None
) -> dict[str, Any]:
    """Weights and configuration of the edited full-precision model, in ``folder``; returns what run.json says of it.

    tied: parameter names of embedding and head where they share their storage. UserError where a matrix is not the one
    that was quantised, or is not stored under its own name.
    """
    check_fits(subject, plan)
    config, switches = deepcopy(base.config), bias_switches(subject, plan)
    for key in switches.values():
        setattr(config, key, True)
    tensors: dict[str, Lazy] = {name: partial(base.tensor, name) for names in base.shards.values() for name in names}
    tensors |= _biases(subject, base, switches)
    if tied is not None and any(f"{path}.weight" in tied for path in plan.by_site()):
        config.tie_word_embeddings = False
        tensors.setdefault(tied[1], partial(_tensor, base, tied[0]))
    for path, changes in plan.by_site().items():
        tensors |= _edited(subject, base, path, changes, tied)
    _write(base, tensors, folder)
    config.save_pretrained(folder)
    return {"base": base.name}


def _biases(subject: Subject, base: Checkpoint, halves: dict[str, str]) -> dict[str, Lazy]:
    """Zeros for every site that a switch gives a bias."""
    sites = [s for s in subject.sites if s.part.partition(".")[0] in halves]
    found: dict[str, Lazy] = {}
    for site in sites:
        key = _key(base, site.path, None)
        shape = base.shape(key)
        rows = shape[0 if site.layout == "linear" else 1]
        found[_bias(key)] = partial(torch.zeros, rows, dtype=base.tensor(key).dtype)
    return found


def _edited(
    subject: Subject, base: Checkpoint, path: str, changes: Sequence[Change], tied: tuple[str, str] | None
) -> dict[str, Lazy]:
    """The edited matrix, and its bias if it has one or gets one, by their names in the files."""
    key = base.key(f"{path}.weight") or f"{path}.weight"  # a tied head gets a name of its own
    names = [key]
    if base.key(f"{path}.bias") or any(needs_bias(c) for c in changes):
        names.append(_bias(key))

    def make() -> dict[str, Tensor]:
        holder, site = _holder(subject, base, path, tied), changes[0].site
        weight = read_weight(holder, site)
        bias = bias_after(holder, changes, weight if needs_weight(changes) else None)
        for change in changes:
            weight = changed(change, weight)
        made = {key: stored(weight, site, holder.get_parameter("weight"))}
        return made if bias is None else made | {_bias(key): bias.to(made[key].dtype)}

    once = Once(make)
    return {name: partial(once.take, name) for name in names}


def _holder(subject: Subject, base: Checkpoint, path: str, tied: tuple[str, str] | None) -> nn.Module:
    """A module with the full-precision weight and bias. UserError where it is not what was quantised."""
    key = _key(base, path, tied)
    holder = nn.Module()
    holder.weight = nn.Parameter(base.tensor(key), requires_grad=False)
    if bias := base.key(f"{path}.bias"):
        holder.bias = nn.Parameter(base.tensor(bias), requires_grad=False)
    site = next(site for site in subject.sites if site.path == path)
    _check_same(base, site, read_weight(holder, site), subject)
    return holder


def _check_same(base: Checkpoint, site: Site, weight: Tensor, subject: Subject) -> None:
    module = subject.module(site.path)
    if is_packed(module):
        share = differing(weight.to(subject.device), module)
        if share <= near(module):
            return
        raise UserError(
            f"{base.name}: {site.path} is not what was quantised ({share:.1%} of its codes differ); give the "
            f"model's own base, or --base {NO_BASE} to unpack, edit and pack again"
        )
    if not torch.allclose(read_weight(module, site).cpu(), weight, rtol=ROUNDING, atol=1e-6):  # 1e-6: fp16's subnormals
        raise UserError(f"{base.name}: {site.path} differs from that of {subject.source.id}; give the model's own base")


def _key(base: Checkpoint, path: str, tied: tuple[str, str] | None) -> str:
    name = f"{path}.weight"
    key = base.key(name) or (base.key(tied[0]) if tied is not None and name == tied[1] else None)
    if key is None:
        raise UserError(
            f"{base.name}: stores no {name} under that name, so its files cannot be edited one by one; "
            f"give --base {NO_BASE}, or --save adapter"
        )
    return key


def _tensor(base: Checkpoint, parameter: str) -> Tensor:
    key = base.key(parameter)
    assert key is not None, "a tied table is stored under its own name"
    return base.tensor(key)


def _bias(key: str) -> str:
    return f"{key.removesuffix('weight')}bias"


def _write(base: Checkpoint, tensors: dict[str, Lazy], folder: Path) -> None:
    """The base's own files; what is new goes into the last one."""
    known = {name for names in base.shards.values() for name in names}
    added = [name for name in tensors if name not in known]
    places: dict[str, str] = {}
    last = list(base.shards)[-1]
    for file, names in base.shards.items():
        members = [*names, *(added if file == last else [])]
        save_file({n: tensors[n]().contiguous() for n in members}, folder / file.name, metadata={"format": "pt"})
        places |= dict.fromkeys(members, file.name)
    if len(base.shards) > 1:
        total = sum((folder / file.name).stat().st_size for file in base.shards)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
