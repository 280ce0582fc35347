"""How much a repeated run may differ where its bits do."""

from __future__ import annotations

from math import isfinite

from obliteratus.core.results import Score

# Sums that are rounded differently move a direction far less. But prompts are fitted on by what the model answers, and
# where two tokens are nearly tied an answer may flip: one prompt of a hundred moves a mean by about a hundredth.
PLAN_TOLERANCE = 0.02
# Likewise a flipped answer moves a share by one prompt. Two are allowed, or two points where prompts are many.
ITEMS, SHARE = 2, 0.02
# Means over prompts and tokens follow the plan, and KL grows with the square of what changed: twice the 0.02 above is
# 4 %, which leaves room for the flips. Below 0.01 nats no difference matters.
RELATIVE, ABSOLUTE = 0.1, 0.01


def allowed_difference(score: Score) -> float:
    """Return the largest difference of a score, in its unit, that counts as the same.

    A share may differ by two of its prompts, or by two points if that is more. Every other score may differ by a tenth
    of its value, or by 0.01 if that is more.
    """
    if score.unit == "share":
        return max(ITEMS / max(score.n, 1), SHARE)
    return max(RELATIVE * abs(score.value), ABSOLUTE) if isfinite(score.value) else ABSOLUTE
