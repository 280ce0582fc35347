"""What holds for every score, with an interval or without."""

from __future__ import annotations

from obliteratus.core.results import Score


def is_sound(score: Score) -> bool:
    """Return whether the value lies within the interval, if there is one, and something was counted."""
    inside = score.low <= score.value <= score.high or not score.has_interval
    return inside and score.n > 0 and bool(score.unit)
