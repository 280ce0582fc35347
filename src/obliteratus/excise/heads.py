"""Edits of the attention output restricted to the heads that write most along the directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from obliteratus.core.errors import UnsupportedModelError
from obliteratus.core.shapes import Float
from obliteratus.core.types import Edit, Subject
from obliteratus.summon.sites import find_architecture, has_heads
from obliteratus.weights.matrices import read_weight


def attribute_to_heads(
    weight: Float[Tensor, "out in"], basis: Float[Tensor, "k out"], heads: int
) -> Float[Tensor, " heads"]:
    """Return ‖Q W[:, head]‖_F for each head: what the edit would remove from it, in the unit of the weight.

    Heads are equal runs of columns, in order; under grouped-query attention these are the query heads, and a head's
    size need not be width / heads. The score reads the weight alone, not how active each head is.
    """
    along = (basis @ weight).reshape(len(basis), heads, -1)
    removed: Tensor = torch.linalg.vector_norm(along, dim=(0, 2))
    return removed


def split_by_head(subject: Subject, edits: Sequence[Edit], share: float) -> tuple[Edit, ...]:
    """Replace each edit of an attention output by one edit for each of its top ``share`` of heads; others stay.

    Mixers of a hybrid model that are not attention have no heads and stay whole. Heads are scored on the model's
    unedited weights, also after earlier passes. Raises UnsupportedModelError if heads do not divide the inputs.
    """
    family = find_architecture(subject.model.config)
    parts = ((_split(subject, e, share) if has_heads(family, e.site) else (e,)) for e in edits)
    return tuple(edit for part in parts for edit in part)


def _split(subject: Subject, edit: Edit, share: float) -> tuple[Edit, ...]:
    weight = read_weight(subject.module(edit.site.path), edit.site)
    heads = int(subject.model.config.get_text_config().num_attention_heads)
    size, rest = divmod(weight.shape[1], heads)
    if rest:
        raise UnsupportedModelError(
            f"{edit.site.path} has {weight.shape[1]} inputs, not a multiple of {heads} heads; leave excise.heads out"
        )
    order = attribute_to_heads(weight, edit.along.to(weight), heads).argsort(descending=True, stable=True)
    chosen = sorted(order[: max(1, round(share * heads))].tolist())
    return tuple(replace(edit, site=replace(edit.site, span=(h * size, (h + 1) * size))) for h in chosen)
