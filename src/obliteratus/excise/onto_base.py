"""A plan made on a quantised model, baked into the full-precision checkpoint that it was quantised from: file by file,
tensor by tensor, so that no model is built from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from obliteratus.errors import UserError
from obliteratus.excise.bake import bias_switches
from obliteratus.excise.change import bias_after, changed, needs_bias, needs_weight
from obliteratus.excise.packed import Lazy, Once
from obliteratus.excise.plan import check_fits
from obliteratus.summon.checkpoint import Checkpoint, open_checkpoint
from obliteratus.summon.codec import read_weight, stored
from obliteratus.summon.quantised import differing, is_packed, near
from obliteratus.summon.shards import write_index, write_shard
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
    _holder(subject, known, packed[0], None)
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
    added = _biases(subject, base, switches)
    tensors: dict[str, Lazy] = {name: partial(torch.zeros, x.shape, dtype=x.dtype) for name, x in added.items()}
    if tied is not None and any(name in tied for name in plan.by_site()):
        config.tie_word_embeddings = False
        if base.key(tied[1]) is None:
            tensors[tied[1]] = partial(_tensor, base, tied[0])
            added[tied[1]] = tensors[tied[1]]().to("meta")
    for changes in plan.by_site().values():
        tensors |= _edited(subject, base, changes, tied)
    _write(base, tensors, added, folder)
    config.save_pretrained(folder)
    return {"base": base.name}


def _biases(subject: Subject, base: Checkpoint, halves: dict[str, str]) -> dict[str, Tensor]:
    """For every site that a switch gives a bias, its shape and dtype."""
    sites = [s for s in subject.sites if s.part.partition(".")[0] in halves]
    found: dict[str, Tensor] = {}
    for site in sites:
        key = _key(base, site, None)
        found[_bias(key)] = base.like(key)[:, 0] if site.layout == "linear" else base.like(key)[0]
    return found


def _edited(
    subject: Subject, base: Checkpoint, changes: Sequence[Change], tied: tuple[str, str] | None
) -> dict[str, Lazy]:
    """The edited matrix, and its bias if it has one or gets one, by their names in the files."""
    site = changes[0].site
    key = base.key(site.parameter) or site.parameter  # a tied head gets a name of its own
    names = [key]
    if base.key(f"{site.path}.bias") or any(needs_bias(c) for c in changes):
        names.append(_bias(key))

    def make() -> dict[str, Tensor]:
        holder = _holder(subject, base, site, tied)
        weight = read_weight(holder, site)
        bias = bias_after(holder, changes, weight if needs_weight(changes) else None)
        for change in changes:
            weight = changed(change, weight)
        made = {key: stored(weight, site, holder.get_parameter(site.weight))}
        return made if bias is None else made | {_bias(key): bias.to(made[key].dtype)}

    once = Once(make)
    return {name: partial(once.take, name) for name in names}


def _holder(subject: Subject, base: Checkpoint, site: Site, tied: tuple[str, str] | None) -> nn.Module:
    """A module with the full-precision weight and bias. UserError where it is not what was quantised."""
    key = _key(base, site, tied)
    holder = nn.Module()
    holder.register_parameter(site.weight, nn.Parameter(base.tensor(key), requires_grad=False))
    if bias := base.key(f"{site.path}.bias"):
        holder.bias = nn.Parameter(base.tensor(bias), requires_grad=False)
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


def _key(base: Checkpoint, site: Site, tied: tuple[str, str] | None) -> str:
    name = site.parameter
    key = base.key(name) or (base.key(tied[0]) if tied is not None and name == tied[1] else None)
    if key is None or site.stacked:
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


def _write(base: Checkpoint, tensors: Mapping[str, Lazy], added: Mapping[str, Tensor], folder: Path) -> None:
    """The base's own files; what is new goes into the last one. One tensor is in memory at a time."""
    places: dict[str, str] = {}
    last = list(base.shards)[-1]
    for file, names in base.shards.items():
        like = {name: base.like(name) for name in names} | (dict(added) if file == last else {})
        made = {name: tensors.get(name, partial(base.tensor, name)) for name in like}
        write_shard(folder / file.name, like, {name: partial(_whole, make) for name, make in made.items()})
        places |= dict.fromkeys(like, file.name)
    if len(base.shards) > 1:
        write_index(folder, places, sum((folder / file.name).stat().st_size for file in base.shards))


def _whole(make: Lazy) -> list[Tensor]:
    return [make()]
