"""Whether files hold the numbers that a model in memory was made from: asked of every matrix before it is edited."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from obliteratus.core.errors import UserError
from obliteratus.core.types import Site, Subject
from obliteratus.weights.bitsandbytes import differing_codes, is_packed, same_matrix_limit
from obliteratus.weights.matrices import read_weight

# Two roundings of one plain tensor, by way of bf16 and of fp16, differ by less than this share of a value.
ROUNDING = 2.0**-7
SUBNORMAL = 1e-6  # below it fp16's numbers are further apart than that share
CHUNK = 1 << 20  # values compared at once: 4 MB in fp32, so that comparing holds no second matrix


def check_same_matrix(subject: Subject, site: Site, holder: nn.Module, name: str) -> None:
    """UserError unless the stored matrix in ``holder`` is that of the model; name: of the checkpoint."""
    module = subject.module(site.path)
    if not is_packed(module):
        _check(subject, site, module.get_parameter(site.weight), holder.get_parameter(site.weight), name)
        return
    share = differing_codes(read_weight(holder, site).to(subject.device), module)
    if share > same_matrix_limit(module):
        raise UserError(
            f"{name}: {site.path} is not what was quantized ({share:.1%} of its codes differ); give the model's own "
            "base, or --base none to unpack, edit and pack again"
        )


def check_same_expert(subject: Subject, site: Site, part: Tensor, start: int, name: str) -> None:
    """The same of one expert's matrix, or a part of it that begins at the output ``start``."""
    stack = subject.module(site.path).get_parameter(site.weight)
    _check(subject, site, stack[site.expert, start : start + len(part)], part, name)


def _check(subject: Subject, site: Site, mine: Tensor, theirs: Tensor, name: str) -> None:
    if mine.is_meta or _same(mine, theirs, exact=not subject.source.quantization):  # meta: it stayed on disk
        return
    if subject.source.quantization:
        raise UserError(f"{name}: {site.path} differs from that of {subject.source.id}; give the model's own base")
    raise UserError(
        f"{name}: {site.parameter} is not what was loaded: its file was altered, or the model was changed in memory; "
        "restore the file, load the model again and run it again"
    )


def _same(mine: Tensor, theirs: Tensor, exact: bool) -> bool:
    if mine.shape != theirs.shape:
        return False
    rows = max(1, CHUNK * len(mine) // max(mine.numel(), 1))
    parts = ((one.cpu(), other.to(one.dtype)) for one, other in zip(mine.split(rows), theirs.split(rows), strict=True))
    if exact:  # loading casts once, so the same cast gives the same bits
        return all(torch.equal(one, other) for one, other in parts)
    return all(torch.allclose(one.float(), other.float(), rtol=ROUNDING, atol=SUBNORMAL) for one, other in parts)
