"""What the measurements of an audit share, and the curves of the methods. Every result is a stage of the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from obliteratus.audit.attacks import GROUPS, Attacker, draw_prompts, is_cheap, load_methods
from obliteratus.audit.doses import Curve, Dose, DoseCheck, Room, measure_curve
from obliteratus.audit.removal_cost import GOALS, TWENTIETH, find_least_cost, summarize_cost
from obliteratus.audit.results import ROOM
from obliteratus.audit.settings import AuditSettings
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe, Tune
from obliteratus.core.types import Plan, PromptSet, Splits, Subject
from obliteratus.excise.plan import load_plan, save_plan
from obliteratus.judge.judge import Judge
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.verify.presence import Presence, Screening, load_screening, save_screening, screen_prompts

FITTED = "fitted"
"""The curve of the cheapest method's plan after some gradient steps."""
CHEAP = "least_change"  # of the methods without gradients the one that costs least on most organisms
FILE = "measured.json"
Made = TypeVar("Made", bound=BaseModel)


@dataclass(frozen=True)
class AuditContext:
    """What all measurements of one audit share: prompts, attacker, and the curves of the methods."""

    subject: Subject
    splits: Splits
    settings: AuditSettings
    store: Store
    judge: Judge
    found_presence: Presence | None = None
    failed: dict[str, str] = field(default_factory=dict)
    """By method, why it could not be fitted."""

    def screened(self) -> AuditContext:
        """Return the audit with the judge who knows the model's own words, and the fit prompts that are as expected."""
        few = PromptSet({g: draw_prompts(self.splits.fit[g], self.settings.fit, self.settings.seed) for g in GROUPS})

        def screen() -> Screening:
            return screen_prompts(self.subject, few, self.judge, self.settings.tokens, hears=True)

        found = self.store.stage("ANSWERS", screen, save_screening, load_screening)
        splits, judge = replace(self.splits, fit=found.choose(few)), replace(self.judge, own_words=found.own_words)
        return replace(self, splits=splits, judge=judge, found_presence=found.presence)

    @property
    def presence(self) -> Presence:
        assert self.found_presence is not None, "screened() comes first"
        return self.found_presence

    @cached_property
    def attacker(self) -> Attacker:
        return Attacker(self.subject, self.splits, self.judge, self.settings.seed)

    @cached_property
    def check(self) -> DoseCheck:
        few = {g: draw_prompts(self.splits.report[g], self.settings.prompts, self.settings.seed) for g in GROUPS}
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
        tuned = load_recipe("tuned")
        steps = {
            "steps": self.settings.tune_steps,
            "prompts": self.settings.tune_prompts,
            "watch": self.settings.tokens,
        }
        settings = (tuned.tune or Tune()).model_copy(update={**steps, "balance": False})
        start = self.fitter(self.methods[best])
        return lambda: self.attacker.tune(self.find_plan(best, start).scaled(scale), settings, tuned.stop_below)

    @cached_property
    def base_method(self) -> str:
        """The cheap method whose variants are measured: that of the given ones with the least cost of removal.

        If none is cheap it is `CHEAP`, and if that cannot be fitted the best of the given ones.
        """
        curves = self.measure_methods([name for name, recipe in self.methods.items() if is_cheap(recipe)])
        if not curves and (curve := self.try_curve(CHEAP, self.fitter(load_recipe(CHEAP)))) is not None:
            curves = {CHEAP: curve}
        return find_least_cost(curves or self.measure_methods(list(self.methods)), self.unedited, TWENTIETH).best

    @property
    def base_recipe(self) -> Recipe:
        return self.methods.get(self.base_method) or load_recipe(self.base_method)

    @cached_property
    def base_curve(self) -> Curve:
        """The curve of the cheap method."""
        return self.measure_curve(self.base_method, self.fitter(self.base_recipe))

    def plan_of(self, name: str, curves: Mapping[str, Curve]) -> Plan:
        """Return the plan of a method's curve, or of `FITTED`."""
        if name != FITTED:
            return self.find_plan(name, self.fitter(self.methods[name]))
        best = find_least_cost({n: c for n, c in curves.items() if n != FITTED}, self.unedited, TWENTIETH).best
        return self.find_plan(FITTED, self.fit_by_gradients(best, curves[best]))

    def find_room(self) -> Room:
        """Return what other edits may cost: `ROOM` times the cheap method's cost of removal.

        Where it does not remove the behavior, it is the largest KL of its curve.
        """
        cost = summarize_cost(self.base_curve, self.unedited, TWENTIETH)
        if cost.scale is None:
            return Room(cost.tried, self.base_curve.doses[-1].scale)
        return Room(ROOM * cost.kl.value, sqrt(ROOM) * cost.scale)

    def find_removal(self, curves: Mapping[str, Curve]) -> Plan:
        """Return the plan of least cost at the strength at which it removes the behavior, or the strongest tried."""
        best = find_least_cost(curves, self.unedited, TWENTIETH)
        scale = best.scale or curves[best.best].doses[-1].scale
        return self.plan_of(best.best, curves).scaled(scale)

    def keep(self, name: str, kind: type[Made], make: Callable[[], Made]) -> Made:
        """Return a measurement as a stage."""
        return self.store.stage(
            f"AUDIT {name}",
            make,
            _write,
            lambda folder: kind.model_validate_json((folder / FILE).read_text(encoding="utf-8")),
        )


def _write(made: BaseModel, folder: Path) -> None:
    (folder / FILE).write_text(made.model_dump_json(), encoding="utf-8")
