"""What a run's record says in words: whether the behavior was there, what is left, and how far choices flatter."""

from __future__ import annotations

from obliteratus.core.results import Run
from obliteratus.rebirth.headline import count
from obliteratus.rebirth.over_refusal import describe_outcomes
from obliteratus.verify.presence import describe_left_out

# Below this share a behavior counts as removed; more is said to be left, with what to try next.
LITTLE_LEFT = 0.05
NEXT = {"informed": "--method informed", "tuned": "--method tuned"}
"""What to try next, by method; the last resort is a search."""


def describe_outcome(run: Run) -> list[str]:
    """Return sentences about the behavior before and after the edit, none of which claims an effect within chance."""
    sentences = [_describe_force(run), _describe_fit(run), _describe_change(run), describe_outcomes(run)]
    sentences.append(_describe_optimism(run))
    return [sentence for sentence in sentences if sentence]


def _name(run: Run) -> str:
    return str(run.judge.get("behavior", "refusal"))


def _describe_force(run: Run) -> str:
    against = run.presence.get("against", "")
    return f"Warning: the edit was forced. Before it, {against}." if against else ""


def _describe_fit(run: Run) -> str:
    left = run.presence.get("left_out", {})
    return f"{describe_left_out(left, _name(run)).capitalize()}." if any(left.values()) else ""


def _describe_change(run: Run) -> str:
    rate = f"{_name(run)}.target"
    before, after, change = run.before.get(rate), run.after.get(rate), run.change.get(rate)
    if before is None or after is None or change is None:
        return ""
    counts = f"{count(before)} report prompts before and {count(after)} after the edit"
    if change.low <= 0 <= change.high:
        return f"No change of {_name(run)} beyond chance: {counts}.{_suggest(run)}"
    if change.value > 0 or after.value <= LITTLE_LEFT:
        return ""
    return f"Left: {_name(run)} on {counts}.{_suggest(run)}"


def _suggest(run: Run) -> str:
    """Return what to try next: the methods that adapt to the model, unless this was one, then a search."""
    if run.recipe.excise.strength < 0:
        return ""
    others = [option for method, option in NEXT.items() if method != run.recipe.name]
    search = [] if run.search else ["obliteratus search"]
    return f" Try {' or '.join([*others, *search])}."


def _describe_optimism(run: Run) -> str:
    if not run.optimism:
        return ""
    search, report, difference = (run.optimism[part] for part in ("search", "report", "difference"))
    within = "within chance" if difference.low <= 0 <= difference.high else "beyond chance"
    return (
        f"Chosen on search prompts, of which {search.value:.1%} show {_name(run)} after the edit; of report prompts "
        f"{report.value:.1%} do ({100 * difference.value:+.1f} points, {100 * difference.low:+.1f} to "
        f"{100 * difference.high:+.1f}: {within})."
    )
