"""The page of a run or a search, ``index.html``, made from the files of its output folder alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from obliteratus.core.results import Run, Score
from obliteratus.core.run_folder import require_file, write_atomic
from obliteratus.core.toml import dump_toml
from obliteratus.excise.plan import load_plan
from obliteratus.rebirth.edited_blocks import describe_blocks
from obliteratus.rebirth.front_section import describe_front
from obliteratus.rebirth.headline import describe_headline
from obliteratus.rebirth.model_card import (
    PASS_COLUMNS,
    format_coverage,
    format_score,
    make_pass_rows,
    make_reason_rows,
)
from obliteratus.rebirth.outcome import describe_outcome
from obliteratus.rebirth.over_refusal import outcome_rows, pick_both_kinds
from obliteratus.report.answer_cards import make_cards
from obliteratus.report.hide import hide_private
from obliteratus.report.html import render_page
from obliteratus.verify.answers import FILE as ANSWERS
from obliteratus.verify.answers import read_lines
from obliteratus.verify.first_token_changes import read_first_tokens
from obliteratus.verify.score_names import REFUSAL, describe_score, group_shown

PAGE, ANALYSIS = "index.html", "analysis/index.html"
SECTIONS = {
    "changed": ("scores", "What changed"),
    "both-kinds": ("outcomes", "Ended and kept"),
    "front": ("front", "Front"),
    "answers": ("cards", "Answers"),
    "first-tokens": ("first_tokens", "Other prompts"),
    "edited": ("parts", "Where"),
    "decisions": ("reasons", "Decisions"),
    "passes": ("passes", "Passes"),
    "times": ("times", "Time"),
    "reproduce": ("recipe", "Reproduce"),
    "files": ("files", "Files"),
}
"""Id, the value that a section shows and is left out without, and title."""


def write_run_page(folder: Path) -> None:
    """Write the page into the output folder of a run. Raises UserError if the folder holds none."""
    write_atomic(folder / PAGE, render_run_page(folder))


def render_run_page(folder: Path) -> str:
    """Return the page: one sentence, what changed, answers side by side, where the model was edited, and how.

    It shows no absolute path and nothing that gives access to anything. Raises UserError if there is no run.json.
    """
    run = read_run(folder)
    behavior = str(run.judge.get("behavior", REFUSAL))
    cards = make_cards(read_lines(folder / ANSWERS), behavior)
    outcomes = outcome_rows(run, behavior)
    values: dict[str, Any] = {
        "title": f"{run.recipe.name or 'a custom recipe'} on {hide_private(run.source['id'])}",
        "meta": describe_origin(run),
        "headline": describe_headline(run) or "No answers were judged.",
        "outcome": describe_outcome(run),
        "shares": share_rows(run, behavior),
        "scores": score_rows(run, behavior),
        "front": describe_front(folder, behavior),
        "cards": cards,
        "outcomes": outcomes,
        "both_kinds": pick_both_kinds(cards) if outcomes else {},
        "judged": describe_judge(run),
        "first_tokens": first_token_rows(folder),
        "coverage": format_coverage(run).replace("**", ""),
        "reasons": make_reason_rows(run),
        "analysis": ANALYSIS if (folder / ANALYSIS).is_file() else "",
        "pass_columns": PASS_COLUMNS,
        "passes": make_pass_rows(run) if run.recipe.passes > 1 else [],
        "times": time_rows(run.seconds),
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
        "digest": run.prompts["digest"],
        "counts": describe_counts(run.prompts["counts"]),
        "command": hide_private(reproducing_command(run)),
        "recipe": hide_private(dump_toml(run.recipe)),
        "files": [[name, f"{f['bytes']:,}", f["sha256"]] for name, f in run.saved.get("files", {}).items()],
        **describe_blocks(load_plan(folder), count_blocks(run)),
    }
    sections = {name: title for name, (value, title) in SECTIONS.items() if values[value]}
    return render_page("run", **values, sections=sections)


def read_run(folder: Path) -> Run:
    """Return the record of a run. Raises UserError if the folder holds none."""
    return Run.model_validate_json(require_file(folder, "run.json").read_text(encoding="utf-8"))


def describe_origin(run: Run) -> list[str]:
    """Return the date, the precision, the program and what the method does."""
    began = run.prompts.get("chat", {}).get("now", "")
    date = datetime.fromisoformat(began).strftime("%Y-%m-%d %H:%M") if began else ""
    precision = run.source.get("quantization") or run.source.get("dtype", "")
    found = [date, precision, f"OBLITERATUS {run.versions['obliteratus']}", run.recipe.about]
    return [part for part in found if part]


def share_rows(run: Run, behavior: str) -> list[dict[str, Any]]:
    """Return a row for each share that was measured before and after, for a plot of dots with intervals."""
    rows = []
    for name in _shown_names(run, brief=True):
        sides = [("before", run.before.get(name)), ("after", run.after.get(name))]
        if any(score is None or score.unit != "share" for _, score in sides):
            continue
        drawn = [draw_side(name, score) for name, score in sides if score is not None]
        text = " → ".join(f"{100 * side['value']:.1f}" for side in drawn) + " %"
        rows.append({"label": describe_score(name, behavior), "sides": drawn, "text": text})
    return rows


def draw_side(name: str, score: Score) -> dict[str, Any]:
    """Return a dot with its interval."""
    low, high = (score.low, score.high) if score.has_interval else (None, None)
    return {"value": score.value, "low": low, "high": high, "text": f"{name}: {format_score(score)}"}


def score_rows(run: Run, behavior: str) -> list[list[str]]:
    """Return name, before, after, paired change and n of each score."""
    rows = []
    for name in _shown_names(run, brief=False):
        before, after = run.before.get(name), run.after.get(name)
        n = next(score.n for score in (after, before) if score is not None)
        change = format_score(run.change.get(name))
        rows.append([describe_score(name, behavior), format_score(before), format_score(after), change, str(n)])
    return rows


def _shown_names(run: Run, brief: bool) -> list[str]:
    return [name for group in group_shown([run.before, run.after], brief) for name in group]


def describe_judge(run: Run) -> str:
    """Return who decided about answers, and how far the judges agree on those of the unedited model."""
    kappas = [f"{pair} {Score(**k).value:.2f}" for pair, k in run.judge.get("kappa", {}).items()]
    agree = f" Agreement of judges (Cohen's kappa): {', '.join(kappas)}." if kappas else ""
    return f"Decided by: {run.judge.get('decides', 'phrases')}.{agree}"


def first_token_rows(folder: Path) -> list[list[str]]:
    """Return KL, prompt and moved tokens of each control prompt, the largest KL first."""
    found = sorted(read_first_tokens(folder), key=lambda line: -line["kl"])
    return [[f"{line['kl']:.3f}", line["prompt"], _describe_moved(line["moved"])] for line in found]


def _describe_moved(moved: Sequence[Any]) -> str:
    """Return the tokens with their probabilities before and after, from lists of three."""
    return ", ".join(f"“{token}” {100 * before:.0f} → {100 * after:.0f} %" for token, before, after in moved)


def count_blocks(run: Run) -> int:
    """Return the number of blocks with a writer of one kind."""
    return max((part["found"] for part in run.coverage.get("parts", {}).values()), default=0)


def time_rows(seconds: Mapping[str, float]) -> list[tuple[str, float, str]]:
    """Return name, share of the whole and seconds of each stage, and the whole."""
    whole = sum(seconds.values()) or 1.0
    rows = [(name, value / whole, f"{value:.1f} s") for name, value in seconds.items()]
    return [*rows, ("together", 1.0, f"{sum(seconds.values()):.1f} s")]


def describe_counts(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Return the number of prompts by split and group, in words."""
    return "; ".join(
        f"{split} {', '.join(f'{n} {group}' for group, n in groups.items())}" for split, groups in counts.items()
    )


def reproducing_command(run: Run) -> str:
    """Return the command that does the same again with the recipe in ``recipe.toml``."""
    sources = run.prompts.get("sources", {})
    given = [f"--{group} {source}" for group, source in sources.items() if source]
    if run.source.get("dtype") and not run.source.get("quantization"):
        given.append(f"--dtype {run.source['dtype']}")
    return " \\\n  ".join([f"obliteratus run {run.source['id']} --method recipe.toml", *given, "--out NEW_FOLDER"])
