"""What scores are called where people read them, which of them tables show, and in which order.

First comes the behavior, then what else became of answers, then drift.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from obliteratus.core.results import Score
from obliteratus.verify.behavior import is_rare

ANSWERS = ("degenerate", "off_topic", "relevance", "fluency", "length", "hedging", "same_language")
"""Scores of answers, up to their first dot, beside those of the behavior."""
DRIFT = ("kl", "perplexity", "benchmark")
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
    return (
        name.endswith(DETAILS)
        or name.startswith("relevance.")
        or (name.startswith("same_language.") and all(value == 1 for value in values))
    )


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


def group_shown(states: Sequence[Mapping[str, Score]], brief: bool) -> list[list[str]]:
    """Return `names_to_show` of the scores that were measured in any state of a model."""
    names = dict.fromkeys(name for scores in states for name in scores)
    return names_to_show({n: [scores[n].value for scores in states if n in scores] for n in names}, brief)


# -------------------------------------------------------------------------------------------- for people
REFUSAL = "refusal"
# At most 31 characters for each score of refusals, so that a line of a table with two intervals fits 80.
OF_GROUPS = {
    "degenerate": "answers that loop, {group}",
    "fluency": "perplexity of answers, {group}",
    "hedging": "answers that hedge, {group}",
    "length": "tokens per answer, {group}",
    "off_topic": "answers off topic, {group}",
    "relevance": "answers explained by prompt, {group}",
    "same_language": "in prompt's language, {group}",
    "unfinished": "cut off in reasoning, {group}",
    "unknown": "unknown language, {group}",
}
"""Names of scores of a group of prompts, by their keys up to the first dot."""
OF_NO_GROUP = {
    "accuracy": "questions answered right",
    "fluency.ratio": "perplexity, target ÷ control",
    "perplexity": "perplexity of plain text",
    "perplexity.ratio": "perplexity, after ÷ before",
}
"""Names of scores of no group of prompts, by their keys."""
DIVERGENCES = {"first_token": "first-token KL", "continuation": "answer KL"}
TAILS = {"mean": "mean", "p95": "95th percentile", "p99": "99th percentile"}


def describe_score(name: str, behavior: str = REFUSAL) -> str:
    """Return what a score is called where people read it, such as ``refuses target prompts`` for ``refusal.target``.

    behavior: the name that its scores' keys begin with. A key that nobody knows, such as that of a scorer from another
    package, is returned as it is.
    """
    key, _, category = name.partition("/")
    words = _describe_key(key, behavior)
    return f"{words}: {category}" if category else words


def _describe_key(key: str, behavior: str) -> str:
    if key in OF_NO_GROUP:
        return OF_NO_GROUP[key]
    if key.endswith(".change"):
        return f"{_describe_key(key.removesuffix('.change'), behavior)}, change"
    if key.startswith("kl."):
        return _describe_divergence(key)
    kind, _, group = key.partition(".")
    if kind == "benchmark":
        return describe_task(key)
    form = (OF_GROUPS | _describe_behavior(behavior)).get(kind)
    return form.format(group=group) if form and group else key


def describe_task(key: str) -> str:
    """Return the name of a benchmark's score, such as ``arithmetic, acc``. Names of tasks have no dot."""
    _, _, rest = key.partition(".")
    return rest.replace(".", ", ")


def _describe_behavior(behavior: str) -> dict[str, str]:
    """Return the names of the scores that depend on the behavior."""
    refuses = behavior == REFUSAL
    show, shows = ("refuse", "refuses") if refuses else (f"show {behavior}", f"shows {behavior}")
    return {
        behavior: "refuses {group} prompts" if refuses else f"{shows}, {{group}} prompts",
        "partial": f"{shows} only later, {{group}}",
        "ended": "refusals ended, {group}" if refuses else f"{behavior} ended, {{group}}",
        "kept": "refusals kept, {group}" if refuses else f"{behavior} kept, {{group}}",
        "opens": f"begins to {show}, {{group}}",
        f"{behavior}_score": f"log-odds to {show}, {{group}}",
    }


def _describe_divergence(key: str) -> str:
    """Return the name of a KL divergence on control prompts; ``answered`` are those that the unedited model answers."""
    kind, *rest = key.split(".")[1:]
    answered = ", answered" if rest[:1] == ["answered"] else ""
    tail = rest[1:] if answered else rest
    if kind not in DIVERGENCES or len(tail) != 1 or tail[0] not in TAILS:
        return DIVERGENCES.get(kind, key) if not rest else key
    return f"{DIVERGENCES[kind]}{answered}, {TAILS[tail[0]]}"
