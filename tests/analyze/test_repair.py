"""What comes back after ablation: a planted repairer, by hand in double precision, and nothing where none repairs."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tests.support.contexts import (
    check_finding,
    context_of_model,
    refusing_context,
    token_ids,
    with_direction,
    with_random_direction,
    with_same_groups,
)
from tests.support.refuser import CLEAN, COMMON, LAYERS, REFUSAL, asked, refuser, shuffled
from tests.support.tiny import tiny_subject
from torch import Tensor

from obliteratus.analyze import AnalysisContext, analyses
from obliteratus.analyze.base import subsample
from obliteratus.analyze.repair import (
    compute_written_back,
    judge_repair,
    measure_directions,
    measure_repair,
)
from obliteratus.analyze.samples import compute_single_step_p_values
from obliteratus.analyze.significance import draw_unit_vectors

BACK = 7  # an axis on which block 2 leaves a second trace of the trigger


@cache
def repairing(at: int = 6) -> AnalysisContext:
    """The refuser, and a later MLP that writes REFUSAL where the trigger's trace is there and REFUSAL is not."""
    subject = refuser(block=2)
    layers: Any = subject.model.model.layers
    attention, mlp = layers[2].self_attn, layers[at].mlp
    attention.v_proj.weight.data[1] = attention.v_proj.weight.data[0]
    attention.o_proj.weight.data[BACK, 1] = attention.o_proj.weight.data[REFUSAL, 0]
    mlp.gate_proj.weight.data[5, REFUSAL] = -4  # open where REFUSAL is low
    mlp.gate_proj.weight.data[5, COMMON] = 2
    mlp.up_proj.weight.data[5, BACK] = 1
    mlp.down_proj.weight.data[REFUSAL, 5] = 8
    return with_direction(context_of_model(subject, asked()), torch.eye(subject.width)[REFUSAL])


@pytest.mark.parametrize(("at", "depths", "expected"), [(4, 7, [2, 3]), (6, 4, [2, 4])])
def test_a_layer_that_writes_it_back_is_found(at: int, depths: int, expected: list[int]) -> None:
    """Before block 2 nothing is removed; from ``at`` on no layer is left that could repair."""
    found = measure_repair(repairing(at=at), prompts=4, depths=depths)
    assert found.significant == expected
    assert all(found.restored[found.depths.index(depth)] > 0.2 for depth in found.significant)
    assert "later layers write back" in found.summary()
    check_finding(found, ["removed up to layer", "Δ along d"])


def test_layers_that_do_not_repair_show_nothing() -> None:
    found = measure_repair(refusing_context(block=2), prompts=4, depths=4)
    assert found.significant == []
    assert torch.allclose(found.remaining, torch.tensor([float(found.direct[-1]), 0.0, 0.0, 0.0]), atol=1e-4)
    assert float(found.restored.abs().max()) < 1e-4
    assert "no layer" in found.summary()


def test_layers_that_lean_on_it_are_below_zero() -> None:
    """Block 5 writes REFUSAL again where it is there already: what is taken below it takes that too."""
    subject = refuser(block=2)
    context = with_direction(refusing_context(block=2), torch.eye(subject.width)[REFUSAL])
    context = replace(context, subject=subject)
    mlp: Any = subject.model.model.layers[5].mlp
    mlp.gate_proj.weight.data[0, CLEAN] = 2  # the last token's own
    mlp.up_proj.weight.data[0, REFUSAL] = 1
    mlp.down_proj.weight.data[REFUSAL, 0] = 2
    found = measure_repair(context, prompts=4, depths=4)
    assert found.significant == []
    assert all(found.restored[found.depths.index(depth)] < -0.1 for depth in (2, 4))


# --------------------------------------------------------------------------------------- it is its definition
@pytest.mark.parametrize("name", ["llama_biased", "gemma2"])
def test_baked_weights_one_prompt_at_a_time(name: str) -> None:
    subject = tiny_subject(name)
    d = torch.nn.functional.normalize(torch.randn(subject.width, generator=torch.Generator().manual_seed(1)), dim=0)
    context = with_direction(context_of_model(subject, asked()), d)
    found = measure_repair(context, prompts=12)
    whole = torch.stack([deltas(context, subject.model, d)])[0]
    assert torch.allclose(found.direct.double(), whole, atol=1e-5)
    for i, depth in enumerate(found.depths):
        after = deltas(context, baked(subject.model, depth, d.double()), d)
        assert float(found.remaining[i]) == pytest.approx(float(after[-1]), abs=1e-5)
        assert abs(float(after[depth + 1])) < 1e-6
        extra = after[-1] - (whole[-1] - whole[depth + 1])
        assert found.extra[i].value == pytest.approx(float(extra), abs=1e-5)
        assert found.extra[i].low <= found.extra[i].value <= found.extra[i].high
        if name == "gemma2" and depth == 0:  # a window of 8 tokens: nothing of the question is in the last one yet
            assert found.restored[i] == 0
            continue
        assert float(found.restored[i]) == pytest.approx(float(extra / whole[depth + 1]), rel=1e-3)


