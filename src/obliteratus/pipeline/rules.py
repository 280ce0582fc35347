"""Declare how measurements decide a recipe: what each rule measures, its threshold, and what it changes.

The thresholds were found on the model organisms: see docs/experiments/informed.md, "What `informed` decides by".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import floor
from typing import Any, cast

import torch

from obliteratus.analyze import Finding
from obliteratus.analyze.cones import Cones
from obliteratus.analyze.reach import Reach
from obliteratus.core.results import Score
from obliteratus.core.settings import Range, Recipe
from obliteratus.core.types import Activations
from obliteratus.distill.eigen import eigenvalues
from obliteratus.distill.steps import mean_difference, relative_length

# Less than one of 96 search prompts. First tokens cannot replace the answers here: on weather-late they said that 4 %
# of the behavior was left where 31 % of the prompts were still refused.
BEHAVIOR_ENDED = 0.01
# Share of the energy of the categories' directions that makes a principal axis a direction of its own. Kinds of one
# topic had 0.010 to 0.034 on their second axis (three organisms); two refusals in different words had 0.42 and 0.45.
AXIS_SHARE = 0.2
# Excess of a generalized eigenvalue over 1, relative to the first one, that makes a direction of its own. One topic had
# 0.065 to 0.086 (astronomy, weather-late); two orthogonal shifts of equally many prompts have 1, two with a cosine of ⅓
# have ½.
EIGENVALUE_RATIO = 0.5
# Generalized eigenvalues are compared up to this number. More than four kinds of a behavior were never seen apart.
MOST_DIRECTIONS = 4
# With fewer target prompts, the eigenvalues beyond the first are those of chance.
LEAST_FOR_EIGENVALUES = 50
# Factor on the upper end of the KL that the chosen edit was measured to cost, since a later pass may cost as much.
KL_FACTOR = 2.0
# Smallest KL budget in nats. Random directions taken from block 16 on cost 0.004.
MIN_KL_BUDGET = 0.005


@dataclass(frozen=True)
class RuleInputs:
    """What a rule may decide by."""

    recipe: Recipe
    """The recipe as the rules before this one left it."""
    acts: Activations
    findings: Mapping[str, Finding]
    """Findings by analysis."""
    anchors: bool
    """Whether the model's weights can hold anchored edits (`advise.can_anchor`)."""


@dataclass(frozen=True)
class Rule:
    """One decision. It is made if the value is at most ``threshold`` (``at_most``), or else at least ``threshold``."""

    decides: str
    needs: str
    """Name of the analysis that measures the value. Empty if the model or the recipe gives it."""
    measures: str
    threshold: float
    at_most: bool
    value: Callable[[RuleInputs], float | None]
    """Returns None if there is nothing to measure."""
    change: Callable[[RuleInputs], dict[str, Any]]
    """Returns path into the recipe → new value."""

    def applies(self, value: float) -> bool:
        """Return whether the value is on the side of the threshold on which the rule changes the recipe."""
        return value <= self.threshold if self.at_most else value >= self.threshold


# ---------------------------------------------------------------------------------------- measurements
@dataclass(frozen=True)
class DepthChoice:
    """Which part to edit, and from which block on."""

    part: str
    first_block: int
    remaining: float
    """Share of search target prompts that still show the behavior under this edit."""
    kl: Score


def choose_depth(inputs: RuleInputs) -> DepthChoice | None:
    """Return the edit that leaves the least of the behavior among those whose answers were found to be fluent.

    Of equals, the one with the smallest KL. None if there is none.
    """
    reach = cast(Reach, inputs.findings["reach"])
    choices = [
        DepthChoice(edit.part, edit.depth, edit.shown.value, reach.kl[edit.part][reach.depths.index(edit.depth)])
        for edit in reach.answered
        if reach.is_fluent(edit)
    ]
    return min(choices, key=lambda choice: (choice.remaining, choice.kl.value), default=None)


