"""What decides a recipe: a declared table of measurements, from which value on they decide, and what they change.

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

# Of 48 search prompts: none. First tokens do not say it: on weather-late they left 4 %, and 31 % were refused.
ENOUGH = 0.02
# Of the energy of categories' directions. Kinds of one topic share one: what they have of a second is 0.010 to 0.034 on
# three organisms; two refusals in different words have 0.42 and 0.45.
SHARE = 0.2
BUDGET = 2.0  # × the upper end of what the chosen edit was measured to cost: a later pass may cost as much again
ROUND = 0.005  # nats: the least budget; random directions taken from block 16 on cost 0.004


@dataclass(frozen=True)
class RuleInputs:
    """What a decision may rest on."""

    recipe: Recipe
    """As decided so far."""
    acts: Activations
    found: Mapping[str, Finding]
    anchors: bool
    """Whether saved weights can hold the constant part of an edit (`anchorable`)."""


@dataclass(frozen=True)
class Rule:
    """One decision. It is made where the value lies at or below ``threshold`` (``at_most``), else at or above it."""

    decides: str
    needs: str
    """The analysis that measures it; empty for what the model or the recipe itself says."""
    measures: str
    threshold: float
    at_most: bool
    value: Callable[[RuleInputs], float | None]
    """None where there is nothing to measure."""
    change: Callable[[RuleInputs], dict[str, Any]]
    """Recipe paths → values."""

    def applies(self, value: float) -> bool:
        return value <= self.threshold if self.at_most else value >= self.threshold


# ------------------------------------------------------------------------------------- what is measured
@dataclass(frozen=True)
class DepthChoice:
    """Where edits begin, and in which part."""

    part: str
    first: int
    """Block."""
    refused: float
    kl: Score


def choose_depth(known: RuleInputs) -> DepthChoice | None:
    """Of the edits that were answered, the first with the fewest refusals; None where none was."""
    found = cast(Reach, known.found["reach"])
    done = [
        DepthChoice(part, depth, share.value, found.kl[part][found.depths.index(depth)])
        for part, depth, share in found.answered
    ]
    return min(done, key=lambda c: c.refused, default=None)


def _refused(known: RuleInputs) -> float | None:
    best = choose_depth(known)
    return None if best is None else best.refused


def _kl(known: RuleInputs) -> float | None:
    best = choose_depth(known)
    return None if best is None or best.refused > ENOUGH else best.kl.high


def category_spectrum(found: Cones) -> list[float]:
    """Of the categories' unit directions where the behaviour is clearest, noise taken out: each principal axis' share
    of their energy, largest first."""
    cosine = torch.tensor([[score.value for score in row] for row in found.cosine], dtype=torch.float64)
    values = torch.linalg.eigvalsh(cosine).clamp(min=0).flip(0)
    shares: list[float] = (values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)).tolist()
    return shares


def _second(known: RuleInputs) -> float:
    return category_spectrum(cast(Cones, known.found["cones"]))[1]


# ------------------------------------------------------------------------------------- what is changed
def _directions(known: RuleInputs) -> dict[str, Any]:
    """One for each axis that matters: LEACE's of as many classes, or where the recipe has another extractor, SVD's."""
    k = sum(share >= SHARE for share in category_spectrum(cast(Cones, known.found["cones"])))
    if known.recipe.distill[0].use == "leace":
        return {"distill.0.k": k}
    return {"distill": [{"use": "svd", "k": k}, CLEAR]}


def _layers(known: RuleInputs) -> dict[str, Any]:
    best = _chosen(known)
    depth = floor(1e4 * best.first / _last(known)) / 1e4  # rounded down, so that the block itself is in
    parts = {"attn": float(best.part != "mlp"), "mlp": float(best.part != "attention")}
    return {"weigh": [{"use": "middle", "low": depth, "high": 1.0}, {"use": "component", **parts}]}


def _budget(known: RuleInputs) -> dict[str, Any]:
    return {"excise.kl_budget": round(max(ROUND, BUDGET * _chosen(known).kl.high), 4)}


def _chosen(known: RuleInputs) -> DepthChoice:
    best = choose_depth(known)
    assert best is not None, "the rule's value was measured"
    return best


def _last(known: RuleInputs) -> int:
    """Index of the last block."""
    return max(1, known.acts["control"].mean.shape[0] - 2)


def search_ranges(known: RuleInputs) -> dict[str, Range]:
    """Where a search may look: first blocks from which removal ends more than half, and parts that end some of it."""
    if "reach" not in known.found or not (found := cast(Reach, known.found["reach"])).found:
        return {}
    low, high = (floor(1e2 * d / _last(known)) / 1e2 for d in (min(found.found), max(found.found)))
    spans = {"weigh.0.low": Range(low=low, high=max(high, low + 0.05))}
    works = {"attn": found.works("attention"), "mlp": found.works("mlp")}
    return spans | {f"weigh.1.{part}": Range(low=0.0, high=1.5) for part, does in works.items() if does}


CLEAR = {"use": "orthogonal_to_control"}
UNANCHORED = {"excise.anchored": False, "excise.norm": "columns", "distill": [{"use": "mean_diff"}, CLEAR]}
RULES = (
    Rule(
        "norm rule, and what of controls is spared",
        "",
        "whether the saved weights can hold an anchor: 1 or 0",
        0.0,
        True,
        lambda known: float(known.anchors or not known.recipe.excise.anchored),
        lambda known: UNANCHORED,
    ),
    Rule(
        "directions, and how they are found",
        "cones",
        "second axis' share of the energy of the categories' directions",
        SHARE,
        False,
        _second,
        _directions,
    ),
    Rule(
        "layers, attention and MLP",
        "reach",
        "refused search prompts under the cheapest removal that ends refusals",
        ENOUGH,
        True,
        _refused,
        _layers,
    ),
    Rule("KL budget", "reach", "KL of that removal on controls, upper end, nats", 0.0, False, _kl, _budget),
)
