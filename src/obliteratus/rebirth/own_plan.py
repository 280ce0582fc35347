"""The record of a plan that no run has made, so that it can be saved like any other."""

from __future__ import annotations

from obliteratus.core.results import Run
from obliteratus.core.settings import Recipe, Step
from obliteratus.core.types import Plan, Subject
from obliteratus.pipeline.record import list_versions
from obliteratus.summon.coverage import summarize_plan_coverage

NAME = "own plan"


def describe_own_plan(subject: Subject, plan: Plan) -> Run:
    """Return a record that says which model the plan is of and what it edits, and that nothing was measured."""
    return Run(
        status="done",
        recipe=Recipe(name=NAME, about=f"A plan made by hand: {plan.describe()}", distill=(Step(use="own"),)),
        source={key: str(value) for key, value in vars(subject.source).items()},
        prompts={"digest": "", "counts": {}},
        coverage=summarize_plan_coverage(subject, plan),
        versions=list_versions(),
    )


def is_own_plan(run: Run) -> bool:
    """Return whether a record is that of a plan which no recipe has made."""
    return run.recipe.name == NAME and not run.prompts["counts"]
