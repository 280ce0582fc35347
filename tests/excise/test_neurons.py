"""Neuron surgery: the neurons that make the difference are found before removal, few of them, and silenced alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.executors import CLOSE, EXECUTORS, directed, live, logits, opened, silenced, unedited
from tests.support.plans import random_basis
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.probing import ProbeRequest
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Excise
from obliteratus.core.types import Activations, Mask, Plan, PromptSet, Site, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.neurons import attribute_to_neurons, find_outlying_neurons
from obliteratus.excise.plan import load_plan, plan_edits, save_plan
from obliteratus.inference.chat_template import render_prompts
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.probe.probe import collect_activations, load_activations, save_activations
from obliteratus.summon.coverage import summarize_plan_coverage

CASES = ["llama", "gpt2", "gemma2", "llama_biased"]


def sites(subject: Subject) -> list[Site]:
    return [s for s in subject.sites if s.part == "mlp.out"]


# ------------------------------------------------------------------------------------------- the score
def test_attribution_is_what_each_neuron_adds_to_the_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    active, q = torch.randn(12, generator=generator, dtype=torch.float64), random_basis(8, 2, 1, torch.float64)
    found = attribute_to_neurons(weight, q, active)
    written = q @ (weight @ active)  # what the layer adds to the difference, along the directions
    torch.testing.assert_close(found.sum(), written.norm())
    for j in range(12):
        alone = q @ weight[:, j] * active[j]
        assert float(found[j]) == pytest.approx(float(alone @ written / written.norm()))
    assert not torch.allclose(attribute_to_neurons(weight, q, -active.roll(1)), found)


def test_few_are_chosen_and_only_those_that_stand_out() -> None:
    share = torch.randn(1000, generator=torch.Generator().manual_seed(0)).clamp(-2.5, 2.5)
    assert len(find_outlying_neurons(share, 0.1)) == 0  # chance alone masks nothing
    share[[7, 400, 900]] = torch.tensor([9.0, 8.0, 7.0])
    share[3] = -20.0  # works against the difference
    assert find_outlying_neurons(share, 0.1).tolist() == [7, 400, 900]
    assert find_outlying_neurons(share, 0.002).tolist() == [7, 400]  # the cap


def test_after_a_removal_the_score_says_nothing() -> None:
    """The audited program scored then, and deleted two neurons of five by rounding."""
    generator = torch.Generator().manual_seed(0)
    weight, q = torch.randn(32, 400, generator=generator), random_basis(32, 1, 1)
    active = torch.randn(400, generator=generator)
    weight[:, 9], active[9] = q[0], 40.0
    assert 9 in find_outlying_neurons(attribute_to_neurons(weight, q, active), 0.05)
    removed = weight - q.T @ (q @ weight)
    before, after = (attribute_to_neurons(w, q, active).abs().max() for w in (weight, removed))
    assert after < 1e-5 * before


# --------------------------------------------------------------------------------------------- executors
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", CASES)
def test_executors_agree(name: str, executor: str, tmp_path: Path) -> None:
    subject = opened(name)
    plan = silenced(subject)
    expected = live(subject, plan)
    torch.testing.assert_close(EXECUTORS[executor](subject, plan, tmp_path), expected, **CLOSE)
    assert not torch.allclose(unedited(name), expected, **CLOSE)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("rule", ["none", "columns", "whole"])
def test_with_a_removal_on_the_same_site(rule: str, executor: str, tmp_path: Path) -> None:
    subject = opened("llama")
    options = Excise(parts=("mlp.out",), norm=rule)
    removal = plan_edits(subject, directed(subject), torch.ones(len(subject.sites)), Activations({}, -1), options)
    plan = silenced(subject) + removal + silenced(subject, (2,))
    expected = live(subject, plan)
    torch.testing.assert_close(EXECUTORS[executor](subject, plan, tmp_path), expected, **CLOSE)
    assert not torch.allclose(live(subject, removal), expected, **CLOSE)


def test_a_masked_neuron_is_a_neuron_whose_input_is_zero() -> None:
    subject = opened("gpt2")
    site = sites(subject)[0]
    handle = subject.module(site.path).register_forward_pre_hook(
        lambda m, a: (a[0].index_fill(-1, torch.tensor([4]), 0),)
    )
    expected = logits(subject.model)
    handle.remove()
    torch.testing.assert_close(live(subject, Plan((Mask(site, torch.tensor([4])),), subject.source.digest)), expected)


# ------------------------------------------------------------------------------------- from probe to plan
@pytest.mark.parametrize("name", CASES)
def test_inputs_are_the_groups_means(name: str, prompts: PromptSet, tmp_path: Path) -> None:
    subject = opened(name)
    path = sites(subject)[1].path
    acts = collect_activations(subject, prompts, request=ProbeRequest(input_modules=[path]))
    for group in ("target", "control"):
        seen: list[Tensor] = []

        def hook(module: object, args: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            seen.append(args[0][0, -1])

        handle = subject.module(path).register_forward_pre_hook(hook)
        for row in render_prompts(subject, prompts[group]):
            subject.model(torch.tensor([row]))
        handle.remove()
        torch.testing.assert_close(acts.inputs[group][path], torch.stack(seen).mean(0), rtol=1e-4, atol=1e-5)
    save_activations(acts, tmp_path)
    assert torch.equal(load_activations(tmp_path).inputs["target"][path], acts.inputs["target"][path])


def test_a_planted_neuron_is_masked_in_the_first_pass_only(prompts: PromptSet) -> None:
    """One neuron's weight is made so large that it writes nearly all of the difference."""
    subject = opened("llama")
    module = subject.module(sites(subject)[1].path)
    kept = module.weight.clone()
    module.weight[:, 33] *= 200
    more = {
        g: tuple(replace(p, text=f"{p.text} {i}") for i in range(4) for p in ps) for g, ps in prompts.groups.items()
    }
    many = PromptSet(more)
    changes = {"excise.neurons": 0.05, "passes": 2, "distill": [{"use": "mean_diff"}]}
    made = load_recipe("basic", changes | {"verify": [{"use": "behavior", "tokens": 4}]})
    try:
        plan, _, *_ = run(made, subject, many, Store(), force=True)
    finally:
        module.weight.copy_(kept)
    masks = [c for c in plan.edits if isinstance(c, Mask)]
    assert [m.neurons.tolist() for m in masks if m.site.layer == 1] == [[33]]
    assert len({m.site.path for m in masks}) == len(masks)


