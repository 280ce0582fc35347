"""Load recipes from TOML, override values by path, and validate them against everything that is registered."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from obliteratus.analyze import analyses
from obliteratus.causal import extractors
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.settings import Recipe, Step
from obliteratus.distill import check_needs
from obliteratus.distill.steps import collect_needs
from obliteratus.pipeline.presets import METHODS
from obliteratus.pipeline.values import override_values, validate_recipe
from obliteratus.verify import scorers
from obliteratus.verify.ladder import check_judge
from obliteratus.weigh import weighers


def load_recipe(source: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a method by name, or a TOML file by path, and replace values by path (such as ``weigh.0.floor``).

    Raises UserError for a method, step or option that does not exist, and for a value out of its range.

    >>> ob.load_recipe("basic", {"excise.strength": 0.7})
    <Recipe: basic, mean_diff → single, weighed by all, on attn.out, mlp.out>
    """
    where = str(source)
    recipe = parse_recipe(_resolve_judge_files(METHODS.read(where), Path(where).parent), where)
    return replace_values(recipe, overrides, where) if overrides else recipe


def _resolve_judge_files(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a recipe's data with the paths of files that its judge names and that lie beside the recipe."""
    judge = data.get("judge")
    if not isinstance(judge, dict):
        return data
    found = {
        key: str(folder / value)
        for key, value in judge.items()
        if key in ("behavior", "phrases") and isinstance(value, str) and value and (folder / value).is_file()
    }
    return data | {"judge": judge | found}


def parse_recipe(data: Mapping[str, Any], where: str) -> Recipe:
    """Return a validated recipe from plain data. Raises UserError that names ``where`` the data comes from."""
    recipe = validate_recipe(data, where)
    kinds = (
        (extractors, recipe.distill),
        (weighers, recipe.weigh),
        (scorers, recipe.verify),
        (analyses, recipe.analyze),
    )
    for registry, steps in kinds:
        for step in steps:
            registry.check(step.use, step.options)
    if recipe.search is not None:
        _check_space(recipe, where)
    return recipe


def _check_space(recipe: Recipe, where: str) -> None:
    """Both ends of each range must give a valid recipe, so that a search does not fail at one of its trials."""
    assert recipe.search is not None
    plain = recipe.model_copy(update={"search": None})
    for path, values in recipe.search.space.items():
        for value in values.ends:
            try:
                replace_values(plain, {path: value}, where)
            except UserError as error:
                raise UserError(f"recipe '{where}': search.space '{path}': {error}") from error


def check_runs(recipe: Recipe, groups: Collection[str]) -> Recipe:
    """Return the recipe as it runs with these groups of prompts: a step that is used where possible may be left out.

    Raises UserError, before weights are loaded, if the recipe cannot run with them.
    """
    recipe = leave_out_impossible(recipe, groups)
    check_needs(recipe.distill, groups, recipe.probe.keep)
    _check_optional_groups(recipe, groups)
    check_judge(recipe.judge)
    for step in recipe.analyze:
        if "rows" in analyses[step.use].needs and recipe.probe.keep != "rows":
            raise UserError(f"analysis '{step.use}' needs every prompt's activations; set probe.keep = \"rows\"")
    return recipe


OPTIONAL_GROUPS = ("bypass", "keep")


def leave_out_impossible(recipe: Recipe, groups: Collection[str]) -> Recipe:
    """Return the recipe without the steps ``when = "possible"`` whose group of prompts is missing, and say so once."""

    def settle(step: Step) -> Step:
        missing = (collect_needs([step]) & {*OPTIONAL_GROUPS}) - {*groups}
        if step.when != "possible" or not missing:
            return step
        note(step.use, f"there are no {min(missing)} prompts: this step of {recipe.name or 'the recipe'} is left out")
        return step.model_copy(update={"when": "never"})

    return recipe.model_copy(update={"distill": tuple(map(settle, recipe.distill))})


def _check_optional_groups(recipe: Recipe, groups: Collection[str]) -> None:
    """Raise UserError for a group that is missing, as one whose rate a search is to change, and for bypass prompts that
    no step uses; say of keep prompts that they are only measured."""
    needs, name = collect_needs(recipe.distill), recipe.name or "the recipe"
    searched = {aim.partition(".")[2] for aim in (recipe.search.minimize if recipe.search else ())}
    aims = {*recipe.needs, *(searched & {"keep", "benign"})}
    if missing := sorted(aims - {*groups}):
        raise UserError(f"--{missing[0]} is missing: {name} needs {missing[0]} prompts beside target and control")
    if "bypass" in groups and "bypass" not in needs:
        raise UserError(f"--bypass: no step of {name} uses bypass prompts; leave them out, or add bypass_contrast")
    if "keep" in groups and "keep" not in needs | aims and not recipe.tune:
        note("keep", f"no step of {name} spares the keep prompts: their rate is only measured")


def without_trial_count(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain data without the number of trials, which a resumed search may raise."""
    data = recipe.model_dump(mode="json")
    if recipe.search is not None:
        del data["search"]["trials"]
    return data


# ------------------------------------------------------------------------------------- values by path
def replace_values(recipe: Recipe, values: Mapping[str, Any], where: str) -> Recipe:
    """Return the recipe with values replaced by path. Raises UserError if the result is not valid."""
    return parse_recipe(override_values(recipe, values), where)
