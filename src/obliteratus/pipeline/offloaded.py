"""Open a model within a memory limit, and adapt a recipe to weights that stay on disk."""

from __future__ import annotations

import math
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.settings import Recipe, Step
from obliteratus.core.types import Subject
from obliteratus.distill.steps import collect_needs
from obliteratus.inference.memory import MEMORY_LIMIT
from obliteratus.inference.memory_needs import bytes_in_memory, check_offloaded_fits
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.summon.load import open_subject
from obliteratus.summon.load_offloaded import open_offloaded
from obliteratus.summon.summary import summarize_model
from obliteratus.verify.before_and_after import streamable_steps


def adapt_recipe(subject: Subject, recipe: Recipe) -> Recipe:
    """Return the recipe as it can run: with weights on disk, only scorers that one pass over the weights can serve.

    Raises UserError for a recipe that would read all weights hundreds of times.
    """
    if subject.offloaded is None:
        return recipe
    recipe = recipe.model_copy(update={"distill": tuple(map(_leave_out_expensive, recipe.distill))})
    if recipe.tune is not None and recipe.tune.balance and not recipe.tune.steps and not recipe.analyze:
        recipe = _leave_out_balance(recipe)
    stages = {"search": recipe.search, "tune": recipe.tune, "analyze": recipe.analyze}
    expensive = [f"'{name}'" for name, value in stages.items() if value]
    expensive += ["distill steps that run the model"] if "model" in collect_needs(recipe.distill) else []
    if expensive:
        raise UserError(
            f"method '{recipe.name}': {expensive[0]} would read all weights from disk hundreds of times; "
            "allow the whole model with a larger --memory, or choose a method without it, such as leace"
        )
    return recipe.model_copy(update={"verify": streamable_steps(recipe.verify)})


def _leave_out_balance(recipe: Recipe) -> Recipe:
    """Return the recipe with the layers and strengths of `least_change`, with a note."""
    note("TUNE", "the weights stay on disk: strengths are not balanced, and the layers of least_change are edited")
    uniform = load_recipe("least_change")
    excise = recipe.excise.model_copy(update={"own_difference": False})
    return recipe.model_copy(update={"tune": None, "weigh": uniform.weigh, "excise": excise})


def _leave_out_expensive(step: Step) -> Step:
    """Return a step that runs the model as left out, with a note, if the recipe wants it only where possible."""
    if step.when != "possible" or "model" not in collect_needs([step]):
        return step
    note(step.use, "the weights stay on disk: this step, which would run the model many times, is left out")
    return step.model_copy(update={"when": "never"})


def open_within_memory(model: str, opening: dict[str, Any]) -> Subject:
    """Open the model within the limit of `memory_limit`. Weights that would not fit stay on disk.

    Raises UserError if not even one block fits, or if the model cannot run block by block.
    """
    limit = MEMORY_LIMIT.get()
    if limit < math.inf:
        made = summarize_model(model, dtype=opening.get("dtype", "auto"), quantize=opening.get("quantize", ""))
        if bytes_in_memory(made) > limit:
            check_offloaded_fits(made)
            note("SUMMON", f"{made.loaded_bytes / 1e9:.2f} GB of weights stay on disk; one block at a time is loaded")
            return open_offloaded(model, **{k: v for k, v in opening.items() if k != "self_test"})
    return open_subject(model, **opening)
