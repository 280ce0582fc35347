"""The six stages in order. Reads top to bottom; each stage is kept by the store as soon as it is done."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

from obliteratus.analyze import AnalysisContext, Finding, try_analyses
from obliteratus.causal import FitContext
from obliteratus.causal.check_bypass import check_bypass
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.results import Run
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Excise, Recipe, Step, expand_part
from obliteratus.core.types import Activations, Directions, Plan, ProbeRequest, PromptSet, Subject
from obliteratus.distill import find_directions, load_directions, save_directions
from obliteratus.excise.bake.tensors import can_hold_anchors
from obliteratus.excise.kl_budget import limit_kl
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import load_plan, plan_edits, save_plan
from obliteratus.excise.router_limit import limit_router_edits
from obliteratus.pipeline.advise import Advice, advise, fit_recipe_to_weights, load_advice, save_advice
from obliteratus.pipeline.offloaded import adapt_recipe, compared, measured
from obliteratus.pipeline.recipe import check_runs
from obliteratus.pipeline.record import describe_pass, describe_passes, describe_prompts
from obliteratus.probe.cache import kept
from obliteratus.probe.probe import collect_activations, load_activations, save_activations
from obliteratus.prompts import parts_checked
from obliteratus.summon.coverage import summarize_plan_coverage
from obliteratus.tune.fit import tune_plan
from obliteratus.verify import Measurement
from obliteratus.weigh import weigh_sites

ADVISED = "ANALYZE"  # the stage, and its place in a run's folder
# A later pass whose directions carry less than this share of what the first found has nothing left to remove.
NOTHING_LEFT = 0.05
# Before a later pass, so many search prompts are answered with so many tokens: enough to see a refusal begin, and
# to tell 5 % from 20 %.
CHECKED, CHECK_TOKENS = 48, 16


# Masks and steering act once: their scores and their vector are of the model before any removal.
FIRST_ONLY: dict[str, object] = {"neurons": None, "steer": 0.0}
# Nor is a blend of experts made twice.
UNBLENDED = {"blend": 0.0}


def run(recipe: Recipe, subject: Subject, prompts: PromptSet, store: Store | None = None) -> tuple[Plan, Run]:
    """Find the directions, plan the edit, measure before and after on held-out prompts. Changes no weight.

    store: keeps finished stages, so that a killed run resumes. Raises UserError for what the user can mend.
    """
    check_runs(recipe, prompts.groups)
    if recipe.search is not None:
        raise UserError(f"method '{recipe.name}' is a search; give it to obliteratus search, or run what one found")
    store, recipe = store or Store(), adapt_recipe(subject, recipe)
    fit, search, report = parts_checked(prompts, recipe.seed, recipe.uses_search_split)
    apart = subject.offloaded is None  # else before and after are one pass over the weights, at the end
    before = measured(store, "VERIFY before", subject, report, recipe.verify) if apart else None
    found: dict[str, Any] = {}
    if recipe.analyze:
        advice = informed(store, subject, fit, search, recipe)
        recipe, found = advice.recipe, {"advice": advice.told()}
    plan, passes = in_passes(store, recipe, subject, fit, search)
    return plan, proved(store, recipe, subject, prompts, plan, before, {**found, "passes": passes})


def informed(store: Store, subject: Subject, fit: PromptSet, search: PromptSet, recipe: Recipe) -> Advice:
    """ANALYZE as a stage: the recipe's analyses, on activations that its first pass uses too, change it."""
    wanted = {part for name in recipe.excise.parts for part in expand_part(name)}
    anchors = can_hold_anchors(subject, [s for s in subject.sites if s.role == "writes" and s.part in wanted])
    start = fit_recipe_to_weights(recipe, anchors)
    acts = probed(store, "PROBE 1", subject, fit, start)

    def make() -> Advice:
        lab, found, along = FitContext(subject, fit), dict[str, Finding](), start.distill
        directions = find_directions(acts, along, lab)
        for step in recipe.analyze:  # each looks along the directions that those before it have settled
            found |= try_analyses(AnalysisContext(acts, directions, subject, fit, search), [step])[0]
            advice = advise(recipe, acts, found, anchors=anchors)
            if advice.recipe.distill != along:
                along, directions = advice.recipe.distill, find_directions(acts, advice.recipe.distill, lab)
        return advice

    return store.stage(ADVISED, make, save_advice, load_advice)


def in_passes(
    store: Store, recipe: Recipe, subject: Subject, fit: PromptSet, search: PromptSet
) -> tuple[Plan, tuple[dict[str, Any], ...]]:
    """PROBE, DISTILL and EXCISE until refusals are down, nothing is left, the budget is spent, or all passes are done.

    Returns the plan, and what each pass found and did.
    """
    plan, ended = Plan(), "all passes done"
    passes: list[dict[str, Any]] = []
    for number in range(1, recipe.passes + 1):
        if number > 1 and still_refused(store, number, subject, plan, search) <= recipe.stop_below_refusal:
            ended = "refusals are down"
            break
        acts, directions = searched(store, number, subject, plan, fit, recipe)
        if passes and float(directions.score.max()) < NOTHING_LEFT * passes[0]["score"]:
            ended = "nothing left to remove"
            break
        new = planned(store, number, subject, plan, (acts, directions), search, recipe)
        if not new.edits:
            ended = "the KL budget is spent"
            break
        if recipe.tune is not None:
            fitted = partial(tune_plan, subject, new, fit, search, recipe.tune, recipe.seed)
            new = store.stage("TUNE", fitted, save_plan, load_plan)
        plan += new
        passes.append(describe_pass(subject, acts, directions, new))
    return plan, describe_passes(passes, store, ended)


