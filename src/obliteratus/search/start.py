"""Search a recipe's values from Python: splits the prompts, takes a space where there is none, and names the study."""

from __future__ import annotations

from pathlib import Path

from obliteratus.core.progress import shows_progress
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe
from obliteratus.core.types import PromptSet, Subject
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.prompts import split_prompts
from obliteratus.search.run import SearchResult, StudyLocation, check_pick, search, set_trial_count
from obliteratus.search.space import add_default_search


@shows_progress
def run_search(
    recipe: Recipe | str,
    subject: Subject,
    prompts: PromptSet,
    trials: int | None = None,
    *,
    storage: str | Path = "",
    study: str = "",
    pick: str = "balanced",
    force: bool = False,
) -> SearchResult:
    """Try values of a recipe as live plans on search prompts, and measure the chosen one on report prompts.

    recipe: from `load_recipe`, or what that takes. One without a search gets the default space: how hard to edit each
    part, from which depth. trials: of the whole study; None takes the recipe's number. storage: a journal file or a
    storage URL of Optuna, so that a study goes on later or in several processes; empty keeps it in memory. study: its
    name there. pick: the member of the front to choose, as ``balanced``, ``first``, ``last`` or a number from 1. force:
    edit a model that does not show the behavior. Raises UserError for what the user can mend.

    >>> ob.run_search(searched, subject, prompts, trials=2, force=True)  # doctest: +ELLIPSIS
    <SearchResult: 2 trials, ... on the front; member ... is chosen (trial ...); ...>
    """
    check_pick(pick)
    wanted = add_default_search(recipe if isinstance(recipe, Recipe) else load_recipe(recipe))
    wanted = wanted if trials is None else set_trial_count(wanted, trials)
    splits = split_prompts(prompts, wanted.seed, uses_search_split=True, split_by=wanted.split_by, force=force)
    location = StudyLocation(str(storage), study or f"{subject.source.id} {wanted.name}")
    return search(wanted, subject, splits, Store(), location, pick, force)