def category_spectrum(cones: Cones) -> list[float]:
    """Return each principal axis' share of the energy of the categories' directions, largest first.

    The directions are those of the stream where the behavior is clearest, with noise removed.
    """
    cosine = torch.tensor([[score.value for score in row] for row in cones.cosine], dtype=torch.float64)
    values = torch.linalg.eigvalsh(cosine).clamp(min=0).flip(0)
    shares: list[float] = (values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)).tolist()
    return shares


def _remaining_rate(inputs: RuleInputs) -> float | None:
    best = choose_depth(inputs)
    return None if best is None else best.remaining


def _rate_that_no_edit_ends(inputs: RuleInputs) -> float | None:
    best = choose_depth(inputs)
    return None if best is None or best.remaining <= BEHAVIOR_ENDED else best.remaining


def _removal_kl(inputs: RuleInputs) -> float | None:
    best = choose_depth(inputs)
    return None if best is None else _at_most(best.kl)


def _at_most(score: Score) -> float:
    """Return the upper end of the interval, or the value where there is none."""
    return score.high if score.has_interval else score.value


def _second_axis(inputs: RuleInputs) -> float:
    return category_spectrum(cast(Cones, inputs.findings["cones"]))[1]


# --------------------------------------------------------------------------------------------- changes
def _set_directions(inputs: RuleInputs) -> dict[str, Any]:
    """Use one direction for each axis with enough energy: classes for LEACE, or else rows of an SVD."""
    k = sum(share >= AXIS_SHARE for share in category_spectrum(cast(Cones, inputs.findings["cones"])))
    if inputs.recipe.distill[0].use == "leace":
        return {"distill.0.k": k}
    return {"distill": [{"use": "svd", "k": k}, ORTHOGONAL]}


def _drop_anchors(inputs: RuleInputs) -> dict[str, Any]:
    """Take directions orthogonal to the control mean, and keep column lengths unless gradients have to pass."""
    return WITHOUT_ANCHORS | ({} if inputs.recipe.tune else {"excise.norm": "columns"})


def eigenvalue_ratios(inputs: RuleInputs) -> list[float]:
    """Return each generalized eigenvalue's excess over 1, relative to the first one's, largest first; none if unknown.

    They are those of the stream whose mean difference scores best. Known where PROBE kept the prompts' spread, enough
    prompts were given, and the recipe has an oblique step to replace.
    """
    first, target = inputs.recipe.distill[0], inputs.acts["target"]
    spread = target.rows is not None or target.sketch is not None
    if first.use != "leace" or not spread or target.count < LEAST_FOR_EIGENVALUES:
        return []
    length = relative_length(inputs.acts, mean_difference(inputs.acts).norm(dim=1))
    excess = eigenvalues(inputs.acts, int(length.argmax()), MOST_DIRECTIONS, first.options["shrinkage"]) - 1
    ratios: list[float] = (excess / excess[0].clamp(min=1e-6)).tolist()
    return ratios


def _second_eigenvalue(inputs: RuleInputs) -> float | None:
    """Return the second ratio, where the categories do not tell the number of directions."""
    ratios = [] if "cones" in inputs.findings else eigenvalue_ratios(inputs)
    return ratios[1] if len(ratios) > 1 else None


def _set_eigenvectors(inputs: RuleInputs) -> dict[str, Any]:
    """Use one generalized eigenvector for each eigenvalue that is large enough, with the shrinkage of the recipe."""
    k = sum(ratio >= EIGENVALUE_RATIO for ratio in eigenvalue_ratios(inputs))
    step = {"use": "generalized_eigen", "k": k, "shrinkage": inputs.recipe.distill[0].options["shrinkage"]}
    return {"distill": [step]}


