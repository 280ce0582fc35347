"""What all trials share: the activations, and the directions of each list of distill steps that a trial has used."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext

from obliteratus.causal import FitContext
from obliteratus.core.errors import NothingMatchedError, UserError
from obliteratus.core.progress import SILENT, report_to
from obliteratus.core.settings import Experts, Recipe
from obliteratus.core.types import Activations, Directions, Plan, digest_of
from obliteratus.distill import find_directions, load_directions, save_directions
from obliteratus.excise.plan import plan_edits
from obliteratus.pipeline.stages import Stages
from obliteratus.search.space import remove_search
from obliteratus.weigh import weigh_sites

# Lists of distill steps whose directions stay in memory: as many as four switches make. If a space searches a number
# inside a step, almost every trial has a list of its own.
CACHE_SIZE = 16


class DirectionCache:
    """Turns recipes into plans over activations that are collected once, without running the model.

    Only steps that run the model themselves (`FitContext`) cost passes, once for each list of distill steps.
    """

    def __init__(self, stages: Stages, recipe: Recipe) -> None:
        self.stages, self.subject = stages, stages.subject
        space = recipe.search.space if recipe.search else {}
        self.same_steps = not any(path.split(".")[0] == "distill" for path in space)
        self.acts: Activations = stages.probe(1, widest_probe_recipe(recipe))
        self.said = False
        self._directions: OrderedDict[str, Directions] = OrderedDict()

    def plan(self, recipe: Recipe) -> Plan:
        """Return the recipe's plan. If its weights leave no layer, the plan is empty: the unedited model."""
        directions = self.directions(recipe)
        with report_to(SILENT) if self.said else nullcontext():  # what the model lacks is said at the first plan
            self.said = True
            try:
                weights = weigh_sites(directions, self.subject.sites, self.acts, recipe.weigh)
                return plan_edits(self.subject, directions, weights, self.acts, recipe.excise)
            except NothingMatchedError:
                return Plan((), self.subject.source.digest)

    def directions(self, recipe: Recipe) -> Directions:
        """Return the directions of the recipe's distill steps. The most recently used ones are cached."""
        key = digest_of([step.model_dump() for step in recipe.distill])
        if key not in self._directions:
            self._directions[key] = self._find_directions(recipe)
        self._directions.move_to_end(key)
        while len(self._directions) > CACHE_SIZE:
            self._directions.popitem(last=False)
        return self._directions[key]

    def _find_directions(self, recipe: Recipe) -> Directions:
        context = FitContext(self.subject, self.stages.splits.fit, self.stages.judge)
        if not self.same_steps:
            return find_directions(self.acts, recipe.distill, context)
        return self.stages.store.stage(
            "DISTILL 1",
            lambda: find_directions(self.acts, recipe.distill, context),
            save_directions,
            load_directions,
        )


def widest_probe_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe that makes PROBE collect all that any trial may need: anchors, neurons' inputs and routing."""
    space = recipe.search.space if recipe.search else {}
    update: dict[str, object] = {}
    if "excise.anchored" in space:
        update["anchored"] = True
    if "excise.neurons" in space:
        update["neurons"] = recipe.excise.neurons or 0.01  # with any share, all inputs are collected
    if any(path.startswith("excise.experts") for path in space):
        update["experts"] = recipe.excise.experts or Experts(own=True)  # any value makes PROBE read the routing
    if "excise.kl_budget" in space or recipe.excise.kl_budget is not None:
        raise UserError("excise.kl_budget: a search trades off KL itself; remove kl_budget from the recipe")
    return remove_search(recipe).model_copy(update={"excise": recipe.excise.model_copy(update=update)})
