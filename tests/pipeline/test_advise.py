"""What decides a recipe: planted findings change it as the table says, each reason has its number, and runs keep it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.contexts import refusing_context
from tests.support.planted import make_moments
from tests.support.refuser import LAYERS, asked, refuser, shuffled
from tests.support.tiny import tiny_subject

from obliteratus.analyze import Finding, analyze
from obliteratus.analyze.answer_check import AnsweredEdit
from obliteratus.analyze.cones import Cones
from obliteratus.analyze.reach import Reach
from obliteratus.core.results import Run, Score
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe, Step
from obliteratus.core.types import Activations, Edit, Moments, Prompt, PromptSet
from obliteratus.excise.bake.tensors import bake
from obliteratus.pipeline.advise import (
    Advice,
    Reason,
    advise,
    describe_gentlest,
    fit_recipe_to_weights,
    load_advice,
    prepare_search,
    save_advice,
)
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.rules import (
    AXIS_SHARE,
    BEHAVIOR_ENDED,
    EIGENVALUE_RATIO,
    GENTLEST,
    KL_FACTOR,
    RULES,
    category_spectrum,
)
from obliteratus.pipeline.run import run
from obliteratus.rebirth.model_card import make_reason_rows, render_model_card

DEPTHS = (0, 2, 4, 6)
ACTS = Activations({g: Moments(1, torch.zeros(9, 4)) for g in ("target", "control")}, -1)  # of eight blocks


def score(value: float) -> Score:
    return Score(value=value, low=value - 0.01, high=value + 0.01, n=8, unit="")


def reached(
    *answered: tuple[str, int, float],
    mlp: tuple[float, ...] = (0.3, 0.5, 0.7, 1.0),
    loops: tuple[float, ...] = (),
    unedited: float | None = None,
) -> Reach:
    """A finding with these answered edits. Removal works from 0 to 4 on; random directions leave all.

    loops: the edits' shares of degenerate answers, 0 without. unedited: that of the unedited model.
    """
    left = {"both": (0.0, 0.0, 0.01, 0.6), "attention": (0.0, 0.02, 0.2, 0.9), "mlp": mlp, "random": (1.0,) * 4}
    kl = {
        "both": (0.9, 0.4, 0.06, 0.01),
        "attention": (0.5, 0.05, 0.02, 0.01),
        "mlp": (0.01,) * 4,
        "random": (0.0,) * 4,
    }
    tables = [{part: tuple(map(score, row)) for part, row in table.items()} for table in (left, kl)]
    pairs = zip(answered, loops or (0.0,) * len(answered), strict=True)
    edits = tuple(AnsweredEdit(p, d, score(x), score(share)) for (p, d, x), share in pairs)
    effective = tuple(d for d, own in zip(DEPTHS, left["both"], strict=True) if own < 0.5)
    working = frozenset(part for part, row in left.items() if part != "random" and min(row) < 0.99)
    looping = None if unedited is None else score(unedited)
    return Reach(DEPTHS, tables[0], tables[1], edits, ("N",), effective, working, looping)


def coned(cosine: list[list[float]]) -> Cones:
    """A finding with these cosines between categories."""
    n, zero = len(cosine), torch.zeros(9)
    table = tuple(tuple(map(score, row)) for row in cosine)
    names = tuple(f"c{i}" for i in range(n))
    return Cones(names, (9,) * n, 8, table, zero, torch.zeros(2, 9), zero, 0.05)


def advised(found: Mapping[str, Finding], recipe: Recipe | None = None, anchors: bool = True) -> Advice:
    return advise(recipe or load_recipe("informed", UNIFORM), ACTS, found, anchors=anchors)


UNIFORM: dict[str, Any] = {"excise.own_difference": False, "tune": None, "passes": 3}
"""As `informed`, with the strengths of EXCISE and later passes, so that there is a KL budget to decide."""
ANCHORED = UNIFORM | {"excise.anchored": True, "excise.least_change": False}


def because(advice: Advice, decides: str) -> Reason:
    return next(reason for reason in advice.reasons if decides in reason.decides)


# ------------------------------------------------------------------------------------------------------- decisions
def test_the_edit_that_ended_refusals_is_chosen() -> None:
    made = advised({"reach": reached(("attention", 6, 0.3), ("attention", 2, 0.0))})
    low, parts = (step.options for step in made.recipe.weigh)
    assert low["low"] == pytest.approx(2 / 7, abs=1e-4)
    assert low["low"] <= 2 / 7
    assert (parts["attn"], parts["mlp"]) == (1.0, 0.0)
    assert made.recipe.excise.kl_budget == pytest.approx(KL_FACTOR * 0.06)
    reason = because(made, "layers")
    assert (reason.value, reason.threshold, reason.at_most) == (0.0, BEHAVIOR_ENDED, True)
    assert because(made, "KL budget").value == pytest.approx(0.06)


def test_balanced_strengths_need_no_kl_budget() -> None:
    """What `informed` does: the judge ends at the weakest strengths that are enough."""
    made = advised({"reach": reached(("attention", 6, 0.3), ("attention", 2, 0.0))}, load_recipe("informed"))
    assert made.recipe.weigh[0].options["low"] == pytest.approx(2 / 7, abs=1e-4)
    assert (made.recipe.excise.kl_budget, made.recipe.passes) == (None, 1)
    assert because(made, "KL budget").value is None
    search = prepare_search(made)
    assert (search.tune, search.excise.own_difference, bool(search.search)) == (None, False, True)


def test_another_edit_is_another_recipe() -> None:
    """Negative control: what attention alone left is now too much, and both parts are edited, from deeper on."""
    made = advised({"reach": reached(("attention", 2, BEHAVIOR_ENDED + 0.01), ("both", 4, 0.0))})
    assert made.recipe.weigh[0].options["low"] == pytest.approx(4 / 7, abs=1e-4)
    assert [made.recipe.weigh[1].options[part] for part in ("attn", "mlp")] == [1.0, 1.0]


def shifted(ways: int) -> Activations:
    """Sixty prompts a group; target prompts are shifted in this many orthogonal ways by turns."""
    rows = torch.randn(2, 60, 9, 48, generator=torch.Generator().manual_seed(0))
    for way in range(ways):
        rows[0, way::ways, 1:, way] += 12
    return Activations({g: make_moments(x) for g, x in zip(("target", "control"), rows, strict=True)}, -1)


def test_several_generalized_eigenvectors_are_used_where_prompts_differ_in_several_ways() -> None:
    """Without categories. One way only, categories, or a recipe without covectors leave the extraction as it is."""
    recipe = load_recipe("informed")
    made = advise(recipe, shifted(2), {})
    (step,) = made.recipe.distill
    assert (step.use, step.options["k"]) == ("generalized_eigen", 2)
    assert step.options["shrinkage"] == recipe.distill[0].options["shrinkage"]
    value = because(made, "generalized eigenvectors").value
    assert value is not None
    assert value > EIGENVALUE_RATIO
    assert advise(recipe, shifted(1), {}).recipe.distill == recipe.distill
    known = advise(recipe, shifted(2), {"cones": coned([[1.0, 0.99], [0.99, 1.0]])})
    assert known.recipe.distill[0].use == "leace"
    assert because(known, "generalized eigenvectors").value is None
    anchored = load_recipe("informed", ANCHORED)
    assert advise(anchored, shifted(2), {}, anchors=False).recipe.distill[0].use == "mean_diff"


def test_where_nothing_was_answered_the_recipe_stays() -> None:
    made = advised({"reach": reached()})
    assert made.recipe.weigh == load_recipe("informed").weigh
    assert made.recipe.excise.kl_budget is None
    assert because(made, "layers").value is None
    assert because(made, "layers").changes == {}
    assert because(made, "KL budget").value is None


def test_where_nothing_ends_refusals_the_edit_that_leaves_least_is_chosen() -> None:
    made = advised({"reach": reached(("both", 4, 0.5), ("attention", 4, 0.3), ("both", 2, 0.3))})
    assert made.recipe.weigh[0].options["low"] == pytest.approx(4 / 7, abs=1e-4)  # of two equal ones, the gentler
    assert [made.recipe.weigh[1].options[part] for part in ("attn", "mlp")] == [1.0, 0.0]
    assert made.recipe.passes == 1
    assert made.recipe.excise.kl_budget == pytest.approx(KL_FACTOR * 0.03)
    assert because(made, "layers").changes == {}
    assert because(made, GENTLEST).value == 0.3
    assert "the one that leaves least of it is chosen, 30%" in describe_gentlest("refusal", because(made, GENTLEST))


def test_an_edit_that_ends_refusals_with_fluency_is_not_chosen() -> None:
    edits = (("both", 0, 0.0), ("both", 2, 0.2), ("both", 4, 0.6))
    made = advised({"reach": reached(*edits, loops=(0.3, 0.04, 0.0), unedited=0.0)})
    assert made.recipe.weigh[0].options["low"] == pytest.approx(2 / 7, abs=1e-4)
    assert (made.recipe.passes, because(made, GENTLEST).value) == (1, 0.2)
    fluent = advised({"reach": reached(*edits, loops=(0.3, 0.04, 0.0), unedited=0.25)})  # control: no more than before
    assert fluent.recipe.weigh[0].options["low"] == 0.0
    assert (fluent.recipe.passes, because(fluent, GENTLEST).value) == (load_recipe("informed", UNIFORM).passes, None)
    broken = advised({"reach": reached(*edits, loops=(0.3, 0.3, 0.3), unedited=0.0)})
    assert broken.recipe.weigh == load_recipe("informed").weigh


@pytest.mark.parametrize(("cosine", "k"), [(0.95, 1), (0.5, 2), (0.0, 2)])
def test_categories_with_axes_of_their_own_get_directions(cosine: float, k: int) -> None:
    made = advised({"cones": coned([[1, cosine], [cosine, 1]])})
    assert made.recipe.distill[0].options.get("k", 1) == k
    assert because(made, "directions").value == pytest.approx((1 - cosine) / 2)


def test_many_categories_of_two_kinds_are_two_directions() -> None:
    cosine = [[1.0 if i == j else 0.9 if i % 2 == j % 2 else 0.0 for j in range(8)] for i in range(8)]
    assert advised({"cones": coned(cosine)}).recipe.distill[0].options["k"] == 2
    assert category_spectrum(coned(cosine))[2] < AXIS_SHARE
    assert sum(category_spectrum(coned(cosine))) == pytest.approx(1)


def test_weights_without_room_for_an_anchor_get_a_norm_rule() -> None:
    anchored = load_recipe("informed", ANCHORED)
    made = advised({"cones": coned([[1, 0], [0, 1]])}, anchored, anchors=False)
    assert not made.recipe.excise.anchored
    assert made.recipe.excise.norm == "columns"
    assert [step.use for step in made.recipe.distill] == ["svd", "orthogonal_to_control"]
    assert because(made, "norm rule").value == 0
    assert fit_recipe_to_weights(anchored, anchors=False).excise == made.recipe.excise
    assert fit_recipe_to_weights(anchored, anchors=True) == anchored
    assert because(made, "norm rule").changes
    assert advised({}, anchored).recipe.excise.anchored
    for recipe, anchors in ((anchored, True), (load_recipe("informed"), False)):  # the second needs no anchors
        assert not because(advised({}, recipe, anchors), "norm rule").changes


def test_what_was_not_measured_decides_nothing_and_says_so() -> None:
    made = advised({})
    assert made.recipe == load_recipe("informed", UNIFORM).model_copy(update={"analyze": ()})
    assert [reason.value for reason in made.reasons[1:]] == [None] * (len(RULES) - 1)


def test_a_search_may_look_where_removal_works() -> None:
    spans = advised({"reach": reached()}).ranges
    assert (spans["weigh.0.low"].low, spans["weigh.0.low"].high) == (0.0, pytest.approx(4 / 7, abs=0.01))
    assert set(spans) == {"weigh.0.low", "weigh.1.attn", "weigh.1.mlp"}
    assert "weigh.1.mlp" not in advised({"reach": reached(mlp=(1.0,) * 4)}).ranges
    none = replace(reached(), effective_depths=(), working=frozenset())
    assert advised({"reach": none}).ranges == {}


# -------------------------------------------------------------------------------------------------- with models
def grouped(prompts: PromptSet) -> PromptSet:
    """Fit, search and report prompts of the refuser, the same ones."""
    parts = ("fit", "search", "report")
    groups = {
        g: tuple(Prompt(f"{p.text}{' ' * i}", split=part) for i, part in enumerate(parts) for p in members)
        for g, members in prompts.groups.items()
    }
    return PromptSet(groups)


def informed(**changed: Any) -> Recipe:
    short = {"verify": [{"use": "behavior", "tokens": 4}, {"use": "first_token_kl"}], "analyze.1.depths": LAYERS}
    short |= {"analyze.1.low": 0.0, "analyze.1.tokens": 4}
    return load_recipe("informed", {**short, **changed})


@pytest.mark.parametrize("block", [2, 4])
def test_edits_begin_at_the_deepest_block_from_which_they_work(block: int) -> None:
    """Attention of one block writes the refusal, and the next block's MLP what tips the answer; none above matters."""
    plan, found, *_ = run(informed(), refuser(block=block), grouped(asked()), force=True)
    assert min(e.site.layer for e in plan.edits) == block + 1
    assert {e.site.part for e in plan.edits} == {"mlp.out"}
    assert found.after["refusal.target"].value == 0
    reasons = {r["decides"]: r for r in found.advice["reasons"]}
    assert reasons["layers, attention and MLP"]["value"] == 0
    assert found.recipe.analyze == ()


