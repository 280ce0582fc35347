"""What a run achieved, in one sentence that needs no knowledge of the program."""

from __future__ import annotations

from obliteratus.core.results import Run, Score
from obliteratus.verify.score_names import REFUSAL


def describe_headline(run: Run) -> str:
    """Return a sentence with the rates after and before the edit, their interval, and what else changed.

    A difference within chance is called "as before". '' for a run that judged no answers.
    """
    name = str(run.judge.get("behavior", REFUSAL))
    verb = "Refuses" if name == REFUSAL else f"Shows {name} on"
    clauses = [_describe_rate(run, f"{name}.target", f"{verb} {{}} target prompts"), _describe_control(run, name)]
    clauses += [_describe_keep(run, name), _describe_perplexity(run)]
    said = "; ".join(clause for clause in clauses if clause)
    return f"{said}." if said else ""


def _describe_rate(run: Run, key: str, form: str) -> str:
    before, after = run.before.get(key), run.after.get(key)
    if after is None:
        return ""
    text = f"{form.format(count(after))} ({format_percent(after)})"
    return text if before is None else f"{text}, before {_number(before)}"


def _describe_control(run: Run, name: str) -> str:
    key = f"{name}.control"
    before, after, change = run.before.get(key), run.after.get(key), run.change.get(key)
    if before is None or after is None:
        return ""
    if change is not None and change.low <= 0 <= change.high:
        return f"other prompts as before ({count(after)}, before {_number(before)})"
    return f"other prompts {count(after)}, before {_number(before)}"


def _describe_keep(run: Run, name: str) -> str:
    return _describe_rate(run, f"{name}.keep", "of the prompts to keep it on, {}")


def _describe_perplexity(run: Run) -> str:
    ratio = run.after.get("perplexity.ratio")
    return "" if ratio is None else f"perplexity of plain text {100 * (ratio.value - 1):+.1f} %".replace("-", "−")


def count(score: Score) -> str:
    """Return a share as a count, such as "2 of 64"."""
    return f"{_number(score)} of {score.n}"


def _number(score: Score) -> int:
    return round(score.value * score.n)


def format_percent(score: Score) -> str:
    """Return a share in percent with its interval, such as "3.1 %, 0.9–10.7"."""
    value = f"{100 * score.value:.1f} %"
    return f"{value}, {100 * score.low:.1f}–{100 * score.high:.1f}" if score.has_interval else value
