"""Permanent steering: one vector added to the stream for every token, in the plan and saved with the model."""

from __future__ import annotations

from collections.abc import Sequence

from obliteratus.core.errors import UserError
from obliteratus.core.settings import expand_part
from obliteratus.core.types import Activations, Directions, Edit, Shift


def make_shift(edits: Sequence[Edit], directions: Directions, acts: Activations, amount: float) -> Shift:
    """−amount × the groups' mean difference along the directions, at the clearest layer that is edited.

    Written by that layer's MLP, whose bias it becomes (arXiv:2308.10248, arXiv:2312.06681). Raises UserError where a
    norm stands between the MLP and the stream: what is added before a norm does not arrive as it was added.
    """
    places = [e.site for e in edits if e.site.part in expand_part("mlp.out")]
    if not places:
        raise UserError("excise.steer: no MLP is edited, so there is no layer to steer at; widen the weigh steps")
    site = max(places, key=lambda s: float(directions.score[s.stream]))
    if site.gain is not None:
        raise UserError(
            f"excise.steer: a norm stands between {site.path} and the stream, which no constant passes; set steer=0"
        )
    rows = directions.basis[site.stream]
    delta = acts["target"].mean[site.stream] - acts["control"].mean[site.stream]
    along = rows if directions.covectors is None else directions.covectors[site.stream]
    return Shift(site, -amount * (along @ delta) @ rows)