def test_groups_that_differ_by_chance_decide_nothing() -> None:
    _, found, *_ = run(informed(**{"weigh.0.low": 0.0}), refuser(), grouped(shuffled(asked())), force=True)
    reason = next(r for r in found.advice["reasons"] if r["decides"].startswith("layers"))
    assert reason["changes"] == {}


def test_the_run_keeps_reasons_and_people_see_them() -> None:
    _, found, *_ = run(informed(), refuser(), grouped(asked()), force=True)
    assert Run.model_validate_json(found.model_dump_json()).advice == found.advice
    text = render_model_card(found.model_copy(update={"saved": {"form": "plan"}}))
    for row in make_reason_rows(found):
        assert all(cell in text for cell in row)
    assert "not measured" in text  # these prompts have no categories


def test_an_advice_comes_back_from_disk_and_can_be_searched_from(tmp_path: Path) -> None:
    context = refusing_context()
    found = analyze(context, [Step(use="reach", depths=LAYERS)])
    made = advise(load_recipe("informed"), context.activations, found)
    save_advice(made, tmp_path)
    assert load_advice(tmp_path) == replace(made, findings={})
    assert "<svg" in (tmp_path / "index.html").read_text() or "<img" in (tmp_path / "index.html").read_text()
    assert set(json.loads((tmp_path / "analysis.json").read_text())) == {"reach"}
    search = load_recipe(tmp_path / "advised.toml").search
    assert search is not None
    assert set(search.space) == set(made.ranges)


