"""Let measurements change a recipe: apply each rule of `rules.RULES`, and keep the number behind each decision."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from obliteratus.analyze import AnalysisContext, Finding, try_analyses
from obliteratus.analyze.page import findings_page
from obliteratus.causal import FitContext
from obliteratus.core.progress import note
from obliteratus.core.settings import Excise, Range, Recipe, Search, Step, expand_part
from obliteratus.core.toml import dump_toml
from obliteratus.core.types import Activations, Splits, Subject
from obliteratus.distill import find_directions
from obliteratus.excise.writers import can_hold_anchors
from obliteratus.judge.judge import Judge
from obliteratus.pipeline.recipe import parse_recipe, replace_values
from obliteratus.pipeline.rules import GENTLEST, RULES, Rule, RuleInputs, search_ranges

TRIALS = 20  # trials of a search that starts from the advice, whose ranges are narrow


@dataclass(frozen=True)
class Reason:
    """A decision with the number that it rests on, as the record of the run keeps it."""

    decides: str
    measures: str
    value: float | None
    """None if the value was not measured and nothing was decided."""
    threshold: float
    at_most: bool
    changes: Mapping[str, Any]
    """Path into the recipe → new value. Empty if the recipe stays as it was."""


@dataclass(frozen=True)
class Advice:
    """A recipe that measurements have changed, and the reasons."""

    recipe: Recipe
    reasons: tuple[Reason, ...]
    ranges: Mapping[str, Range] = field(default_factory=dict)
    """Path into the recipe → values to try in a search that starts from this recipe."""
    findings: Mapping[str, Finding] = field(default_factory=dict)
    """Findings by analysis. Empty if the advice was loaded from disk."""

    def to_dict(self) -> dict[str, Any]:
        """Return the reasons and ranges as plain data for the record of the run."""
        ranges = {path: values.model_dump(exclude_defaults=True) for path, values in self.ranges.items()}
        return {"reasons": [asdict(reason) for reason in self.reasons], "ranges": ranges}


def can_anchor(subject: Subject, options: Excise) -> bool:
    """Return whether the weights of all edited writers can hold an anchored edit."""
    parts = {part for name in options.parts for part in expand_part(name)}
    return can_hold_anchors(subject, [s for s in subject.sites if s.role == "writes" and s.part in parts])


def analyze_and_advise(
    subject: Subject,
    splits: Splits,
    recipe: Recipe,
    distill: Sequence[Step],
    acts: Activations,
    anchors: bool,
    judge: Judge,
) -> Advice:
    """Run the recipe's analyses and return its advice. Each analysis uses the directions settled by those before it.

    distill: steps that find the first directions. acts: activations of the fit prompts. anchors: see `can_anchor`.
    """
    context, findings = FitContext(subject, splits.fit, judge), dict[str, Finding]()
    directions = find_directions(acts, distill, context)
    for step in recipe.analyze:
        known = AnalysisContext(acts, directions, subject, splits.fit, splits.search, judge)
        findings |= try_analyses(known, [step])[0]
        advice = advise(recipe, acts, findings, anchors=anchors)
        if advice.recipe.distill != distill:
            distill, directions = advice.recipe.distill, find_directions(acts, advice.recipe.distill, context)
    for reason in advice.reasons:
        if reason.decides == GENTLEST and reason.changes:
            note("ANALYZE", describe_gentlest(judge.name, reason))
    return advice


def describe_gentlest(behavior: str, reason: Reason) -> str:
    """Return what is said of a run whose chosen removal does not end the behavior."""
    assert reason.value is not None
    return (
        f"no removal ends {behavior} and leaves answers fluent; the one that leaves least of it is chosen, "
        f"{reason.value:.0%} on search prompts"
    )


def advise(recipe: Recipe, acts: Activations, findings: Mapping[str, Finding], *, anchors: bool = True) -> Advice:
    """Apply all rules in order, each to the recipe that the ones before it left, and drop the recipe's analyses.

    A rule whose analysis is missing from the findings (it was skipped, or out of budget) decides nothing and says so.
    anchors: whether the model's weights can hold anchored edits.
    """
    inputs, reasons = RuleInputs(recipe, acts, findings, anchors), list[Reason]()
    for rule in RULES:
        changed, reason = apply_rule(rule, inputs)
        inputs = replace(inputs, recipe=changed)
        reasons.append(reason)
    advised = inputs.recipe.model_copy(update={"analyze": ()})
    return Advice(advised, tuple(reasons), search_ranges(replace(inputs, recipe=advised)), findings)


def fit_recipe_to_weights(recipe: Recipe, anchors: bool) -> Recipe:
    """Return the recipe without anchors if the weights cannot hold them. This rule applies before PROBE."""
    return apply_rule(RULES[0], RuleInputs(recipe, Activations({}, -1), {}, anchors))[0]


def apply_rule(rule: Rule, inputs: RuleInputs) -> tuple[Recipe, Reason]:
    """Return the recipe after one rule, and the reason for what the rule changed."""
    value = rule.value(inputs) if not rule.needs or rule.needs in inputs.findings else None
    changes = rule.change(inputs) if value is not None and rule.applies(value) else {}
    changed = replace_values(inputs.recipe, changes, inputs.recipe.name) if changes else inputs.recipe
    return changed, Reason(rule.decides, rule.measures, value, rule.threshold, rule.at_most, changes)


def prepare_search(advice: Advice) -> Recipe:
    """Return the recipe with a search over the ranges, which chooses the strengths instead of a fit; or as it is."""
    if not advice.ranges:
        return advice.recipe.model_copy(update={"passes": 1})
    excise = advice.recipe.excise.model_copy(update={"own_difference": False})
    search = Search(trials=TRIALS, space=dict(advice.ranges))
    return advice.recipe.model_copy(update={"search": search, "excise": excise, "tune": None, "passes": 1})


# -------------------------------------------------------------------------------------------- on disk
def save_advice(advice: Advice, folder: Path) -> None:
    """Write advice.json, advised.toml (a recipe to run or to search from), analysis.json and index.html."""
    data = {**advice.to_dict(), "recipe": advice.recipe.model_dump(mode="json")}
    (folder / "advice.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    (folder / "advised.toml").write_text(dump_toml(prepare_search(advice)), encoding="utf-8")
    numbers = {name: finding.to_dict() for name, finding in advice.findings.items()}
    (folder / "analysis.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    title = f"What decided the recipe of {advice.recipe.name}"
    (folder / "index.html").write_text(findings_page(advice.findings, title), encoding="utf-8")


def load_advice(folder: Path) -> Advice:
    """Load what `save_advice` wrote. The findings are not loaded."""
    data = json.loads((folder / "advice.json").read_text(encoding="utf-8"))
    ranges = {path: Range(**values) for path, values in data["ranges"].items()}
    recipe = parse_recipe(data["recipe"], str(folder / "advice.json"))
    return Advice(recipe, tuple(Reason(**reason) for reason in data["reasons"]), ranges)