def deltas(context: AnalysisContext, model: Any, d: Tensor) -> Tensor:
    model = copy.deepcopy(model).double()
    means = []
    for group in ("target", "control"):
        rows = []
        for row in token_ids(context, group):
            seen: list[Tensor] = []
            handles = [b.register_forward_hook(lambda m, a, y, s=seen: s.append(y)) for b in model.model.layers]
            first = model.model.layers[0].register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0]))
            with torch.no_grad():
                model(torch.tensor([row]))
            for handle in (*handles, first):
                handle.remove()
            rows.append(torch.stack([x[0, -1] @ d.double() for x in seen]))
        means.append(torch.stack(rows).mean(0))
    return means[0] - means[1]


def baked(model: Any, depth: int, d: Tensor) -> Any:
    model = copy.deepcopy(model).double()
    table = model.model.embed_tokens
    table.weight = torch.nn.Parameter(table.weight - torch.outer(table.weight @ d, d))
    for block in model.model.layers[: depth + 1]:
        sandwich = "post_feedforward_layernorm" in dict(block.named_children())
        for writer, norm in ((block.self_attn.o_proj, "attention"), (block.mlp.down_proj, "feedforward")):
            q = d * (1 + block.get_submodule(f"post_{norm}_layernorm").weight) if sandwich else d
            q = q / q.norm()
            writer.weight.data -= torch.outer(q, q @ writer.weight)
            if writer.bias is not None:
                writer.bias.data -= q * (q @ writer.bias)
    return model


# ------------------------------------------------------------------------------------------------------- nulls
def test_a_random_direction_is_not_written_back() -> None:
    for seed in range(2):
        context = with_random_direction(repairing(), seed)
        assert measure_repair(context, prompts=4, depths=3).significant == []


def test_random_directions_are_found_no_more_often_than_the_level() -> None:
    """In a model of random weights, where later layers answer to everything: of 60 directions 3 are the level.

    All directions are measured once, and each is compared with 19 others drawn from them.
    """
    subject = tiny_subject("llama_biased")
    units, layers = draw_unit_vectors(60, subject.width, 1000), tuple(range(subject.n_layers - 1))
    measured = measure_directions(subject, subsample(asked(), 4), layers, units, -1)
    back = torch.stack([compute_written_back(one, layers) for one in measured])
    found, by_p = 0, 0
    for i in range(60):
        others = torch.randperm(59, generator=torch.Generator().manual_seed(i))[:19]
        one = judge_repair(measured[i], layers, torch.cat([back[i : i + 1], back[others + (others >= i)]]), 0.05, i)
        found += bool(one.significant)
        by_p += bool((one.p <= one.level).any())
    assert found <= by_p <= 8  # the binomial's 99.6 % point
    assert by_p >= 1  # the limit is not out of reach
    context = with_direction(context_of_model(subject, asked()), units[0])
    same = measure_repair(context, prompts=4)
    assert torch.allclose(same.restored, judge_repair(measured[0], layers, back, 0.05, 0).restored, atol=1e-6)


def test_p_is_the_share_of_directions_that_reach_as_far() -> None:
    back = torch.tensor([[3.0, 1.0], [2.0, 0.5], [0.0, 4.0], [-5.0, -1.0]])
    assert compute_single_step_p_values(back).tolist() == [0.5, 0.75]  # itself and the third; those and the second
    assert compute_single_step_p_values(torch.zeros(20, 3)).tolist() == [1, 1, 1]


def test_identical_groups_show_nothing() -> None:
    found = measure_repair(with_same_groups(repairing()), prompts=4, depths=3)
    assert found.significant == []
    assert float(found.direct.abs().max()) == 0
    assert float(found.restored.abs().max()) == 0


def test_shuffled_groups_show_nothing() -> None:
    context = repairing()
    mixed = with_direction(context_of_model(context.subject, shuffled(asked())), torch.eye(32)[REFUSAL])
    assert measure_repair(mixed, prompts=4, depths=3).significant == []


def test_depths_are_spread_and_cost_is_told() -> None:
    assert measure_repair(repairing(), depths=3, prompts=2).depths == (0, 3, 6)
    assert LAYERS == 8
    cost = analyses["repair"].cost({"prompts": 16, "depths": 8, "random": 19})
    assert cost.forwards.evaluate({"N_search,target": 100, "N_search,control": 10, "L": 30}) == 26 * (1 + 8 * 20)
