"""Nothing is chosen on report prompts: with their labels swapped, every method makes the same plan."""

from __future__ import annotations

import pytest
import torch
from tests.support.refuser import asked, refuser
from tests.support.searches import REFUSAL, search_recipe, search_subject

from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Plan, Prompt, PromptSet, Splits
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run_on_splits
from obliteratus.search import StudyLocation, search

SHORT = {"verify": [{"use": "behavior", "tokens": 6}, {"use": "first_token_kl"}]}
INFORMED = {**SHORT, "analyze.1.depths": 4, "analyze.1.low": 0.0, "analyze.1.tokens": 4}


def in_part(part: str) -> PromptSet:
    return PromptSet({g: tuple(Prompt(f"{p.text} ({part})") for p in ps) for g, ps in asked().groups.items()})


def splits(swapped: str = "") -> Splits:
    """The refuser's prompts in all three parts, target and control swapped in one of them."""
    parts = {part: in_part(part) for part in ("fit", "search", "report")}
    if swapped:
        groups = parts[swapped].groups
        parts[swapped] = PromptSet({"target": groups["control"], "control": groups["target"]})
    return Splits(parts["fit"], parts["search"], parts["report"], "digest")


def same(one: Plan, two: Plan) -> bool:
    if [e.site for e in one.edits] != [e.site for e in two.edits]:
        return False
    pairs = zip(one.edits, two.edits, strict=True)
    return all(torch.equal(a.basis, b.basis) and a.strength == b.strength for a, b in pairs)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "recipe",
    [load_recipe("basic", {**SHORT, "excise.kl_budget": 0.01}), load_recipe("informed", INFORMED)],
    ids=["kl budget", "informed"],
)
def test_a_run_chooses_nothing_on_report_prompts(recipe: Recipe) -> None:
    plain, poisoned = (run_on_splits(recipe, refuser(word=REFUSAL), splits(part)) for part in ("", "report"))
    assert same(plain.plan, poisoned.plan)
    assert plain.run.recipe == poisoned.run.recipe
    rates = [result.run.before["refusal.target"].value for result in (plain, poisoned)]
    assert rates == [1, 0]  # the report itself did change
    assert plain.run.optimism["search"] == poisoned.run.optimism["search"]


def test_a_search_chooses_nothing_on_report_prompts() -> None:
    found = [
        search(search_recipe(4), search_subject(), splits(part), Store(), StudyLocation("", "study"))
        for part in ("", "report")
    ]
    assert found[0].picked == found[1].picked
    assert found[0].run.optimism["search"] == found[1].run.optimism["search"]
    assert found[0].run.optimism["search"].n == 12
    assert [t.scores for t in found[0].trials] == [t.scores for t in found[1].trials]
    assert same(found[0].plan, found[1].plan)


def test_the_search_prompts_do_decide() -> None:
    """Negative control: with their labels swapped, a KL budget and a search end elsewhere."""
    recipe = load_recipe("basic", {**SHORT, "excise.kl_budget": 0.01})
    plain, poisoned = (run_on_splits(recipe, refuser(word=REFUSAL), splits(part)) for part in ("", "search"))
    assert not same(plain.plan, poisoned.plan)
