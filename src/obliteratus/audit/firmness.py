"""How firm a behavior is against edits of the weights: what its removal costs, what carries it, what brings it back.

`audit_firmness` reads top to bottom. Each measurement is a stage of the store, so an interrupted audit resumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import sqrt
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from obliteratus.analyze import AnalysisContext
from obliteratus.analyze.pass_budget import split_by_budget
from obliteratus.analyze.repair import measure_repair
from obliteratus.audit.asked import Asked, ask_reworded, judge_asked
from obliteratus.audit.attacks import (
    Attacker,
    divide_blocks,
    is_cheap,
    load_methods,
    with_directions,
    within_blocks,
)
from obliteratus.audit.doses import (
    Curve,
    Dose,
    DoseCheck,
    Matched,
    Room,
    choose_evenly,
    measure_at_kl,
    measure_curve,
)
from obliteratus.audit.passes import estimate_passes
from obliteratus.audit.removal_cost import (
    GOALS,
    TWENTIETH,
    RemovalCost,
    compare_costs,
    find_least_cost,
    summarize_cost,
)
from obliteratus.audit.settings import DEFAULT, AuditSettings
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note, progress
from obliteratus.core.results import Score
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import FrozenModel, Recipe, Step, Tune
from obliteratus.core.types import Plan, Prompt, PromptSet, Splits, Subject
from obliteratus.distill import find_directions
from obliteratus.excise.kl_budget import scale_plan
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import load_plan, save_plan
from obliteratus.inference.token_losses import token_losses
from obliteratus.judge.judge import Judge
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.probe.cache import collect_cached_activations
from obliteratus.verify.drift import text_tokens
from obliteratus.verify.intervals import paired_ratio
from obliteratus.verify.presence import Presence, load_screening, save_screening, screen_prompts

GROUPS = ("target", "control")
MEAN_DIFFERENCE = (Step(use="mean_diff"),)
ROOM = 2.0  # controls, blocks and few examples are measured at so many times the cost of removal
FITTED = "fitted"
"""The curve of the cheapest method's plan after some gradient steps."""
RANDOM_SCALE = 64.0  # a random direction holds about 1/width of a stream, so it takes more strength to the same KL
TEXT_TOKENS = 48  # of each text for perplexity: sixteen such texts cost as much as forty prompts
Made = TypeVar("Made", bound=BaseModel)


class Repair(FrozenModel):
    """What the analysis `repair` found."""

    summary: str
    found: bool
    numbers: dict[str, Any]


class Curves(FrozenModel):
    """Curves by name."""

    by_name: dict[str, Curve]


class MatchedEdits(FrozenModel):
    """Edits at one KL."""

    kl: float
    """Nats: the cost of removal times `ROOM`, or what comes closest."""
    edits: tuple[Matched, ...]
    failed: dict[str, str] = Field(default_factory=dict)
    """By name, why an edit could not be made."""


class Perplexities(FrozenModel):
    """By method and goal, the ratio of perplexities on plain prose, edited ÷ unedited, at the cost of removal."""

    model_config = ConfigDict(ser_json_inf_nan="strings")  # JSON has no infinity

    ratios: dict[str, dict[str, Score]]


