"""What no trial changes, computed once: the activations, and the directions of each list of distill steps."""

from __future__ import annotations

from collections import OrderedDict

from obliteratus.causal import FitContext
from obliteratus.core.errors import NothingMatchedError, UserError
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Activations, Directions, Plan, PromptSet, Subject, digest_of
from obliteratus.distill import find_directions, load_directions, save_directions
from obliteratus.excise.plan import plan_edits
from obliteratus.pipeline.run import probed
from obliteratus.search.space import without_search
from obliteratus.weigh import weigh_sites

# Directions of so many different lists of steps stay in memory: choices of a space are few, and where a step's own
# number is searched each trial has its own anyway.
KEPT = 8


class DirectionCache:
    """Model, fit prompts and activations: recipes become plans over them, with no pass through the model.

    Only steps that ask the model themselves (`FitContext`) cost passes, and each list of distill steps costs them once.
    """

    def __init__(self, subject: Subject, fit: PromptSet, made: Recipe, store: Store) -> None:
        self.subject, self.fit, self.store = subject, fit, store
        self.fixed = made.search is None or not any(p.split(".")[0] == "distill" for p in made.search.space)
        self.acts: Activations = probed(store, "PROBE 1", subject, fit, richest_recipe(made))
        self._directions: OrderedDict[str, Directions] = OrderedDict()

    def plan(self, made: Recipe) -> Plan:
        """The plan of a recipe. Weights that leave no layer are an empty plan: the unedited model."""
        directions = self.directions(made)
        try:
            weights = weigh_sites(directions, self.subject.sites, self.acts, made.weigh)
            return plan_edits(self.subject, directions, weights, self.acts, made.excise)
        except NothingMatchedError:
            return Plan((), self.subject.source.digest)

    def directions(self, made: Recipe) -> Directions:
        """What the recipe's distill steps find; the last few lists of steps are kept."""
        key = digest_of([step.model_dump() for step in made.distill])
        if key not in self._directions:
            self._directions[key] = self._distilled(made)
        self._directions.move_to_end(key)
        while len(self._directions) > KEPT:
            self._directions.popitem(last=False)
        return self._directions[key]

    def _distilled(self, made: Recipe) -> Directions:
        lab = FitContext(self.subject, self.fit)
        if not self.fixed:
            return find_directions(self.acts, made.distill, lab)
        return self.store.stage(
            "DISTILL 1", lambda: find_directions(self.acts, made.distill, lab), save_directions, load_directions
        )


def richest_recipe(made: Recipe) -> Recipe:
    """The recipe that wants all of PROBE that any trial may want: anchors, and what neurons are fed."""
    space = made.search.space if made.search else {}
    update: dict[str, object] = {}
    if "excise.anchored" in space:
        update["anchored"] = True
    if "excise.neurons" in space:
        update["neurons"] = made.excise.neurons or 0.01  # any share: all inputs are read either way
    if "excise.kl_budget" in space or made.excise.kl_budget is not None:
        raise UserError("excise.kl_budget: a search weighs KL itself; leave the budget out")
    return without_search(made).model_copy(update={"excise": made.excise.model_copy(update=update)})
