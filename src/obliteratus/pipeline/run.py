"""Run a method: the six stages, top to bottom."""

from __future__ import annotations

from typing import Any, NamedTuple

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note, shows_progress
from obliteratus.core.results import Run
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Plan, PromptSet, Splits, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.pipeline.offloaded import adapt_recipe
from obliteratus.pipeline.recipe import check_runs, load_recipe
from obliteratus.pipeline.record import describe_pass, describe_run
from obliteratus.pipeline.stages import Stages
from obliteratus.prompts import split_prompts
from obliteratus.verify import Measurement

# A later pass whose directions score less than this share of the first pass's has nothing left to remove.
NOTHING_LEFT = 0.05


class RunResult(NamedTuple):
    """The plan, the record of the run, and both measurements with every answer that was judged."""

    plan: Plan
    run: Run
    before: Measurement
    after: Measurement

    def __repr__(self) -> str:
        return f"<RunResult: {self.run.describe()}; {self.plan.describe()}>"


@shows_progress
def run(
    recipe: Recipe | str, subject: Subject, prompts: PromptSet, store: Store | None = None, force: bool = False
) -> RunResult:
    """Find the directions, plan the edit, and measure before and after on held-out prompts. Changes no weight.

    recipe: from `load_recipe`, or what that takes. store: keeps finished stages, so that an interrupted run can resume.
    force: edit a model that does not show the behavior. Raises UserError for what the user can mend.

    >>> ob.run(recipe, subject, prompts)  # doctest: +ELLIPSIS
    <RunResult: basic on memory:tiny, refusal.target 100.0% → ...; 16 changes in blocks 0 to 7 (...), strength 1>
    """
    recipe = check_runs(recipe if isinstance(recipe, Recipe) else load_recipe(recipe), prompts.groups)
    if recipe.search is not None:
        raise UserError(f"method '{recipe.name}' is a search; run it with obliteratus search, or run what one found")
    splits = split_prompts(prompts, recipe.seed, recipe.uses_search_split, split_by=recipe.split_by, force=force)
    return run_on_splits(recipe, subject, splits, store, force)


def run_on_splits(
    recipe: Recipe, subject: Subject, splits: Splits, store: Store | None = None, force: bool = False
) -> RunResult:
    """Run a checked recipe on prompts that are already split. See `run`."""
    recipe = adapt_recipe(subject, recipe)
    stages = Stages(subject, splits, store or Store(), force=force).screened(recipe)
    before = stages.measure_before(recipe)
    record: dict[str, Any] = {}
    if recipe.analyze:
        advice = stages.advise(recipe)
        recipe, record["advice"] = advice.recipe, advice.to_dict()
    plan, record["passes"] = find_plan(recipe, stages)
    return evaluate_plan(recipe, stages, plan, before, record)


def find_plan(recipe: Recipe, stages: Stages) -> tuple[Plan, tuple[dict[str, Any], ...]]:
    """Return the joint plan of all passes of PROBE, DISTILL and EXCISE, and a description of each pass.

    Passes end early when few enough search prompts show the behavior, when the directions found anew carry almost
    nothing, or when the KL budget is spent.
    """
    plan, passes, end = Plan(), list[dict[str, Any]](), "all passes done"
    for number in range(1, recipe.passes + 1):
        with applied(stages.subject, plan):
            if passes and (rate := stages.check_rate(number)) is not None:
                passes[-1]["remaining"] = rate.model_dump()
                if rate.value <= recipe.stop_below:
                    end = f"few enough search prompts show {stages.judge.name}"
                    break
            acts = stages.probe(number, recipe, edited=bool(plan.edits))
            directions = stages.distill(number, recipe, acts)
        if passes and float(directions.score.max()) < NOTHING_LEFT * passes[0]["score"]:
            end = "nothing left to remove"
            break
        new = stages.excise(number, recipe, plan, acts, directions)
        if not new.edits:
            end = "the KL budget is spent"
            break
        plan += stages.tune(recipe, new)
        passes.append(describe_pass(stages.subject, acts, directions, new) | {"remaining": None})
    return plan, tuple(
        found | {"seconds": stages.seconds_of_pass(n)} | ({"ended": end} if n == len(passes) else {})
        for n, found in enumerate(passes, 1)
    )


def evaluate_plan(
    recipe: Recipe, stages: Stages, plan: Plan, before: Measurement | None, record: dict[str, Any]
) -> RunResult:
    """Measure the edited model on the report prompts and assemble the record of the run.

    before: measurement of the unedited model, or None if it has not been taken yet. record: the fields ``passes``,
    ``search`` and ``advice`` of `Run`, as far as they apply.
    """
    before, after = stages.measure_after(recipe, plan, before)
    run = describe_run(recipe, stages, plan, (before, after), record)
    if run.coverage["warning"]:
        note("coverage", f"warning: {run.coverage['warning']}")
    return RunResult(plan, run, before, after)