def test_plans_with_masks_round_trip_and_are_checked(tmp_path: Path) -> None:
    subject = opened("llama")
    plan = silenced(subject)
    save_plan(plan, tmp_path)
    found = load_plan(tmp_path)
    assert all(torch.equal(a.neurons, b.neurons) for a, b in zip(found.edits, plan.edits, strict=True))
    assert found.edits[0].neurons.dtype == torch.int64
    for wrong in (56, -1):  # the tiny model has 56
        bad = replace(plan, edits=(replace(plan.edits[0], neurons=torch.tensor([wrong])),))
        with pytest.raises(UserError, match=r"masks inputs that .* does not have"), applied(subject, bad):
            pass


def test_coverage_counts_columns() -> None:
    subject = opened("llama")
    told = summarize_plan_coverage(subject, silenced(subject, tuple(range(14))))  # a quarter of 56
    whole = summarize_plan_coverage(subject, Plan((Mask(sites(subject)[0], torch.arange(56)),), subject.source.digest))
    assert told["edited_share"] == pytest.approx(3 / 4 * whole["edited_share"])


def test_neurons_need_an_mlp() -> None:
    with pytest.raises(UserError, match=r"neurons and steer need the part mlp\.out"):
        load_recipe("basic", {"excise.neurons": 0.01, "excise.parts": ["attn.out"]})
