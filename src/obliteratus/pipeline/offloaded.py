"""A run on a model whose weights stay on disk: what can be done of a recipe, and VERIFY in one pass over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe, Step
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.distill.steps import collect_needs
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.memory import LIMIT
from obliteratus.inference.memory_needs import bytes_in_memory, check_offloaded_fits
from obliteratus.summon.load import open_subject
from obliteratus.summon.load_offloaded import open_offloaded
from obliteratus.summon.summary import summarize_model
from obliteratus.verify import Measurement, measure
from obliteratus.verify.before_and_after import measure_side_by_side, streamable_steps


def adapt_recipe(subject: Subject, recipe: Recipe) -> Recipe:
    """The recipe as it is run: where weights stay on disk, scorers that one pass can serve take the others' place.

    UserError for a recipe that would read all weights hundreds of times.
    """
    if subject.offloaded is None:
        return recipe
    asked = {"search": recipe.search, "tune": recipe.tune, "analyze": recipe.analyze}
    many = [f"'{name}'" for name, value in asked.items() if value]
    many += ["distill steps that run the model"] if "model" in collect_needs(recipe.distill) else []
    if many:
        raise UserError(
            f"method '{recipe.name}': {many[0]} would read all weights from disk hundreds of times; allow the whole "
            "model with a larger --memory, or choose a method without it, such as basic or advanced"
        )
    return recipe.model_copy(update={"verify": streamable_steps(recipe.verify)})


def measured(
    store: Store,
    stage: str,
    subject: Subject,
    prompts: PromptSet,
    steps: Sequence[Step],
    before: Measurement | None = None,
) -> Measurement:
    """VERIFY as a stage. All edits are live, so the subject is its own base."""
    return store.stage(
        stage,
        lambda: measure(subject, prompts, steps, before, base=subject),
        lambda found, folder: found.save(folder / "measured"),
        lambda folder: Measurement.load(folder / "measured"),
    )


def compared(
    store: Store, subject: Subject, plan: Plan, report: PromptSet, steps: Sequence[Step], before: Measurement | None
) -> tuple[Measurement, Measurement]:
    """The model before the plan, and under it. before: None where both are still to be measured, side by side."""
    if before is None:
        return store.stage(
            "VERIFY",
            lambda: measure_side_by_side(subject, plan, report, steps),
            _save_pair,
            lambda folder: (Measurement.load(folder / PAIR[0]), Measurement.load(folder / PAIR[1])),
        )
    with applied(subject, plan):
        return before, measured(store, "VERIFY after", subject, report, steps, before)


PAIR = ("before", "after")


def _save_pair(pair: tuple[Measurement, Measurement], folder: Path) -> None:
    for found, name in zip(pair, PAIR, strict=True):
        found.save(folder / name)


def both(store: Store) -> tuple[Measurement, Measurement]:
    """What a run's VERIFY found before and after, however it was taken."""
    pair: tuple[Measurement, Measurement] | None = store.values.get("VERIFY")
    return pair or (store.values["VERIFY before"], store.values["VERIFY after"])


def opened(model: str, opening: dict[str, Any]) -> Subject:
    """The model within the memory budget: its weights stay on disk where they would not fit. Raises UserError where not
    even one block would, or the model cannot be run block by block."""
    start = perf_counter()
    subject = _opened(model, opening)
    note("SUMMON", f"{perf_counter() - start:.1f} s")
    return subject


def _opened(model: str, opening: dict[str, Any]) -> Subject:
    limit = LIMIT.get()
    if limit < math.inf:
        made = summarize_model(model, dtype=opening.get("dtype", "auto"), quantize=opening.get("quantize", ""))
        if bytes_in_memory(made) > limit:
            check_offloaded_fits(made)
            note("SUMMON", f"{made.loaded_bytes / 1e9:.2f} GB of weights stay on disk, a block at a time is in memory")
            return open_offloaded(model, **{k: v for k, v in opening.items() if k != "self_test"})
    return open_subject(model, **opening)
