"""A run on a model whose weights stay on disk: what of a recipe can be done, and VERIFY in one pass over the weights."""

from __future__ import annotations

from collections.abc import Sequence

from obliteratus.distill.steps import needs_of
from obliteratus.errors import UserError
from obliteratus.excise.live import applied
from obliteratus.settings import Recipe, Step
from obliteratus.store import Store
from obliteratus.types import Plan, PromptSet, Subject
from obliteratus.verify import Measured, verify
from obliteratus.verify.streamed import side_by_side, streamable


def suited_to(subject: Subject, recipe: Recipe) -> Recipe:
    """The recipe as it is run: where weights stay on disk, scorers that one pass can serve take the others' place.

    UserError for a recipe that would read all weights hundreds of times.
    """
    if subject.shelf is None:
        return recipe
    asked = {"search": recipe.search, "tune": recipe.tune, "analyze": recipe.analyze}
    many = [f"'{name}'" for name, value in asked.items() if value]
    many += ["distill steps that run the model"] if "model" in needs_of(recipe.distill) else []
    if many:
        raise UserError(
            f"method '{recipe.name}': {many[0]} would read all weights from disk hundreds of times; allow the whole "
            "model with a larger --memory, or choose a method without it, such as basic or advanced"
        )
    return recipe.model_copy(update={"verify": streamable(recipe.verify)})


def measured(
    store: Store,
    stage: str,
    subject: Subject,
    prompts: PromptSet,
    steps: Sequence[Step],
    before: Measured | None = None,
) -> Measured:
    """VERIFY as a stage. All edits are live, so the subject is its own base."""
    return store.stage(
        stage,
        lambda: verify(subject, prompts, steps, before, base=subject),
        lambda found, folder: found.save(folder / "measured"),
        lambda folder: Measured.load(folder / "measured"),
    )


def compared(
    store: Store, subject: Subject, plan: Plan, report: PromptSet, steps: Sequence[Step], before: Measured | None
) -> tuple[Measured, Measured]:
    """The model before the plan, and under it. before: None where both are still to be measured, side by side."""
    if before is None:
        return store.stage(
            "VERIFY",
            lambda: side_by_side(subject, plan, report, steps),
            lambda pair, folder: [found.save(folder / name) for found, name in zip(pair, PAIR, strict=True)] and None,
            lambda folder: (Measured.load(folder / PAIR[0]), Measured.load(folder / PAIR[1])),
        )
    with applied(subject, plan):
        return before, measured(store, "VERIFY after", subject, report, steps, before)


PAIR = ("before", "after")
