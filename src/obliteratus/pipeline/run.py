"""Run a method: the six stages, top to bottom."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.results import Run, Score
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Plan, PromptSet, Splits, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.pipeline.offloaded import adapt_recipe
from obliteratus.pipeline.recipe import check_runs
from obliteratus.pipeline.record import describe_judge, describe_pass, describe_prompts
from obliteratus.pipeline.stages import Stages
from obliteratus.prompts import split_prompts
from obliteratus.summon.coverage import summarize_plan_coverage
from obliteratus.verify import Measurement
from obliteratus.verify.intervals import share_difference

# A later pass whose directions score less than this share of the first pass's has nothing left to remove.
NOTHING_LEFT = 0.05


class RunResult(NamedTuple):
    """The plan, the record of the run, and both measurements with every answer that was judged."""

    plan: Plan
    run: Run
    before: Measurement
    after: Measurement


def run(
    recipe: Recipe, subject: Subject, prompts: PromptSet, store: Store | None = None, force: bool = False
) -> RunResult:
    """Find the directions, plan the edit, and measure before and after on held-out prompts. Changes no weight.

    store: keeps finished stages, so that an interrupted run can resume. force: edit a model that does not show the
    behavior. Raises UserError for what the user can mend.
    """
    check_runs(recipe, prompts.groups)
    if recipe.search is not None:
        raise UserError(f"method '{recipe.name}' is a search; run it with obliteratus search, or run what one found")
    splits = split_prompts(
        prompts, recipe.seed, recipe.uses_search_split, split_by=recipe.split_by, force=force
    )
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


def _compare_parts(on_search: Score | None, after: Mapping[str, Score], rate: str) -> dict[str, Score]:
    """Return the rate on the prompts that the plan was chosen on, on the report prompts, and the difference."""
    if on_search is None or rate not in after:
        return {}
    return {"search": on_search, "report": after[rate], "difference": share_difference(after[rate], on_search)}


def _pair_changes(before: Measurement, after: Measurement) -> dict[str, Score]:
    """Return the change of each score whose items were measured before and after, paired item by item."""
    return {name: item.change(before.items[name]) for name, item in after.items.items() if name in before.items}


def evaluate_plan(
    recipe: Recipe, stages: Stages, plan: Plan, before: Measurement | None, record: dict[str, Any]
) -> RunResult:
    """Measure the edited model on the report prompts and assemble the record of the run.

    before: measurement of the unedited model, or None if it has not been taken yet. record: the fields ``passes``,
    ``search`` and ``advice`` of `Run`, as far as they apply.
    """
    subject = stages.subject
    before, after = stages.measure_after(recipe, plan, before)
    presence = stages.presence or stages.check_first_tokens(recipe, before)
    on_search = stages.measure_on_search(recipe, plan)
    coverage = summarize_plan_coverage(subject, plan)
    if coverage["warning"]:
        note("coverage", f"warning: {coverage['warning']}")
    run = Run(
        recipe=recipe,
        source={k: str(v) for k, v in vars(subject.source).items()},
        prompts=describe_prompts(stages.splits, subject),
        before=dict(before.scores),
        after=dict(after.scores),
        coverage=coverage,
        judge=describe_judge(stages.judge, before),
        presence=presence.to_dict() if presence else {},
        optimism=_compare_parts(on_search, after.scores, stages.judge.rate_of("target")),
        change=_pair_changes(before, after),
        seconds=dict(stages.store.seconds),
        versions={name: version(name) for name in ("obliteratus", "torch", "transformers")}
        | {"python": platform.python_version()},
        **record,
    )
    return RunResult(plan, run, before, after)
