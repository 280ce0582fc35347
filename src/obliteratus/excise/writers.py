"""Edits of the matrices that write into the residual stream, with norm gains folded in."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

from torch import Tensor

from obliteratus.core.shapes import Float
from obliteratus.core.types import Edit, Plan, Site, Subject
from obliteratus.excise.linear import fold_gain_oblique, fold_gain_orthogonal
from obliteratus.summon.sites import find_architecture, read_gain
from obliteratus.weights.matrices import has_bias

Rows = Float[Tensor, "k width"]


def fold_gain(subject: Subject, site: Site, basis: Rows, covectors: Rows | None = None) -> tuple[Rows, Rows | None]:
    """Return the basis and covectors that a writer must lose so that the stream loses those given.

    They differ only where a norm with gain γ stands between the writer and the stream: then the orthonormal basis
    spans γ⊙basis, and an oblique projection is rescaled on both sides.
    """
    gain = read_gain(subject.model, site)
    if gain is None:
        return basis, covectors
    if covectors is None:
        return fold_gain_orthogonal(basis, gain.to(basis)), None
    along, rescaled = fold_gain_oblique(covectors, basis, gain.to(basis))
    return rescaled, along


def can_hold_anchors(subject: Subject, sites: Iterable[Site]) -> bool:
    """Return whether saved weights can hold an anchored edit at these sites: in a bias that exists or can be added, or
    in an embedding."""
    family = find_architecture(subject.model.config)

    def holds(site: Site) -> bool:
        if site.layout == "embedding":
            return True
        if has_bias(subject.module(site.path), site):
            return family.routing_sums_to_one or not site.stacked
        return site.part.partition(".")[0] in family.bias_switch

    return all(map(holds, sites))


def remove_from_writers(
    subject: Subject, rows: Rows | Callable[[Site], Rows], layers: Container[int] | None = None
) -> Plan:
    """Return the plan under which no writer of these layers writes along the rows. Gradients reach the rows.

    rows: orthonormal, the same for all writers, or a function that returns those of a site. layers: decoder blocks,
    −1 for the embeddings; None means all writers.
    """
    sites = [s for s in subject.sites if s.role == "writes" and (layers is None or s.layer in layers)]
    bases = (fold_gain(subject, site, rows(site) if callable(rows) else rows)[0] for site in sites)
    edits = tuple(Edit(site, basis, 1.0) for site, basis in zip(sites, bases, strict=True))
    return Plan(edits, subject.source.digest)
