"""The audit's compositions: each part of a method acts, which shows in the plan when that part alone is taken out."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from optuna.distributions import CategoricalDistribution
from tests.support.notes import Notes
from tests.support.tiny import tiny_subject

from obliteratus.causal import FitContext
from obliteratus.core.errors import UserError
from obliteratus.core.progress import report_to
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Experts, Recipe
from obliteratus.core.types import Edit, Mask, Plan, Prompt, PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.excise.bake.tensors import bake
from obliteratus.excise.needs import wanted_by
from obliteratus.excise.plan import plan_digest, plan_edits
from obliteratus.pipeline.recipe import check_runs, load_recipe
from obliteratus.pipeline.run import find_plan
from obliteratus.pipeline.stages import Stages
from obliteratus.probe.probe import collect_activations
from obliteratus.prompts import split_prompts
from obliteratus.search.space import apply_values, sample_values
from obliteratus.weigh import weigh_sites

THINGS = ("stars", "the moon", "comets", "rings", "dust", "tides", "orbits", "planets", "the sun", "a nova")
PAIRS = [f"{verb} me about {x}" for x in THINGS for verb in ("Tell", "Remind", "Inform")]
KIND = {"llama": "dense", "mixtral": "mixture"}
OUTLIER = 5  # this neuron of every MLP writes ten times as much as the others

SURGICAL: dict[str, dict[str, Any]] = {
    "outliers clamped": {"distill.0.when": "never"},
    "SAE features": {"distill.2.when": "never"},
    "clear of the control mean": {"distill.3.when": "never"},
    "norm preservation": {"excise.norm": "none"},
    "head surgery": {"excise.heads": None},
    "directions of experts": {"excise.experts": None},
    "neurons": {"excise.neurons": 0.0},
}
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "advanced": {
        "four directions": {"distill.0.k": 1},
        "clear of the control mean": {"distill.1.when": "never"},
        "norm preservation": {"excise.norm": "none"},
    },
    "aggressive": {
        "outliers clamped": {"distill.0.when": "never"},
        "eight directions": {"distill.1.k": 1},
        "bypass contrast": {"distill.2.when": "never"},
        "norm preservation": {"excise.norm": "none"},
        "head surgery": {"excise.heads": None},
    },
    "surgical": SURGICAL,
    "inverted": {**SURGICAL, "reflection": {"excise.strength": 1.0}},
    "nuclear": {
        "interpolated direction": {"distill.2.when": "never"},
        "own directions": {"distill.3.when": "never"},
        "SAE features": {"distill.4.when": "never"},
        "reasoning kept out": {"distill.5.when": "never"},
        "strengths by layer": {"weigh.1.when": "never"},
        "norm preservation": {"excise.norm": "none"},
        "head surgery": {"excise.heads": None},
        "reflection": {"excise.strength": 1.0},
        "embeddings": {"excise.parts": ["attn.out", "mlp.out"]},
        "directions of experts": {"excise.experts.own": False},
        "blended experts": {"excise.experts.blend": 0.0},
        "neurons": {"excise.neurons": 0.0},
        "steering": {"excise.steer": 0.0},
    },
}
LACKING = {
    "dense": {"directions of experts", "blended experts"},
    "mixture": {"neurons", "steering"},  # all of this model's MLPs are experts, which have no biases
}
CASES = [(method, part, name) for method, parts in PARTS.items() for part in parts for name in KIND]


@cache
def opened(name: str) -> Subject:
    """A tiny model in which one neuron of each dense MLP stands out."""
    subject = tiny_subject(name)
    with torch.no_grad():
        for site in subject.sites:
            if site.part == "mlp.out" and not site.stacked:
                subject.module(site.path).weight[:, OUTLIER] *= 10
    return subject


def prompts(bypass: bool = True) -> PromptSet:
    """Thirty prompts a group, enough for an autoencoder. Bypass prompts ask as control prompts do, in other words."""
    target = [Prompt(f"{x}!! ##!!", split="fit") for x in PAIRS]
    control = [Prompt(f"{x}?", split="fit") for x in PAIRS]
    other = {"bypass": tuple(Prompt(f"If you can: {x}.") for x in PAIRS)} if bypass else {}
    return PromptSet({"target": tuple(target), "control": tuple(control), **other})


def plan_of(recipe: Recipe, subject: Subject, given: PromptSet | None = None) -> Plan:
    """The plan of one pass, as the stages make it."""
    given = given or prompts()
    recipe = check_runs(recipe, given.groups) if "bypass" not in given.groups else recipe
    acts = collect_activations(subject, given, recipe.probe, wanted_by(recipe.excise, subject.sites))
    found = find_directions(acts, recipe.distill, FitContext(subject, given))
    return plan_edits(subject, found, weigh_sites(found, subject.sites, acts, recipe.weigh), acts, recipe.excise)


@cache
def whole(method: str, name: str) -> str:
    """Digest of the plan of the whole method."""
    return plan_digest(plan_of(load_recipe(method), opened(name)))


@pytest.mark.parametrize(("method", "part", "name"), CASES)
def test_a_part_acts_where_the_model_has_it(method: str, part: str, name: str) -> None:
    changed = plan_of(load_recipe(method, PARTS[method][part]), opened(name))
    lacks = part in LACKING[KIND[name]]
    assert (plan_digest(changed) == whole(method, name)) == lacks


@pytest.mark.parametrize("name", KIND)
@pytest.mark.parametrize("method", PARTS)
def test_the_same_recipe_gives_the_same_plan(method: str, name: str) -> None:
    assert plan_digest(plan_of(load_recipe(method), opened(name))) == whole(method, name)


# ----------------------------------------------------------------------------------- what a model or prompts lack
def noted(recipe: Recipe, name: str, given: PromptSet | None = None) -> list[str]:
    """What is said while a plan is made."""
    notes = Notes()
    with report_to(notes):
        plan_of(recipe, opened(name), given)
    return notes.texts


@pytest.mark.parametrize(
    ("name", "setting", "said"),
    [
        ("llama", {"experts": {"own": True}}, "the model has no stack of experts"),
        ("mixtral", {"neurons": 0.01}, "only experts are edited, which share no neurons"),
        ("mixtral", {"steer": 0.2}, "no edited MLP of this model can hold a constant"),
        ("olmo2", {"steer": 0.2}, "no edited MLP of this model can hold a constant"),
    ],
)
def test_what_a_model_lacks_is_said_once_and_left_out(name: str, setting: dict[str, Any], said: str) -> None:
    wanted = {f"excise.{key}": value for key, value in setting.items()}
    recipe = load_recipe("basic", {**wanted, "excise.where_possible": ["neurons", "steer"], "probe.keep": "rows"})
    assert sum(said in text for text in noted(recipe, name)) == 1
    assert plan_digest(plan_of(recipe, opened(name))) == plan_digest(plan_of(load_recipe("basic"), opened(name)))
    assert not any(said in text for text in noted(load_recipe("basic"), name))


def test_a_step_whose_prompts_are_missing_is_left_out_and_said_once() -> None:
    notes, recipe = Notes(), load_recipe("aggressive")
    with report_to(notes):
        made = check_runs(recipe, ["target", "control"])
        again = check_runs(made, ["target", "control"])
    (said,) = (text for text in notes.texts if "bypass" in text)
    assert said == "blend: there are no bypass prompts: this step of aggressive is left out"
    assert again == made
    assert [step.use for step in made.distill if step.when == "never"] == ["blend"]
    assert check_runs(recipe, ["target", "control", "bypass"]) == recipe


def test_left_out_where_prompts_are_missing_is_taken_out() -> None:
    given = prompts(bypass=False)
    without = load_recipe("aggressive", {"distill.2.when": "never"})
    plans = [plan_of(recipe, opened("llama"), given) for recipe in (load_recipe("aggressive"), without)]
    assert plan_digest(plans[0]) == plan_digest(plans[1]) != whole("aggressive", "llama")


# -------------------------------------------------------------------------------------------------------- passes
@pytest.mark.parametrize("name", KIND)
@pytest.mark.parametrize(("method", "passes"), [("advanced", 2), ("aggressive", 3), ("surgical", 2)])
def test_every_pass_edits(method: str, passes: int, name: str) -> None:
    """Without search prompts nothing ends the passes. Masks, and the note on experts, belong to the first."""
    recipe, subject = load_recipe(method, {"verify": [{"use": "behavior", "tokens": 4}]}), opened(name)
    report = {g: (*ps, Prompt(f"Say {g}.", split="report")) for g, ps in prompts(bypass=False).groups.items()}
    notes = Notes()
    with report_to(notes):
        made = check_runs(recipe, report)
        stages = Stages(subject, split_prompts(PromptSet(report), 0, force=True), Store(), force=True).screened(made)
        plan, found = find_plan(made, stages)
    assert len(found) == passes == recipe.passes
    assert sum("no stack of experts" in text for text in notes.texts) == (method == "surgical" and name == "llama")
    per_site = [sum(isinstance(c, Edit) for c in changes) for changes in plan.by_site().values()]
    assert max(per_site) >= passes
    masks = [c for c in plan.edits if isinstance(c, Mask)]
    assert bool(masks) == (method == "surgical" and name == "llama")


# -------------------------------------------------------------------------------------------------------- biases
@pytest.mark.parametrize("name", ["gpt2", "llama_biased"])
def test_advanced_projects_the_biases_of_writers(name: str) -> None:
    """By the formula: b′ = b − s·Qᵀ(Q b), whatever the norm rule; the part of b orthogonal to Q stays."""
    subject = opened(name)
    plan = plan_of(load_recipe("advanced"), subject)
    baked = {key: value().double() for key, value in bake(subject, plan).items() if key.endswith("bias")}
    assert len(baked) == len(plan.edits)
    for edit in plan.edits:
        assert isinstance(edit, Edit)
        before = dict(subject.model.named_parameters())[f"{edit.site.path}.{edit.site.bias}"].double()
        q = edit.basis.double()
        after = baked[f"{edit.site.path}.{edit.site.bias}"]
        assert float((q @ before).norm()) > 1e-2  # negative control: there is something to project
        torch.testing.assert_close(q @ after, (1 - edit.strength) * (q @ before), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after - q.T @ (q @ after), before - q.T @ (q @ before), rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- search
def test_a_search_of_all_switches_draws_plans_that_can_be_made() -> None:
    """Any combination of switches is a valid recipe, and different ones give different plans."""
    recipe = load_recipe("optimized")
    generator = torch.Generator().manual_seed(0)

    def suggest(path: str, values: Any) -> Any:
        part = float(torch.rand(1, generator=generator))
        if isinstance(values, CategoricalDistribution):
            return values.choices[int(part * len(values.choices))]
        return values.low + part * (values.high - values.low)

    assert recipe.search is not None
    drawn = [sample_values(recipe, suggest) for _ in range(4)]
    assert all(set(values) == set(recipe.search.space) for values in drawn)
    plans = [plan_of(apply_values(recipe, values), opened(name)) for values in drawn for name in KIND]
    assert len({plan_digest(plan) for plan in plans}) == len(plans)


@pytest.mark.parametrize("path", ["verify", "analyze"])
def test_steps_that_measure_cannot_be_left_out(path: str) -> None:
    steps = {"verify": "behavior", "analyze": "reach"}
    with pytest.raises(UserError, match=f"only distill and weigh steps can be left out.*'{steps[path]}'"):
        load_recipe("basic", {path: [{"use": steps[path], "when": "possible"}]})


def test_names_hold_what_the_audit_says() -> None:
    """The numbers of the audit: directions, passes and strengths."""
    advanced, aggressive, inverted, nuclear = map(load_recipe, ("advanced", "aggressive", "inverted", "nuclear"))
    assert (advanced.distill[0].options["k"], advanced.passes, advanced.excise.norm) == (4, 2, "columns")
    assert (aggressive.distill[1].options["k"], aggressive.passes) == (8, 3)
    assert inverted.excise.strength == 2
    assert {c.use for c in inverted.distill} == {c.use for c in load_recipe("surgical").distill}
    assert nuclear.excise.strength > 1
    assert nuclear.excise.steer > 0
    assert isinstance(nuclear.excise.experts, Experts)
    assert nuclear.excise.experts.blend > 0