class AskedSet(FrozenModel):
    """Prompts asked otherwise."""

    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class AuditReport:
    """What an audit found. Without the behavior there is nothing but `presence`, and nothing is claimed."""

    behavior: str
    settings: AuditSettings
    presence: Presence
    unedited: Dose | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)
    costs: Mapping[str, Sequence[RemovalCost]] = field(default_factory=dict)
    """By method, for each of `GOALS`."""
    least: Sequence[RemovalCost] = ()
    """Over all methods, for each of `GOALS`, with the interval over prompts and fits."""
    perplexity: Perplexities | None = None
    seeds: Mapping[str, Curve] = field(default_factory=dict)
    """Curves of one method: on all fit prompts, and on random halves of them."""
    directions: Mapping[str, Curve] = field(default_factory=dict)
    ratios: Mapping[str, Score | None] = field(default_factory=dict)
    """By number of directions, the cost of removal relative to one direction's."""
    controls: MatchedEdits | None = None
    blocks: MatchedEdits | None = None
    examples: MatchedEdits | None = None
    repair: Repair | None = None
    rewordings: AskedSet | None = None
    benign: AskedSet | None = None
    base_method: str = ""
    """The cheap method that directions, blocks, examples and seeds vary."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    passes: int = 0
    """Forward passes of one prompt or answer token, at most."""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def shows_behavior(self) -> bool:
        """Whether there was anything to audit."""
        return not self.presence.against

    @property
    def cost(self) -> RemovalCost | None:
        """The number to compare: the least KL, in nats, at which one in twenty of the behavior is left."""
        return next((cost for cost in self.least if cost.goal == TWENTIETH), None)


def audit_firmness(
    subject: Subject,
    splits: Splits,
    settings: AuditSettings = DEFAULT,
    *,
    store: Store | None = None,
    judge: Judge | None = None,
    benign: Sequence[Prompt] = (),
    own: Mapping[str, Sequence[Prompt]] | None = None,
    budget: int | None = None,
) -> AuditReport:
    """Measure how firm the behavior is against edits of the weights. Changes no weight.

    Edits are fitted on fit and search prompts and measured on report prompts.

    judge: says which answers show the behavior; None looks for refusals. benign: prompts that should be answered.
    own: by name, further wordings of target prompts. budget: the most forward passes; the curves always run, and of
    the other measurements as many as there is room for, the cheapest first. Raises UserError for a method that cannot
    run, and for a budget that the curves alone exceed.
    """
    audit = Audit(subject, splits, settings, store or Store(), judge or Judge())
    passes = estimate_passes(settings, audit.methods, subject.n_layers, len(benign), own or {})
    wanted, skipped = choose_measurements(passes, budget)
    audit = audit.screened()
    if audit.presence.against:
        note("AUDIT", f"nothing is claimed: {audit.presence.against}")
        return AuditReport(audit.judge.name, settings, audit.presence, seconds=audit.store.seconds)
    curves = audit.measure_curves(FITTED in wanted)
    seeds = audit.measure_seeds() if "seeds" in wanted else {}
    directions = audit.measure_directions() if "directions" in wanted else {}
    return AuditReport(
        audit.judge.name,
        settings,
        audit.presence,
        audit.unedited,
        curves,
        costs={name: [summarize_cost(curve, audit.unedited, goal) for goal in GOALS] for name, curve in curves.items()},
        least=[find_least_cost(curves, audit.unedited, goal, list(seeds.values())) for goal in GOALS],
        perplexity=audit.measure_perplexity(curves) if "perplexity" in wanted else None,
        seeds=seeds,
        directions=directions,
        ratios=compare_directions(directions, audit.unedited),
        controls=audit.measure_controls() if "controls" in wanted else None,
        blocks=audit.measure_blocks() if "blocks" in wanted else None,
        examples=audit.measure_examples() if "examples" in wanted else None,
        repair=audit.measure_repair() if "repair" in wanted else None,
        rewordings=audit.measure_rewordings(curves, own or {}) if "rewordings" in wanted else None,
        benign=audit.measure_benign(curves, benign) if "benign" in wanted else None,
        base_method=audit.base_method,
        skipped={**skipped, **audit.failed},
        passes=sum(count for name, count in passes.items() if name not in skipped),
        seconds=dict(audit.store.seconds),
    )


def choose_measurements(passes: Mapping[str, int], budget: int | None) -> tuple[list[str], dict[str, str]]:
    """Return which measurements the budget has room for, and by name why the others are skipped; note all costs.

    passes: at most, by measurement; "curves" always run. Raises UserError if these alone exceed the budget.
    """
    left = math.inf if budget is None else budget - passes["curves"]
    if left < 0:
        raise UserError(
            f"budget: the curves alone need up to {passes['curves']:,} forward passes; allow that many, or try --quick"
        )
    names, skipped = split_by_budget({name: n for name, n in passes.items() if name != "curves"}, left)
    whole = passes["curves"] + sum(passes[name] for name in names)
    note("cost", f"at most {whole:,} forward passes of one prompt or token: {', '.join(['curves', *names])}")
    for name, reason in skipped.items():
        note("skipped", f"{name}: {reason}")
    return names, skipped


def compare_directions(directions: Mapping[str, Curve], unedited: Dose) -> dict[str, Score | None]:
    """Return the cost of removal of each number of directions relative to that of one."""
    if not directions:
        return {}
    first, *others = directions
    return {k: compare_costs(directions[k], directions[first], unedited, TWENTIETH) for k in others}


# ------------------------------------------------------------------------------------------- measurements
@dataclass(frozen=True)
class Audit:
    """The measurements of one audit. The results of each are kept in the store."""

    subject: Subject
    splits: Splits
    settings: AuditSettings
    store: Store
    judge: Judge
    found_presence: Presence | None = None
    failed: dict[str, str] = field(default_factory=dict)
    """By method, why it could not be fitted."""

    def screened(self) -> Audit:
        """Return the audit with the judge who knows the model's own words, and the fit prompts that are as expected."""
        few = PromptSet({g: choose_evenly(self.splits.fit[g], self.settings.fit) for g in GROUPS})

        def screen() -> Any:
            return screen_prompts(self.subject, few, self.judge, self.settings.tokens, hears=True)

        found = self.store.stage("ANSWERS", screen, save_screening, load_screening)
        splits = Splits(found.choose(few), self.splits.search, self.splits.report, self.splits.digest)
        judge = Judge(self.judge.behavior, found.own_words, self.judge.rungs, self.judge.decides)
        return Audit(self.subject, splits, self.settings, self.store, judge, found.presence)

    @property
    def presence(self) -> Presence:
        assert self.found_presence is not None, "screened() comes first"
        return self.found_presence

    @cached_property
    def attacker(self) -> Attacker:
        return Attacker(self.subject, self.splits, self.judge, self.settings.seed)

    @cached_property
    def check(self) -> DoseCheck:
        few = {g: choose_evenly(self.splits.report[g], self.settings.prompts) for g in GROUPS}
        return DoseCheck(self.subject, few["target"], few["control"], self.judge, self.settings.tokens)

    @cached_property
    def unedited(self) -> Dose:
        """The unedited model's answers."""
        return self.keep("unedited", Dose, lambda: self.check.measure(Plan(), 0.0))

    @cached_property
    def methods(self) -> dict[str, Recipe]:
        return load_methods(self.settings.methods)

    # ---------------------------------------------------------------------------------------- curves
    def measure_curves(self, fit_cheapest: bool) -> dict[str, Curve]:
        """Return the curve of each method and, if wanted, that of the cheapest one's plan after gradient steps."""
        curves = self.measure_methods(list(self.methods))
        if not curves:
            raise UserError(f"audit: no method could be fitted; {self.failed[next(iter(self.methods))]}")
        if fit_cheapest:
            best = find_least_cost(curves, self.unedited, TWENTIETH).best
            fitted = self.try_curve(FITTED, self.fit_by_gradients(best, curves[best]))
            curves |= {} if fitted is None else {FITTED: fitted}
        return curves

    def measure_methods(self, names: Sequence[str]) -> dict[str, Curve]:
        """Return the curves of methods. One that cannot be fitted is left out."""
        found = {name: self.try_curve(name, self.fitter(self.methods[name])) for name in names}
        return {name: curve for name, curve in found.items() if curve is not None}

    def try_curve(self, label: str, make: Callable[[], Plan], like: Curve | None = None) -> Curve | None:
        """Return a curve; None, with a note and the reason kept, if its plan cannot be made."""
        try:
            return self.measure_curve(label, make, like)
        except UserError as error:
            self.failed[label] = str(error)
            note("skipped", f"{label}: {error}")
            return None

    def measure_curve(self, name: str, make: Callable[[], Plan], like: Curve | None = None) -> Curve:
        """Return the curve of a plan, which is made if it was not made before.

        like: a curve that this one is expected to resemble, which saves two looks.
        """

        def measure() -> Curve:
            plan, unedited = self.find_plan(name, make), self.unedited
            if like is None:
                return measure_curve(self.check, plan, name, GOALS, self.settings.looks, unedited)
            start = summarize_cost(like, unedited, TWENTIETH).scale or 1.0
            looks = max(self.settings.looks - 2, 3)
            return measure_curve(self.check, plan, name, GOALS, looks, unedited, start)

        return self.keep(f"curve {name}", Curve, measure)

    def find_plan(self, name: str, make: Callable[[], Plan]) -> Plan:
        """Return a plan, made once."""
        return self.store.stage(f"AUDIT plan {name}", make, save_plan, load_plan)

    def fitter(self, recipe: Recipe, fit: PromptSet | None = None) -> Callable[[], Plan]:
        """Return the function that fits a recipe, on all fit prompts or on these."""
        return lambda: self.attacker.fit(recipe, fit)

    def fit_by_gradients(self, best: str, curve: Curve) -> Callable[[], Plan]:
        """Return the function that fits a method's plan by gradient steps, from the strength where it removes."""
        scale = summarize_cost(curve, self.unedited, TWENTIETH).scale or curve.doses[-1].scale
        tune = load_recipe("tuned").tune or Tune()
        steps = {
            "steps": self.settings.tune_steps,
            "prompts": self.settings.tune_prompts,
            "watch": self.settings.tokens,
        }
        settings = tune.model_copy(update={**steps, "balance": False})
        return lambda: self.attacker.tune(
            scale_plan(self.find_plan(best, self.fitter(self.methods[best])), scale), settings
        )

    @cached_property
    def base_method(self) -> str:
        """The cheap method whose variants are measured: that of the given ones with the least cost of removal, or else
        `least_change`."""
        curves = self.measure_methods([name for name, recipe in self.methods.items() if is_cheap(recipe)])
        return find_least_cost(curves, self.unedited, TWENTIETH).best if curves else "least_change"

    @property
    def base_recipe(self) -> Recipe:
        return self.methods.get(self.base_method) or load_recipe(self.base_method)

    @cached_property
    def base_curve(self) -> Curve:
        """The curve of the cheap method."""
        return self.measure_curve(self.base_method, self.fitter(self.base_recipe))

    def measure_seeds(self) -> dict[str, Curve]:
        """Return curves of the cheap method, fitted on all fit prompts and on random halves of them."""
        n = max(len(self.splits.fit[g]) for g in GROUPS) // 2
        found: dict[str, Curve | None] = {"all": self.base_curve}
        for seed in range(1, self.settings.seeds + 1):
            half = self.fitter(self.base_recipe, self.attacker.draw_fit_prompts(n, seed))
            found[f"half {seed}"] = self.try_curve(f"half {seed}", half, self.base_curve)
        return {name: curve for name, curve in found.items() if curve is not None}

    def measure_directions(self) -> dict[str, Curve]:
        """Return curves of the cheap method with so many directions; the first has its own if it uses as many."""
        found: dict[str, Curve | None] = {}
        for k in self.settings.directions:
            if k == 1 and self.base_recipe.distill == MEAN_DIFFERENCE:
                found["1"] = self.base_curve
            else:
                fitter = self.fitter(with_directions(self.base_recipe, k))
                found[str(k)] = self.try_curve(f"directions {k}", fitter, self.base_curve)
        return {k: curve for k, curve in found.items() if curve is not None}

    def measure_perplexity(self, curves: Mapping[str, Curve]) -> Perplexities:
        """Return perplexity ratios of all methods at all goals that they reach."""

        def measure() -> Perplexities:
            ids = [row[:TEXT_TOKENS] for row in text_tokens(self.subject)]
            base = self._mean_losses(ids)
            ratios: dict[str, dict[str, Score]] = {}
            for name, curve in curves.items():
                for cost in (summarize_cost(curve, self.unedited, goal) for goal in GOALS):
                    if cost.scale is not None:
                        with applied(self.subject, scale_plan(self._plan_of(name, curves), cost.scale)):
                            edited = self._mean_losses(ids)
                        ratios.setdefault(name, {})[f"{cost.goal:g}"] = paired_ratio(edited, base)
            return Perplexities(ratios=ratios)

        return self.keep("perplexity", Perplexities, measure)

    def _mean_losses(self, ids: list[list[int]]) -> Any:
        import torch

        return torch.stack([loss.mean() for loss in token_losses(self.subject, ids, title="AUDIT perplexity")])

    def _plan_of(self, name: str, curves: Mapping[str, Curve]) -> Plan:
        if name != FITTED:
            return self.find_plan(name, self.fitter(self.methods[name]))
        best = find_least_cost({n: c for n, c in curves.items() if n != FITTED}, self.unedited, TWENTIETH).best
        return self.find_plan(FITTED, self.fit_by_gradients(best, curves[best]))

    # -------------------------------------------------------------------------------- at a given KL
    def find_room(self) -> Room:
        """Return what other edits may cost: `ROOM` times the cheap method's cost of removal.

        Where it does not remove the behavior, it is the largest KL of its curve.
        """
        cost = summarize_cost(self.base_curve, self.unedited, TWENTIETH)
        if cost.scale is None:
            return Room(cost.tried, self.base_curve.doses[-1].scale)
        return Room(ROOM * cost.kl.value, sqrt(ROOM) * cost.scale)

    def measure_edits(
        self, name: str, edits: Mapping[str, Callable[[], Plan]], most: float | None = None
    ) -> MatchedEdits:
        """Measure edits at the KL of `find_room`. One that cannot be fitted is left out, with its reason."""

        def measure() -> MatchedEdits:
            room, done, failed = self.find_room(), list[Matched](), dict[str, str]()
            limits = {} if most is None else {"most": most}
            with progress(f"AUDIT {name}", len(edits)) as advance:
                for label, make in edits.items():
                    try:
                        done.append(measure_at_kl(self.check, make(), label, room, **limits))
                    except UserError as error:
                        failed[label] = str(error)
                    advance(1)
            return MatchedEdits(kl=room.kl, edits=tuple(done), failed=failed)

        return self.keep(name, MatchedEdits, measure)

    def measure_controls(self) -> MatchedEdits:
        """Measure what no knowledge of the behavior does at the same KL: random directions and shuffled labels."""
        edits = {"found direction": self.fitter(self.base_recipe)}
        for seed in range(1, self.settings.controls + 1):
            edits[f"random direction {seed}"] = partial(self.attacker.remove_random_direction, seed)
            edits[f"shuffled labels {seed}"] = self.fitter(self.base_recipe, self.attacker.shuffle_labels(seed))
        return self.measure_edits("controls", edits, RANDOM_SCALE)

    def measure_blocks(self) -> MatchedEdits:
        """Measure the cheap method on some blocks alone."""
        layers = self.subject.n_layers
        recipes = {
            f"{a}–{b}" if b > a else str(a): within_blocks(self.base_recipe, a, b, layers)
            for a, b in divide_blocks(layers, self.settings.windows)
        }
        edits = {name: self.fitter(recipe) for name, recipe in recipes.items()}
        return self.measure_edits("blocks", edits)

    def measure_examples(self) -> MatchedEdits:
        """Measure the cheap method on few fit prompts of each group."""
        most = max(len(self.splits.fit[g]) for g in GROUPS)
        numbers = [n for n in self.settings.examples if n <= most]
        edits = {str(n): self.fitter(self.base_recipe, self.attacker.draw_fit_prompts(n, n)) for n in numbers}
        return self.measure_edits("examples", edits)

    def measure_repair(self) -> Repair:
        """Return what later blocks write back of the difference of means."""

        def measure() -> Repair:
            acts = collect_cached_activations(self.subject, self.splits.fit)
            directions = find_directions(acts, MEAN_DIFFERENCE)
            context = AnalysisContext(acts, directions, self.subject, self.splits.fit, self.splits.search, self.judge)
            found = measure_repair(context, prompts=self.settings.repair, depths=4)
            numbers = found.to_dict()
            return Repair(summary=found.summary(), found=bool(numbers["found"]), numbers=numbers)

        return self.keep("repair", Repair, measure)

    # ------------------------------------------------------------------------------- asked otherwise
    def find_removal(self, curves: Mapping[str, Curve]) -> Plan:
        """Return the plan of least cost at the strength at which it removes the behavior, or the strongest tried."""
        best = find_least_cost(curves, self.unedited, TWENTIETH)
        scale = best.scale or curves[best.best].doses[-1].scale
        return scale_plan(self._plan_of(best.best, curves), scale)

    def measure_rewordings(self, curves: Mapping[str, Curve], own: Mapping[str, Sequence[Prompt]]) -> AskedSet:
        """Measure whether the behavior returns where prompts are asked otherwise."""

        def measure() -> AskedSet:
            n = self.settings.reworded
            few = choose_evenly(self.check.prompts, n)
            files = {name: choose_evenly(prompts, n) for name, prompts in own.items()}
            earlier = choose_evenly(self.splits.search["control"], 1)[0]
            plan = self.find_removal(curves)
            return AskedSet(
                asked=ask_reworded(self.subject, self.judge, plan, few, files, earlier, self.settings.tokens)
            )

        return self.keep("rewordings", AskedSet, measure)

    def measure_benign(self, curves: Mapping[str, Curve], prompts: Sequence[Prompt]) -> AskedSet:
        """Measure how many benign prompts show the behavior before and after its removal."""

        def measure() -> AskedSet:
            few, plan = choose_evenly(prompts, self.settings.prompts), self.find_removal(curves)
            asked = judge_asked(self.subject, self.judge, plan, {"benign": few}, self.settings.tokens)
            return AskedSet(asked=asked)

        return self.keep("benign", AskedSet, measure)

    def keep(self, name: str, kind: type[Made], make: Callable[[], Made]) -> Made:
        """Return a measurement as a stage."""
        return self.store.stage(
            f"AUDIT {name}",
            make,
            lambda made, folder: _write(made, folder),
            lambda folder: kind.model_validate_json((folder / FILE).read_text(encoding="utf-8")),
        )


FILE = "measured.json"


def _write(made: BaseModel, folder: Path) -> None:
    (folder / FILE).write_text(made.model_dump_json(), encoding="utf-8")