def _set_layers(inputs: RuleInputs) -> dict[str, Any]:
    best = _require_depth(inputs)
    depth = floor(1e4 * best.first_block / _last_block(inputs)) / 1e4  # rounded down, so that the block is included
    parts = {"attn": float(best.part != "mlp"), "mlp": float(best.part != "attention")}
    return {"weigh": [{"use": "middle", "low": depth, "high": 1.0}, {"use": "component", **parts}]}


def _set_best_layers(inputs: RuleInputs) -> dict[str, Any]:
    """Set the layers, and one pass: nothing says that the answers would stay fluent under another one."""
    return {**_set_layers(inputs), "passes": 1}


def _set_kl_budget(inputs: RuleInputs) -> dict[str, Any]:
    return {"excise.kl_budget": round(max(MIN_KL_BUDGET, KL_FACTOR * _at_most(_require_depth(inputs).kl)), 4)}


def _require_depth(inputs: RuleInputs) -> DepthChoice:
    best = choose_depth(inputs)
    assert best is not None, "a rule changes the recipe only after its value was measured"
    return best


def _last_block(inputs: RuleInputs) -> int:
    return max(1, inputs.acts["control"].mean.shape[0] - 2)


def search_ranges(inputs: RuleInputs) -> dict[str, Range]:
    """Return what a search should try: first blocks from which removal ends over half of the behavior, and the parts
    that end some of it."""
    if "reach" not in inputs.findings:
        return {}
    reach = cast(Reach, inputs.findings["reach"])
    if not reach.effective_depths:
        return {}
    low, high = (
        floor(1e2 * d / _last_block(inputs)) / 1e2 for d in (min(reach.effective_depths), max(reach.effective_depths))
    )
    ranges = {"weigh.0.low": Range(low=low, high=max(high, low + 0.05))}
    works = {"attn": reach.works("attention"), "mlp": reach.works("mlp")}
    return ranges | {f"weigh.1.{part}": Range(low=0.0, high=1.5) for part, does in works.items() if does}


GENTLEST = "layers and passes where no fluent removal ends the behavior"
ORTHOGONAL = {"use": "orthogonal_to_control"}
WITHOUT_ANCHORS = {"excise.anchored": False, "distill": [{"use": "mean_diff"}, ORTHOGONAL]}
RULES = (
    Rule(
        decides="norm rule, and whether control prompts' mean is kept",
        needs="",
        measures="whether the saved weights can hold an anchor: 1 or 0",
        threshold=0.0,
        at_most=True,
        value=lambda inputs: float(inputs.anchors or not inputs.recipe.excise.anchored),
        change=_drop_anchors,
    ),
    Rule(
        decides="number of directions, and how they are found",
        needs="cones",
        measures="second principal axis' share of the energy of the categories' directions",
        threshold=AXIS_SHARE,
        at_most=False,
        value=_second_axis,
        change=_set_directions,
    ),
    Rule(
        decides="generalized eigenvectors instead of the mean difference",
        needs="",
        measures="second generalized eigenvalue's excess over 1, relative to the first one's, without categories",
        threshold=EIGENVALUE_RATIO,
        at_most=False,
        value=_second_eigenvalue,
        change=_set_eigenvectors,
    ),
    Rule(
        decides="layers, attention and MLP",
        needs="reach",
        measures="rate left on search prompts under the cheapest fluent removal that ends it",
        threshold=BEHAVIOR_ENDED,
        at_most=True,
        value=_remaining_rate,
        change=_set_layers,
    ),
    Rule(
        decides=GENTLEST,
        needs="reach",
        measures="rate left on search prompts under the fluent removal that leaves least, where none ends it",
        threshold=BEHAVIOR_ENDED,
        at_most=False,
        value=_rate_that_no_edit_ends,
        change=_set_best_layers,
    ),
    Rule(
        decides="KL budget",
        needs="reach",
        measures="KL of that removal on control prompts, upper end, nats",
        threshold=0.0,
        at_most=False,
        value=lambda inputs: None if inputs.recipe.tune else _removal_kl(inputs),
        change=_set_kl_budget,
    ),
)
