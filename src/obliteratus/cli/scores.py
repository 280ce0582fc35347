"""Print scores and whole runs on stdout."""

from __future__ import annotations

from collections.abc import Mapping

from obliteratus.cli.tables import align_values
from obliteratus.cli.terminal import say, show_groups, show_table
from obliteratus.core.results import Run, Score
from obliteratus.rebirth.model_card import PASS_COLUMNS, format_coverage, make_pass_rows, make_reason_rows, split_score
from obliteratus.rebirth.outcome import describe_outcome
from obliteratus.verify.score_names import describe_score, group_shown


def show_scores(title: str, sides: Mapping[str, Mapping[str, Score]], behavior: str) -> None:
    """Print scores with a column for each state of a model, or for each model. Details are left out.

    sides: scores by their keys, by the heading of the column.
    """
    groups = group_shown(list(sides.values()), brief=True)
    names = [name for group in groups for name in group]
    columns = [align_values([split_score(side.get(name)) for name in names]) for side in sides.values()]
    sizes = [next(str(side[name].n) for side in list(sides.values())[::-1] if name in side) for name in names]
    cells = zip([describe_score(name, behavior) for name in names], *columns, sizes, strict=True)
    rows = dict(zip(names, map(list, cells), strict=True))
    show_groups(title, ["score", *sides, "n"], [[rows[name] for name in group] for group in groups])


def show_run(run: Run) -> None:
    """Print the scores before and after, the decisions and passes, what there is to say of them, and the coverage."""
    method, behavior = run.recipe.name or "recipe", str(run.judge.get("behavior", "refusal"))
    title = f"{method} on {run.source['id']}: held-out prompts, 95 % intervals, KL in nats"
    show_scores(title, {"before": run.before, "after": run.after}, behavior)
    if run.advice:
        _show_decisions(run)
    if len(run.passes) > 1:
        show_table("Passes, with the rate left on search prompts", PASS_COLUMNS, make_pass_rows(run))
    for sentence in describe_outcome(run):
        say(sentence)
    say(format_coverage(run).replace("**", ""), "Edited")


def _show_decisions(run: Run) -> None:
    """Print the decisions that changed the recipe with what they rest on, and the names of the others."""
    rows = make_reason_rows(run)
    changed = [[what, f"{measured}: {value} ({limit})", to] for what, measured, value, limit, to in rows if to]
    if changed:
        show_table("What measurements changed in the recipe", ["decision", "because", "set to"], changed)
    if kept := [f"{what} ({value}; {limit} would change it)" for what, _, value, limit, to in rows if not to]:
        say(f"As the recipe had it: {'; '.join(kept)}.")
