"""How much of what writes into the stream a plan reaches: reported loudly, never assumed."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from obliteratus.summon.anatomy import coverage, family_of
from obliteratus.types import Plan, Site, Subject


def edited(subject: Subject, plan: Plan) -> dict[str, Any]:
    """Writers found, edited and skipped by part, the share of writing parameters edited, and what is unclaimed."""
    touched = set(plan.by_site())
    parts: dict[str, dict[str, Any]] = defaultdict(lambda: {"found": 0, "edited": 0, "skipped_layers": []})
    total = reached = 0
    for site in (s for s in subject.sites if s.role == "writes"):
        size, hit = _size(subject, site), site.path in touched
        parts[site.part]["found"] += 1
        parts[site.part]["edited"] += hit
        if not hit:
            parts[site.part]["skipped_layers"].append(site.layer)
        total, reached = total + size, reached + size * hit
    known = coverage(subject.model, subject.sites, family_of(subject.model.config))
    return {
        "parts": dict(parts),
        "edited_share": reached / total,
        "found_share": known.share,
        "unclaimed": list(known.paths),
    }


def _size(subject: Subject, site: Site) -> int:
    return subject.module(site.path).get_parameter("weight").numel()
