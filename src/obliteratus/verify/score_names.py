"""Which scores tables show, and in which order: first the behavior, then what else became of answers, then drift."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from obliteratus.verify.behavior import is_rare

ANSWERS = ("degenerate", "fluency", "length", "hedging", "same_language")
"""Scores of answers, up to their first dot, beside those of the behavior."""
DRIFT = ("kl", "perplexity")
DETAILS = (".p99", ".answered.p95", "continuation.answered.mean", ".change")
"""Ends of the names of scores that the terminal leaves out; run.json and the model card have them."""


def group_scores(names: Iterable[str]) -> list[list[str]]:
    """Return the names in up to three groups: of the behavior, of answers otherwise, and of drift."""
    ordered = sorted(names, key=_place)  # stable: a scorer's own order stays
    groups = [[n for n in ordered if _place(n)[0] == group] for group in range(3)]
    return [group for group in groups if group]


def _place(name: str) -> tuple[int, int]:
    kind = name.partition(".")[0]
    for group, kinds in enumerate((ANSWERS, DRIFT), 1):
        if kind in kinds:
            return group, kinds.index(kind)
    return 0, 0


def is_empty(name: str, values: Iterable[float]) -> bool:
    """Return whether a score says nothing: a rare share that is 0 throughout."""
    return is_rare(name) and not any(values)


def is_detail(name: str, values: Iterable[float]) -> bool:
    """Return whether the terminal leaves a score out: a detail, or that all answers are in their prompt's language."""
    return name.endswith(DETAILS) or (name.startswith("same_language.") and all(value == 1 for value in values))


def names_to_show(values: Mapping[str, list[float]], brief: bool) -> list[list[str]]:
    """Return the names of `group_scores` without rates by category and empty scores, and, if brief, without details.

    values: of each score, before and after as far as it was measured.
    """
    shown = [
        name
        for name, seen in values.items()
        if "/" not in name and not is_empty(name, seen) and not (brief and is_detail(name, seen))
    ]
    return group_scores(shown)
