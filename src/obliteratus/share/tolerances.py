"""How much a repeated run may differ where its bits do."""

from __future__ import annotations

from math import isfinite

from obliteratus.core.results import Score

PLAN_TOLERANCE = 0.02
ITEMS = 2
SHARE = 0.02
RELATIVE, ABSOLUTE = 0.1, 0.01


def allowed_difference(score: Score) -> float:
    """Return the largest difference of a score, in its unit, that counts as the same.

    A share may differ by two of its prompts, or by two points if that is more. Every other score may differ by a tenth
    of its value, or by 0.01 if that is more.
    """
    if score.unit == "share":
        return max(ITEMS / max(score.n, 1), SHARE)
    return max(RELATIVE * abs(score.value), ABSOLUTE) if isfinite(score.value) else ABSOLUTE
