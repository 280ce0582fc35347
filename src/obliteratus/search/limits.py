"""What a plan may cost: limits on the control prompts' rate, on degenerate answers, and on answers' perplexity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from obliteratus.core.results import Score
from obliteratus.core.settings import Search
from obliteratus.verify.behavior import GROUPS

Scores = Mapping[str, float]


def measure_excess(scores: Scores, base: Mapping[str, Score], search: Search, behavior: str) -> dict[str, float]:
    """Return by how much scores exceed each limit that they say anything about, by the limit's name in ``search``.

    A plan is feasible if nothing is above 0. base: scores of the unedited model. behavior: the name that the scores of
    its rates begin with.
    """
    rates = {group: f"{behavior}.{group}" for group in GROUPS if f"{behavior}.{group}" in scores}
    more = {group: scores[name] - base[name].value for group, name in rates.items()}
    excess = {"control_margin": more["control"] - search.control_margin}
    if "keep" in more:
        excess["keep_margin"] = -more["keep"] - search.keep_margin
    if "benign" in more:
        excess["benign_margin"] = more["benign"] - search.benign_margin
    loops = [f"degenerate.{group}" for group in GROUPS if f"degenerate.{group}" in scores]
    if loops:
        # The unedited model hardly loops where it shows the behavior, and no edit makes it answer better than others.
        usual = base["degenerate.control"].value if "degenerate.control" in base else 0.0
        added = max(scores[name] - max(usual, base[name].value) for name in loops)
        excess["degenerate_margin"] = added - search.degenerate_margin
    odd = [scores[name] for name in ("fluency.target", "fluency.control") if name in scores]
    if odd and "fluency.control" in base:
        excess["fluency_limit"] = max(odd) / base["fluency.control"].value - search.fluency_limit
    return excess


def count_exceeded(excesses: Iterable[Mapping[str, float]]) -> str:
    """Return how many plans exceed which limit, as text: ``3 exceed search.control_margin``."""
    counts = Counter(name for excess in excesses for name, value in excess.items() if not value <= 0)
    return ", ".join(f"{n} exceed search.{name}" for name, n in counts.items())
