"""Measurements change a recipe: each rule of the table in turn, each decision with its number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from obliteratus.analyze import Finding
from obliteratus.analyze.page import page
from obliteratus.core.settings import Range, Recipe, Search
from obliteratus.core.types import Activations
from obliteratus.pipeline.recipe import dump_toml, parse_recipe, replace_values
from obliteratus.pipeline.rules import RULES, Rule, RuleInputs, search_ranges

TRIALS = 20  # of a search that begins at the advice: the ranges are narrow


@dataclass(frozen=True)
class Reason:
    """A decision with its number, as the run keeps it."""

    decides: str
    measures: str
    value: float | None
    """None: not measured, and nothing decided."""
    threshold: float
    at_most: bool
    changes: Mapping[str, Any]
    """By path into the recipe; empty where the recipe stays as it was."""


@dataclass(frozen=True)
class Advice:
    """A recipe that measurements have changed, and why."""

    recipe: Recipe
    reasons: tuple[Reason, ...]
    ranges: Mapping[str, Range] = field(default_factory=dict)
    """For a search that begins at the recipe: what may be tried, by path."""
    found: Mapping[str, Finding] = field(default_factory=dict)
    """What was measured; empty where the advice was read from disk."""

    def told(self) -> dict[str, Any]:
        """For the run's record."""
        spans = {path: span.model_dump(exclude_defaults=True) for path, span in self.ranges.items()}
        return {"reasons": [asdict(reason) for reason in self.reasons], "ranges": spans}


def advise(recipe: Recipe, acts: Activations, found: Mapping[str, Finding], *, anchors: bool = True) -> Advice:
    """Each rule of the table in turn, on the recipe as the rules before it left it. The result analyses nothing more.

    found: findings by analysis; a rule whose analysis is missing (skipped, or out of budget) decides nothing, and says
    so. anchors: whether the model's weights can hold anchored edits.
    """
    known, reasons = RuleInputs(recipe, acts, found, anchors), list[Reason]()
    for rule in RULES:
        made, reason = apply_rule(rule, known)
        known = replace(known, recipe=made)
        reasons.append(reason)
    done = known.recipe.model_copy(update={"analyze": ()})
    return Advice(done, tuple(reasons), search_ranges(replace(known, recipe=done)), found)


def fit_recipe_to_weights(recipe: Recipe, anchors: bool) -> Recipe:
    """The recipe as the model's weights can hold it: the rule that must be applied before anything is probed."""
    return apply_rule(RULES[0], RuleInputs(recipe, Activations({}, -1), {}, anchors))[0]


def apply_rule(rule: Rule, known: RuleInputs) -> tuple[Recipe, Reason]:
    """The recipe after one rule."""
    value = rule.value(known) if not rule.needs or rule.needs in known.found else None
    changes = rule.change(known) if value is not None and rule.applies(value) else {}
    made = replace_values(known.recipe, changes, known.recipe.name) if changes else known.recipe
    return made, Reason(rule.decides, rule.measures, value, rule.threshold, rule.at_most, changes)


# -------------------------------------------------------------------------------------------- on disk
def save_advice(advice: Advice, folder: Path) -> None:
    """Write advice.json, advised.toml (to run or search from), and the analyses' page and numbers, into a folder."""
    data = {**advice.told(), "recipe": advice.recipe.model_dump(mode="json")}
    (folder / "advice.json").write_text(json.dumps(data, indent=1))
    search = {"search": Search(trials=TRIALS, space=dict(advice.ranges))} if advice.ranges else {}
    (folder / "advised.toml").write_text(dump_toml(advice.recipe.model_copy(update={**search, "passes": 1})))
    numbers = {name: finding.to_dict() for name, finding in advice.found.items()}
    (folder / "analysis.json").write_text(json.dumps(numbers, indent=1))
    (folder / "index.html").write_text(page(advice.found, f"What decided the recipe of {advice.recipe.name}"))


def load_advice(folder: Path) -> Advice:
    """What `save_advice` wrote, but for the findings."""
    data = json.loads((folder / "advice.json").read_text())
    spans = {path: Range(**span) for path, span in data["ranges"].items()}
    made = parse_recipe(data["recipe"], str(folder / "advice.json"))
    return Advice(made, tuple(Reason(**reason) for reason in data["reasons"]), spans)
