"""How much of what writes into the stream a plan reaches: reported loudly, never assumed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from obliteratus.summon.anatomy import coverage, family_of
from obliteratus.summon.codec import columns
from obliteratus.types import Edit, Plan, Site, Subject


def edited(subject: Subject, plan: Plan) -> dict[str, Any]:
    """Writers found, edited and skipped by part, the share of writing parameters edited, and what is unclaimed."""
    touched = plan.by_site()
    parts: dict[str, dict[str, Any]] = defaultdict(lambda: {"found": 0, "edited": 0, "skipped_layers": []})
    total, reached = 0, 0.0
    for site in (s for s in subject.sites if s.role == "writes"):
        size, hit = _size(subject, site), site.path in touched
        parts[site.part]["found"] += 1
        parts[site.part]["edited"] += hit
        if not hit:
            parts[site.part]["skipped_layers"].append(site.layer)
        total, reached = total + size, reached + size * _share(subject, site, touched.get(site.path, ()))
    known = coverage(subject.model, subject.sites, family_of(subject.model.config))
    return {
        "parts": dict(parts),
        "edited_share": reached / total,
        "found_share": known.share,
        "unclaimed": list(known.paths),
    }


def _share(subject: Subject, site: Site, edits: Sequence[Edit]) -> float:
    """Share of the matrix that the edits reach: all of it, or the columns of some heads."""
    if any(e.site.span is None for e in edits):
        return 1.0
    reached = {column for e in edits if e.site.span is not None for column in range(*e.site.span)}
    return len(reached) / columns(subject.module(site.path), site) if reached else 0.0


def _size(subject: Subject, site: Site) -> int:
    return subject.module(site.path).get_parameter("weight").numel()
