"""The audit's compositions: each part of a method acts, which shows in the plan when that part alone is taken out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from tests.support.notes import Notes
from tests.support.tiny import tiny, tiny_subject, tiny_tokenizer

from obliteratus.causal import FitContext
from obliteratus.core.progress import report_to
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Edit, Mask, Plan, Prompt, PromptSet, Shift, Subject
from obliteratus.distill import find_directions
from obliteratus.excise.plan import plan_digest, plan_edits, wanted_by
from obliteratus.pipeline.recipe import check_runs, load_recipe
from obliteratus.pipeline.run import find_plan
from obliteratus.pipeline.stages import Stages
from obliteratus.probe.probe import collect_activations
from obliteratus.prompts import split_prompts
from obliteratus.search.space import remove_search, sample_values
from obliteratus.weigh import weigh_sites

THINGS = ("stars", "the moon", "comets", "rings", "dust", "tides", "orbits", "planets", "the sun", "a nova")
PAIRS = [f"{verb} me about {x}" for x in THINGS for verb in ("Tell", "Remind", "Inform")]
KIND = {"llama": "dense", "mixtral": "mixture"}
OUTLIER = 5  # this neuron of every MLP writes ten times as much as the others

NEVER = {"when": "never"}
SURGICAL: dict[str, dict[str, Any]] = {
    "outliers clamped": {"distill.0.when": "never"},
    "SAE features": {"distill.2.when": "never"},
    "clear of the control mean": {"distill.3.when": "never"},
    "layers": {"weigh.0": {"use": "all"}},
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