def proved(
    store: Store,
    recipe: Recipe,
    subject: Subject,
    prompts: PromptSet,
    plan: Plan,
    before: Measurement | None,
    found: dict[str, Any],
) -> Run:
    """The edited model measured on the report prompts, and the whole run's record.

    before: the unedited model's measurement; None where it is still to be taken.
    found: what more the record is to say (`Run.passes`, `Run.search`, `Run.advice`).
    """
    report = parts_checked(prompts, recipe.seed)[2]
    before, after = compared(store, subject, plan, report, recipe.verify, before)
    covered = summarize_plan_coverage(subject, plan)
    if covered["warning"]:
        note("coverage", f"warning: {covered['warning']}")
    return Run(
        recipe=recipe,
        source={k: str(v) for k, v in vars(subject.source).items()},
        prompts=describe_prompts(prompts, recipe.seed, subject),
        before=dict(before.scores),
        after=dict(after.scores),
        coverage=covered,
        seconds=dict(store.seconds),
        versions={name: version(name) for name in ("obliteratus", "torch", "transformers")}
        | {"python": platform.python_version()},
        **found,
    )


def searched(
    store: Store, number: int, subject: Subject, plan: Plan, fit: PromptSet, recipe: Recipe
) -> tuple[Activations, Directions]:
    """PROBE and DISTILL as stages, on the model as the passes so far left it."""
    with applied(subject, plan):
        acts = probed(store, f"PROBE {number}", subject, fit, recipe, plan)
        directions = store.stage(
            f"DISTILL {number}",
            partial(_distilled, acts, recipe.distill, FitContext(subject, fit)),
            save_directions,
            load_directions,
        )
    return acts, directions


def _distilled(acts: Activations, steps: Sequence[Step], lab: FitContext) -> Directions:
    check_bypass(lab, steps)
    return find_directions(acts, steps, lab)


def still_refused(store: Store, number: int, subject: Subject, plan: Plan, search: PromptSet) -> float:
    """Share of search target prompts that the model refuses after the passes so far; 1 if nobody asked."""
    few = PromptSet({"target": search["target"][:CHECKED]})
    if not few["target"] or subject.offloaded is not None:  # answers would read all weights once a token
        return 1.0
    with applied(subject, plan):
        found = measured(store, f"CHECK {number}", subject, few, (Step(use="refusal", tokens=CHECK_TOKENS),))
    return found.scores["refusal.target"].value


def probed(
    store: Store, stage: str, subject: Subject, fit: PromptSet, recipe: Recipe, plan: Plan | None = None
) -> Activations:
    """PROBE as a stage. What it gives of the unedited model is kept for later runs; a plan that is live now is none."""
    anchored = [p for part in recipe.excise.parts for p in expand_part(part)] if recipe.excise.anchored else []
    outputs = [s.path for s in subject.sites if s.role == "writes" and s.part in anchored]
    wanted = expand_part("mlp.out") if recipe.excise.neurons is not None else ()
    inputs = [s.path for s in subject.sites if s.part in wanted and not s.stacked]
    experts = [s.path for s in subject.sites if s.role == "writes" and s.stacked and recipe.excise.experts is not None]
    look = collect_activations if plan is not None and plan.edits else partial(kept, stage)
    make = partial(look, subject, fit, recipe.probe, ProbeRequest(outputs, inputs, experts))
    return store.stage(stage, make, save_activations, load_activations)


def planned(
    store: Store,
    number: int,
    subject: Subject,
    done: Plan,
    found: tuple[Activations, Directions],
    search: PromptSet,
    recipe: Recipe,
) -> Plan:
    """EXCISE as a stage: the edits of one pass, weakened if there is a budget that they would exceed."""
    acts, directions = found
    options = recipe.excise if number == 1 else _later(recipe.excise)

    def make() -> Plan:
        weights = weigh_sites(directions, subject.sites, acts, recipe.weigh)
        new = limit_router_edits(
            subject, done, plan_edits(subject, directions, weights, acts, options), search["control"]
        )
        if options.kl_budget is None:
            return new
        return limit_kl(subject, done, new, search["control"], options.kl_budget)[0]

    return store.stage(f"EXCISE {number}", make, save_plan, load_plan)


def _later(options: Excise) -> Excise:
    """What a later pass does again."""
    experts = None if options.experts is None else options.experts.model_copy(update=UNBLENDED)
    return options.model_copy(update={**FIRST_ONLY, "experts": experts})