def test_a_resumed_run_measures_nothing_twice(tmp_path: Path) -> None:
    subject, prompts = refuser(), grouped(asked())
    first = run(informed(), subject, prompts, Store(tmp_path), force=True)[1]
    store = Store(tmp_path)
    again = run(informed(), subject, prompts, store, force=True)[1]
    assert again.advice == first.advice
    assert again.recipe == first.recipe
    assert again.after == first.after
    never = lambda *args: pytest.fail("a finished stage must not run again")  # noqa: E731
    assert store.stage("ANALYZE", never, never, never).findings == {}


def test_activations_are_probed_once_for_analysis_and_first_pass() -> None:
    """By counting what passes: with the analyses left out, the same stages, and as many probes."""
    store = Store()
    run(informed(), refuser(), grouped(asked()), store, force=True)
    assert [name for name in store.seconds if name.startswith("PROBE")] == ["PROBE 1"]


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma2", "mixtral", "granitemoehybrid", "qwen3_next"])
def test_it_runs_on_every_kind_of_model_and_what_it_gives_can_be_saved(name: str) -> None:
    """Whether or not they have biases: an edit of least change needs none."""
    subject = tiny_subject(name)
    plan, found, *_ = run(informed(**{"analyze.1.depths": 2}), subject, grouped(asked()), force=True)
    assert found.recipe.excise.least_change
    assert all(isinstance(edit, Edit) and edit.anchor is None for edit in plan.edits)
    for make in bake(subject, plan).values():
        assert torch.isfinite(make()).all()
