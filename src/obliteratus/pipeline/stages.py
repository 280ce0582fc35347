"""Define each stage of a run. A stage keeps its result in the store, so that an interrupted run can resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from obliteratus.causal import FitContext
from obliteratus.causal.check_bypass import check_bypass
from obliteratus.core.results import Score
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Excise, Recipe, Step
from obliteratus.core.types import Activations, Directions, Plan, PromptSet, Splits, Subject
from obliteratus.distill import find_directions, load_directions, save_directions
from obliteratus.excise.kl_budget import limit_kl
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.needs import wanted_by
from obliteratus.excise.plan import load_plan, plan_edits, save_plan
from obliteratus.excise.router_limit import limit_router_edits
from obliteratus.judge.judge import Judge
from obliteratus.pipeline.advise import (
    Advice,
    analyze_and_advise,
    can_anchor,
    fit_recipe_to_weights,
    load_advice,
    save_advice,
)
from obliteratus.probe.cache import collect_cached_activations
from obliteratus.probe.probe import collect_activations, load_activations, save_activations
from obliteratus.tune.fit import tune_plan
from obliteratus.tune.front import load_tuned, save_tuned
from obliteratus.verify import Measurement, measure, measure_before_and_after
from obliteratus.verify.behavior import behavior_tokens
from obliteratus.verify.ladder import build_judge, wants_own_words
from obliteratus.verify.presence import (
    Presence,
    Screening,
    check_presence,
    load_screening,
    presence_of_first_tokens,
    save_screening,
    screen_prompts,
)
from obliteratus.weigh import weigh_sites

ADVICE, TUNE = "ANALYZE", "TUNE"  # names of stages, and of their folders in the folder of a run
# Before a later pass the model answers so many search prompts with so many tokens. This is enough to see a refusal
# begin, and to tell a rate of 5 % from one of 20 %.
CHECK_PROMPTS, CHECK_TOKENS = 48, 16


@dataclass(frozen=True)
class Stages:
    """The stages of one run, on one model and its split prompts."""

    subject: Subject
    splits: Splits
    store: Store
    judge: Judge = field(default_factory=Judge)
    """Says which answers show the behavior. By default it looks for refusals."""
    presence: Presence | None = None
    """How many fit prompts show the behavior; None where none was answered."""
    force: bool = False
    """Whether to edit a model that does not show the behavior."""
    chooses: bool = False
    """Whether anything is chosen on search prompts. What a search or the analyses chose is a recipe that does not."""

    def screened(self, recipe: Recipe) -> Stages:
        """Return the stages with the recipe's judge, who knows the model's own words, and the prompts to fit on.

        These are the target prompts that show the behavior, and the control prompts that do not. With weights on disk
        none is answered: each token would read all of them. Raises UserError if the recipe names a judge that cannot
        be opened, and if there is nothing to edit, unless by force.
        """
        judge, chooses = build_judge(recipe.judge, self.subject), recipe.uses_search_split
        if self.subject.offloaded is not None:
            return replace(self, judge=judge, chooses=chooses)
        hears = wants_own_words(recipe.judge, judge, self.subject)
        strengthens, tokens = recipe.excise.strength < 0, behavior_tokens(recipe.verify)

        def screen() -> Screening:
            found = screen_prompts(self.subject, self.splits.fit, judge, tokens, hears, strengthens)
            check_presence(found.presence, judge.name, self.force)
            return found

        found = self.store.stage("ANSWERS", screen, save_screening, load_screening)
        fit = found.choose(self.splits.fit)
        judge, splits = replace(judge, own_words=found.own_words), replace(self.splits, fit=fit)
        return replace(self, judge=judge, splits=splits, presence=found.presence, chooses=chooses)

    def measure_on_search(self, recipe: Recipe, plan: Plan) -> Score | None:
        """Return the behavior's rate on search target prompts under the plan, if anything was chosen on search prompts.

        Its distance to the rate on report prompts says how far the choice flatters. None with weights on disk.
        """
        few = PromptSet({"target": self.splits.search["target"][:CHECK_PROMPTS]})
        if not self.chooses or not few["target"] or self.subject.offloaded is not None:
            return None
        step = Step(use="behavior", tokens=behavior_tokens(recipe.verify))
        with applied(self.subject, plan):
            found = self.measure("VERIFY search prompts", few, (step,))
        return found.scores[self.judge.rate_of("target")]

    def check_first_tokens(self, recipe: Recipe, before: Measurement) -> Presence | None:
        """Return how many report prompts begin to show the behavior, where no fit prompt was answered.

        None if the recipe does not measure it. Raises UserError if there was nothing to edit, unless by force.
        """
        if "opens.target" not in before.items:
            return None
        found = presence_of_first_tokens(before, self.judge.name, recipe.excise.strength < 0)
        check_presence(found, self.judge.name, self.force)
        return found

    def measure_before(self, recipe: Recipe) -> Measurement | None:
        """VERIFY the unedited model. None if its weights stay on disk: `measure_after` then measures both states."""
        if self.subject.offloaded is not None:
            return None
        return self.measure("VERIFY before", self.splits.report, recipe.verify)

    def advise(self, recipe: Recipe) -> Advice:
        """ANALYZE: let the recipe's analyses change the recipe. They use the activations of the first pass."""
        anchors = can_anchor(self.subject, recipe.excise)
        start = fit_recipe_to_weights(recipe, anchors)
        acts = self.probe(1, start)
        return self.store.stage(
            ADVICE,
            lambda: analyze_and_advise(self.subject, self.splits, recipe, start.distill, acts, anchors, self.judge),
            save_advice,
            load_advice,
        )

    def check_rate(self, number: int) -> Score | None:
        """Return the behavior's rate on search target prompts before a later pass, or None if it cannot be measured.

        Without search prompts there is nothing to measure, and with weights on disk every token would read all of them.
        """
        few = PromptSet({"target": self.splits.search["target"][:CHECK_PROMPTS]})
        if not few["target"] or self.subject.offloaded is not None:
            return None
        found = self.measure(f"CHECK {number}", few, (Step(use="behavior", tokens=CHECK_TOKENS),))
        return found.scores[self.judge.rate_of("target")]

    def probe(self, number: int, recipe: Recipe, edited: bool = False) -> Activations:
        """PROBE: collect the activations of the fit prompts. Those of an unedited model are cached for later runs."""
        request = wanted_by(recipe.excise, self.subject.sites)
        collect = collect_activations if edited else collect_cached_activations
        return self.store.stage(
            f"PROBE {number}",
            lambda: collect(self.subject, self.splits.fit, recipe.probe, request),
            save_activations,
            load_activations,
        )

    def distill(self, number: int, recipe: Recipe, acts: Activations) -> Directions:
        """DISTILL: find directions in the activations."""
        context = FitContext(self.subject, self.splits.fit, self.judge)

        def find() -> Directions:
            check_bypass(context, recipe.distill)
            return find_directions(acts, recipe.distill, context)

        return self.store.stage(f"DISTILL {number}", find, save_directions, load_directions)

    def excise(self, number: int, recipe: Recipe, done: Plan, acts: Activations, directions: Directions) -> Plan:
        """EXCISE: plan the edits of one pass, and weaken them if they exceed the limit on routers or the KL budget."""
        options = recipe.excise if number == 1 else _without_first_pass_only(recipe.excise, acts)
        controls = self.splits.search["control"]

        def plan() -> Plan:
            weights = weigh_sites(directions, self.subject.sites, acts, recipe.weigh)
            new = plan_edits(self.subject, directions, weights, acts, options)
            new = limit_router_edits(self.subject, done, new, controls)
            if options.kl_budget is None:
                return new
            return limit_kl(self.subject, done, new, controls, options.kl_budget)[0]

        return self.store.stage(f"EXCISE {number}", plan, save_plan, load_plan)

    def tune(self, recipe: Recipe, plan: Plan) -> Plan:
        """TUNE: fit the plan by gradient descent. A recipe without ``tune`` returns the plan as it is."""
        settings = recipe.tune
        if settings is None:
            return plan
        arguments = (self.subject, plan, self.splits, settings, recipe.seed, self.judge, recipe.stop_below)
        return self.store.stage(TUNE, lambda: tune_plan(*arguments), save_tuned, load_tuned).plan

    def measure_after(self, recipe: Recipe, plan: Plan, before: Measurement | None) -> tuple[Measurement, Measurement]:
        """VERIFY the model under the plan, and before it if that is still to be measured."""

        def both() -> tuple[Measurement, Measurement]:
            return measure_before_and_after(self.subject, plan, self.splits.report, recipe.verify, before, self.judge)

        if before is not None:
            return before, self._keep("VERIFY after", lambda: both()[1])
        return self.store.stage(
            "VERIFY",
            both,
            _save_both,
            lambda folder: (Measurement.load(folder / "before"), Measurement.load(folder / "after")),
        )

    def measure(self, name: str, prompts: PromptSet, steps: tuple[Step, ...]) -> Measurement:
        """Run scorers on the model as it is now. Edits are live, so the subject without them is its own base."""
        return self._keep(name, lambda: measure(self.subject, prompts, steps, base=self.subject, judge=self.judge))

    def _keep(self, name: str, make: Callable[[], Measurement]) -> Measurement:
        """Return a measurement as a stage."""
        return self.store.stage(
            name,
            make,
            lambda found, folder: found.save(folder / "measured"),
            lambda folder: Measurement.load(folder / "measured"),
        )

    def seconds_of_pass(self, number: int) -> dict[str, float]:
        """Return the seconds of each stage of a pass, with the check of the rate that follows it."""
        names = {name: f"{name} {number}" for name in ("PROBE", "DISTILL", "EXCISE")} | {"CHECK": f"CHECK {number + 1}"}
        return {name: self.store.seconds[key] for name, key in names.items() if key in self.store.seconds}


def _without_first_pass_only(options: Excise, acts: Activations) -> Excise:
    """Masks and steering are scored on the unedited model, and experts are blended once: a later pass does neither.

    That a model has no experts is said in the first pass.
    """
    experts = options.experts.model_copy(update={"blend": 0.0}) if options.experts and acts.routed else None
    return options.model_copy(update={"neurons": None, "steer": 0.0, "experts": experts})


def _save_both(both: tuple[Measurement, Measurement], folder: Path) -> None:
    both[0].save(folder / "before")
    both[1].save(folder / "after")
