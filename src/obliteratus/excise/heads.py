"""Head surgery: an edit of attention's output restricted to the heads that write most along the directions."""

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
    """‖Q W[:, head]‖_F for each head: what the edit would take from it, in the weight's own unit.

    Heads are equal runs of columns, in order; with grouped queries they are the query heads, and a head's size
    need not be width / heads. The weight alone is asked, not how much each head is used.
    """
    along = (basis @ weight).reshape(len(basis), heads, -1)
    taken: Tensor = torch.linalg.vector_norm(along, dim=(0, 2))
    return taken


def split_by_head(subject: Subject, edits: Sequence[Edit], share: float) -> tuple[Edit, ...]:
    """Each edit of an attention output as one edit for each of its top ``share`` of heads; the others as they are, and
    so those of what stands in attention's place in some blocks of a hybrid.

    Attribution is of the model's own weights, also where earlier passes have edits on the same site.
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
            f"{edit.site.path} has {weight.shape[1]} inputs, which {heads} heads cannot share; leave excise.heads out"
        )
    order = attribute_to_heads(weight, edit.along.to(weight), heads).argsort(descending=True, stable=True)
    kept = sorted(order[: max(1, round(share * heads))].tolist())
    return tuple(replace(edit, site=replace(edit.site, span=(h * size, (h + 1) * size))) for h in kept)
