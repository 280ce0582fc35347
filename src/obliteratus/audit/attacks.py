"""The edits that an audit tries: methods fitted on given prompts, and controls that know nothing of the behavior."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch

from obliteratus.core.errors import UserError
from obliteratus.core.progress import SILENT, report_to
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Probe, Recipe, Step, Tune
from obliteratus.core.types import Plan, Prompt, PromptSet, Splits, Subject
from obliteratus.distill.steps import collect_needs
from obliteratus.excise.writers import remove_from_writers
from obliteratus.judge.judge import Judge
from obliteratus.pipeline.recipe import check_runs, load_recipe
from obliteratus.pipeline.run import find_plan
from obliteratus.pipeline.stages import Stages
from obliteratus.tune.fit import tune_plan

GROUPS = ("target", "control")


@dataclass(frozen=True)
class Attacker:
    """Whoever edits the model: it knows the fit and the search prompts, and none that the audit reports on."""

    subject: Subject
    splits: Splits
    judge: Judge
    seed: int = 0

    def fit(self, recipe: Recipe, fit: PromptSet | None = None) -> Plan:
        """Return the plan that a recipe finds, on other fit prompts if they are given.

        Raises UserError for a recipe that cannot run with them.
        """
        splits = self.splits if fit is None else replace(self.splits, fit=fit)
        recipe = check_runs(recipe.model_copy(update={"seed": self.seed}), splits.fit.groups)
        stages = Stages(self.subject, splits, Store(), self.judge)
        with report_to(SILENT) if is_cheap(recipe) else nullcontext():  # an audit makes dozens of them
            if recipe.analyze:
                recipe = stages.advise(recipe).recipe
            return find_plan(recipe, stages)[0]

    def tune(self, plan: Plan, settings: Tune, goal: float) -> Plan:
        """Return the plan with strengths and directions fitted by gradient steps, from where it stands.

        goal: share of search prompts on which the behavior may be left.
        """
        return tune_plan(self.subject, plan, self.splits, settings, self.seed, self.judge, goal=goal).plan

    def draw_fit_prompts(self, n: int, seed: int) -> PromptSet:
        """Return n fit prompts of each group, drawn by the seed, or all of a group that has fewer."""
        return PromptSet({g: draw_prompts(self.splits.fit[g], n, seed) for g in GROUPS})

    def shuffle_labels(self, seed: int) -> PromptSet:
        """Return the fit prompts with the labels dealt out anew, half of either group to each.

        Freely dealt labels would give one side more target prompts by chance, and the difference of means would point
        along the very direction that is to be left out.
        """
        generator = torch.Generator().manual_seed(seed)
        sides: tuple[list[Prompt], list[Prompt]] = [], []
        for group in GROUPS:
            order = torch.randperm(len(self.splits.fit[group]), generator=generator).tolist()
            for place, i in enumerate(order[: len(order) // 2 * 2]):
                sides[place % 2].append(self.splits.fit[group][i])
        return PromptSet(dict(zip(GROUPS, map(tuple, sides), strict=True)))

    def remove_random_direction(self, seed: int) -> Plan:
        """Return the plan that removes one direction, drawn evenly from the sphere, from what all blocks write."""
        row = torch.randn(1, self.subject.width, generator=torch.Generator().manual_seed(seed))
        unit = torch.nn.functional.normalize(row, dim=1)
        return remove_from_writers(self.subject, unit, range(self.subject.n_layers))


def draw_prompts(prompts: Sequence[Prompt], n: int, seed: int) -> tuple[Prompt, ...]:
    """Return n of the prompts, or all if there are fewer, drawn without replacement by the seed, in their own order.

    Evenly spaced ones of prompts that come in turn from two topics can be all of one topic.
    """
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))[:n]
    return tuple(prompts[i] for i in sorted(order.tolist()))


# -------------------------------------------------------------------------------------------- recipes
def load_methods(names: Sequence[str]) -> dict[str, Recipe]:
    """Return the recipes by name, those of files by the file's stem.

    Raises UserError for one that does not exist, that is a search, that strengthens, or that is given twice.
    """
    found: dict[str, Recipe] = {}
    for name in names:
        if (stem := Path(name).stem if name.endswith(".toml") else name) in found:
            raise UserError(f"method '{name}' is given twice; name each once")
        found[stem] = load_recipe(name)
    for name, recipe in found.items():
        if recipe.search is not None:
            raise UserError(f"method '{name}' is a search, which an audit does not run; name a method without one")
        if recipe.excise.strength <= 0:
            raise UserError(f"method '{name}' strengthens the behavior; an audit is about methods that remove it")
        check_runs(recipe, GROUPS)
    return found


def is_cheap(recipe: Recipe) -> bool:
    """Return whether a recipe only reads activations: it takes no gradients and runs no analyses."""
    return recipe.tune is None and not recipe.analyze and "model" not in collect_needs(recipe.distill)


def with_directions(recipe: Recipe, k: int) -> Recipe:
    """Return the recipe with k directions a layer: the mean difference, then those along which target prompts spread.

    Nothing else of it changes, so that k alone is varied.
    """
    step = Step.model_validate({"use": "svd", "k": k, "centered": True})
    return recipe.model_copy(update={"distill": (step,), "probe": Probe()})


def within_blocks(recipe: Recipe, first: int, last: int, n_layers: int) -> Recipe:
    """Return the recipe on blocks ``first`` to ``last`` alone, both included, each with its own mean difference."""
    depth = max(n_layers - 1, 1)
    ends = {"low": max(0.0, (first - 0.25) / depth), "high": min(1.0, (last + 0.25) / depth)}
    step = Step.model_validate({"use": "middle", **ends})
    return recipe.model_copy(update={"weigh": (step,), "distill": (Step(use="mean_diff"),), "probe": Probe()})


def divide_blocks(n_layers: int, windows: int) -> list[tuple[int, int]]:
    """Return first and last block of so many windows, as equal as possible, that cover all blocks."""
    count = min(windows, n_layers)
    ends = [round(i * n_layers / count) for i in range(count + 1)]
    return [(a, b - 1) for a, b in pairwise(ends)]
