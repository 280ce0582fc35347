"""Permanent steering: a plan adds one vector to the residual stream at every token, and the saved model keeps it."""

from __future__ import annotations

from collections.abc import Sequence

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.settings import expand_part
from obliteratus.core.types import Activations, Directions, Edit, Shift, Subject
from obliteratus.excise.writers import can_hold_anchors


def make_shift_where_possible(
    subject: Subject, edits: Sequence[Edit], directions: Directions, acts: Activations, amount: float
) -> list[Shift]:
    """Return the shift of `make_shift` at the best layer whose saved weights can hold it, or none, and say so."""
    edited = [e for e in edits if e.site.part in expand_part("mlp.out")]
    able = [e for e in edited if e.site.gain is None and can_hold_anchors(subject, [e.site])]
    if not able:
        note("steer", "no edited MLP of this model can hold a constant in a bias: nothing is added to the stream")
        return []
    return [make_shift(able, directions, acts, amount)]


def make_shift(edits: Sequence[Edit], directions: Directions, acts: Activations, amount: float) -> Shift:
    """Return a shift by −amount × the groups' mean difference along the directions, at the best-scored edited layer.

    That layer's MLP writes it, as a bias (arXiv:2308.10248, arXiv:2312.06681). Raises UserError if no MLP is edited or
    if a norm stands between the MLP and the stream: it would rescale the shift differently at each token.
    """
    sites = [e.site for e in edits if e.site.part in expand_part("mlp.out")]
    if not sites:
        raise UserError("excise.steer: no MLP is edited, so there is no layer to steer at; widen the weigh steps")
    site = max(sites, key=lambda s: float(directions.score[s.stream]))
    if site.gain is not None:
        raise UserError(
            f"excise.steer: a norm stands between {site.path} and the stream, so no constant shift can be added "
            "there; set steer=0"
        )
    rows = directions.basis[site.stream]
    delta = acts["target"].mean[site.stream] - acts["control"].mean[site.stream]
    along = rows if directions.covectors is None else directions.covectors[site.stream]
    return Shift(site, -amount * (along @ delta) @ rows)
