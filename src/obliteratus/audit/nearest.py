"""The recipe of ours that a traced edit is nearest to, with what agrees and what differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from obliteratus.audit.tensor_trace import PROJECTION, TensorTrace
from obliteratus.audit.verdict import SharedDirection
from obliteratus.core.settings import Recipe, expand_part
from obliteratus.core.types import Edit, Mask, Plan, Shift
from obliteratus.pipeline.presets import list_methods
from obliteratus.pipeline.recipe import load_recipe

ONE_DIRECTION = 0.98  # mean squared overlap above which all tensors remove the same direction
MOST_LAYERS = 0.9  # share of blocks above which an edit is of all of them
SINGLE = ("single", "select", "least_refusing", "interpolate", "rdo", "false_refusal")
"""Steps that choose one direction for all streams."""
WEIGHTS = {"norm rule": 2.0, "covectors": 2.0, "heads": 2.0, "one direction": 1.5, "sign": 2.0}
"""How much a trait counts; others count 1. These are given by the recipe and not by what it measures."""


@dataclass(frozen=True)
class NearestRecipe:
    """A recipe of ours, and why it is near."""

    name: str
    share: float
    """Share (0–1) of the traits, by weight, that agree."""
    agrees: tuple[str, ...]
    differs: tuple[str, ...]
    """Traits that differ, with what was found and what the recipe has."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**vars(self), "agrees": list(self.agrees), "differs": list(self.differs)}


Traits = dict[str, str]


def find_nearest_recipe(
    traces: Sequence[TensorTrace], plan: Plan, shared: SharedDirection | None, n_layers: int
) -> NearestRecipe | None:
    """Return the recipe whose traits agree most with those of the projections; None if nothing was projected."""
    edited = [trace for trace in traces if trace.kind == PROJECTION]
    if not edited:
        return None
    found = describe_edit(edited, plan, shared, n_layers)
    recipes = [_compare(found, load_recipe(name)) for name in list_methods()]
    return max(recipes, key=lambda one: one.share)


def describe_edit(edited: Sequence[TensorTrace], plan: Plan, shared: SharedDirection | None, n_layers: int) -> Traits:
    """Return the traits of an edit in the words that `describe_recipe` uses."""
    blocks = sorted({t.layer for t in edited if 0 <= t.layer < n_layers})
    strength = sorted(t.strength for t in edited)[len(edited) // 2]
    rules = [t.rule for t in edited]
    return {
        "norm rule": max(set(rules), key=rules.count),
        "covectors": _tell(any(t.oblique for t in edited)),
        "heads": _tell(any(t.parts_edited < 1 for t in edited)),
        "one direction": _tell(shared is not None and len(blocks) > 1 and shared.share >= ONE_DIRECTION),
        "sign": _name_strength(strength),
        "blocks": _name_blocks(blocks, n_layers),
        "directions": str(sorted(t.rank for t in edited)[len(edited) // 2]),
        "embedding": _tell(any(t.part == "embed" for t in edited)),
        "masked neurons": _tell(any(isinstance(change, Mask) for change in plan.edits)),
        "biases": _tell(any(_moves_bias(change) for change in plan.edits)),
    }


def _moves_bias(change: Any) -> bool:
    return isinstance(change, Shift) or (isinstance(change, Edit) and change.anchor is not None)


def _tell(value: bool) -> str:
    return "yes" if value else "no"


def _name_strength(strength: float) -> str:
    """Return what a strength does."""
    limits = ((0.0, "adds"), (0.95, "removes in part"), (1.1, "removes"), (1.5, "removes and more"))
    return next((name for limit, name in limits if strength < limit), "reflects")


def _name_blocks(blocks: Sequence[int], n_layers: int) -> str:
    if not blocks:
        return "none"
    if len(blocks) >= MOST_LAYERS * n_layers:
        return "all"
    first = blocks[0] / max(n_layers, 1)
    contiguous = len(blocks) == blocks[-1] - blocks[0] + 1 and blocks[-1] == n_layers - 1
    if contiguous and first >= 0.7:
        return "last quarter"
    return "upper half" if contiguous and first >= 0.45 else "chosen ones"


def describe_recipe(recipe: Recipe) -> Traits:
    """Return the traits that an edit by the recipe has; those that depend on the model are left out."""
    excise, steps = recipe.excise, [step.use for step in recipe.distill]
    k = _count_directions(recipe)
    oblique = excise.least_change or "leace" in steps
    return {
        "norm rule": excise.norm,
        "covectors": _tell(oblique),
        "heads": _tell(excise.heads is not None and excise.heads < 1),
        "one direction": _tell(any(step in SINGLE for step in steps)),
        "sign": _name_strength(excise.strength),
        "directions": str(k) if recipe.passes == 1 else f"{k}–{k * recipe.passes}",
        "embedding": _tell("embed" in {own for part in excise.parts for own in expand_part(part)}),
        "masked neurons": _tell(bool(excise.neurons)),
        "biases": _tell(excise.anchored or bool(excise.steer)),
        **_describe_blocks(recipe),
    }


def _count_directions(recipe: Recipe) -> int:
    """Return how many directions a layer loses in one pass."""
    found = [int(step.options.get("k", 1)) for step in recipe.distill if step.use in ("svd", "whitened_svd")]
    return (found or [1])[0] + sum(step.use == "union" for step in recipe.distill)


def _agrees(found: str, wanted: str) -> bool:
    """Return whether a trait is what the recipe has, or lies in its range."""
    low, _, high = wanted.partition("–")
    return int(low) <= int(found) <= int(high or low) if found.isdigit() else found == wanted


def _describe_blocks(recipe: Recipe) -> Traits:
    """Return which blocks a recipe edits, unless it measures that."""
    known: dict[str, Callable[[dict[str, Any]], str]] = {
        "all": lambda options: "all",
        "skip_first": lambda options: "all",
        "adaptive_scale": lambda options: "chosen ones",
        "middle": lambda options: "last quarter" if options["low"] >= 0.7 else "upper half",
    }
    if recipe.analyze:
        return {}
    chosen = [known[step.use](dict(step.options)) for step in recipe.weigh if step.use in known]
    return {"blocks": chosen[0] if chosen else "chosen ones"}


def _compare(found: Traits, recipe: Recipe) -> NearestRecipe:
    wanted = describe_recipe(recipe)
    agrees = tuple(name for name, value in wanted.items() if _agrees(found[name], value))
    differs = tuple(
        f"{name} {found[name]}, the recipe's {value}" for name, value in wanted.items() if name not in agrees
    )
    whole = sum(WEIGHTS.get(name, 1.0) for name in wanted)
    near = sum(WEIGHTS.get(name, 1.0) for name in agrees)
    return NearestRecipe(recipe.name or "", near / whole, tuple(f"{n} {found[n]}" for n in agrees), differs)
