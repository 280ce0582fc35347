"""What ablating one layer costs controls: by baked weights in double precision, a planted writer, random ones."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.support.contexts import (
    check_finding,
    context_of_model,
    refusing_context,
    with_direction,
    with_random_direction,
    with_same_groups,
)
from tests.support.plans import random_basis
from tests.support.refuser import asked
from tests.support.tiny import tiny_subject
from torch import Tensor

from obliteratus.analyze import AnalysisContext, analyses
from obliteratus.analyze.entanglement import compare_with_random_labels, measure_entanglement
from obliteratus.core.settings import Step
from obliteratus.distill import find_directions
from obliteratus.inference.chat_template import render_prompts


def leaning(layer: int | None = 1) -> AnalysisContext:
    """A random model in which the MLP of one layer writes far along the direction, on all prompts alike."""
    subject = tiny_subject("llama_biased")
    d = random_basis(subject.width, 1, 4)[0]
    if layer is not None:
        subject.model.model.layers[layer].mlp.down_proj.bias.data += 12 * d
    return with_direction(context_of_model(subject, asked()), d)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_that_controls_lean_on_is_found(layer: int) -> None:
    found = measure_entanglement(leaning(layer), random=19)
    assert found.significant == [layer]
    assert found.kl[layer].value == max(score.value for score in found.kl)
    assert f"random labels' directions: {layer} (level 0.05" in found.summary()
    check_finding(found, ["layer", "KL on controls (nats)"])


@pytest.mark.parametrize("name", ["llama_biased", "gemma2"])
def test_kl_is_that_of_baked_weights_one_prompt_at_a_time(name: str) -> None:
    subject = tiny_subject(name)
    context = with_direction(context_of_model(subject, asked()), random_basis(subject.width, 1, 3)[0])
    found = measure_entanglement(context, prompts=5)
    ids = render_prompts(subject, [context.held_out["control"][i * 12 // 5] for i in range(5)])
    plain = copy.deepcopy(subject.model).double()
    for layer in range(subject.n_layers):
        d = context.directions.basis[layer + 1, 0].double()
        edited = baked(subject.model, layer, d)
        values = [divergence(logits(plain, row), logits(edited, row)) for row in ids]
        assert found.kl[layer].value == pytest.approx(float(torch.stack(values).mean()), rel=1e-3, abs=1e-6)
        assert found.kl[layer].n == 5


def baked(model: torch.nn.Module, layer: int, d: Tensor) -> torch.nn.Module:
    model = copy.deepcopy(model).double()
    block = model.model.layers[layer]
    for half, writer in (("attention", block.self_attn.o_proj), ("feedforward", block.mlp.down_proj)):
        norm = dict(block.named_children()).get(f"post_{half}_layernorm")
        sandwich = "post_feedforward_layernorm" in dict(block.named_children())
        q = d * (1 + norm.weight) if sandwich else d  # Gemma's gain is 1 + w
        q = q / q.norm()
        writer.weight.data -= torch.outer(q, q @ writer.weight)
        if writer.bias is not None:
            writer.bias.data -= q * (q @ writer.bias)
    return model


def logits(model: torch.nn.Module, row: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0, -1].log_softmax(-1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum()


# ------------------------------------------------------------------------------------------------------- nulls
def test_random_directions_find_nothing() -> None:
    """Of 12 contexts with a random direction, fewer than one is expected to show a layer."""
    context = leaning(None)
    found = [
        measure_entanglement(with_random_direction(context, seed), prompts=4, seed=100 * seed) for seed in range(12)
    ]
    assert sum(bool(one.significant) for one in found) <= 3  # more by chance in one of 450


def test_a_direction_that_controls_have_nothing_of_costs_nothing() -> None:
    found = measure_entanglement(refusing_context())
    assert max(score.value for score in found.kl) < 1e-5
    assert found.significant == []


def test_identical_groups_have_no_direction_to_remove() -> None:
    context = with_same_groups(context_of_model(tiny_subject("llama"), asked()))
    found = measure_entanglement(
        replace(context, directions=find_directions(context.activations, [Step(use="mean_diff")]))
    )
    assert all(score.value == 0 for score in found.kl)
    assert found.significant == []
    found.summary()


@pytest.mark.parametrize("freedom", [1, 30])
def test_random_numbers_are_found_no_more_often_than_the_level(freedom: int) -> None:
    alarms = 0
    for seed in range(200):
        numbers = torch.randn(12, 20, freedom, generator=torch.Generator().manual_seed(seed)).square().sum(2)
        _, p = compare_with_random_labels(numbers * torch.logspace(-3, 0, 12)[:, None])
        alarms += bool((p <= 0.05).any())
    assert 1 <= alarms <= 21  # the binomial's 99.9 % point


def test_a_layer_that_stands_out_is_found_and_only_it() -> None:
    numbers = torch.randn(12, 20, 3, generator=torch.Generator().manual_seed(0)).square().sum(2)
    numbers[5, 0] = 40 * numbers[5].mean()
    numbers[7] = 0
    ratio, p = compare_with_random_labels(numbers)
    assert (p <= 0.05).nonzero().flatten().tolist() == [5]
    assert float(ratio[5]) == pytest.approx(float(numbers[5, 0] / numbers[5, 1:].mean()), rel=1e-5)
    assert (float(ratio[7]), float(p[7])) == (0, 1)


def test_it_is_registered_with_its_cost() -> None:
    cost = analyses["entanglement"].cost({"prompts": 32, "random": 19})
    assert cost.forwards.evaluate({"N_search,control": 100, "L": 30}) == 32 * (1 + 30 * 20)
