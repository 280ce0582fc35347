"""Activations put in place of others: by hooks of our own on one pair, a planted head, and nothing in null pairs."""

from __future__ import annotations

import copy
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
from tests.support.plans import random_basis
from tests.support.refuser import asked, shuffled
from tests.support.tiny import tiny_subject
from torch import Tensor

from obliteratus.analyze import AnalysisContext, analyses
from obliteratus.analyze.patching import Patching, PatchLocation, patch_activations, rank_layers
from obliteratus.analyze.significance import contrast_within_pairs


def effect(found: Patching, kind: str, layer: int, position: int, head: int = -1) -> float:
    places, effects = (found.heads, found.head_effects) if kind == "head" else (found.places, found.effects)
    return float(effects.value[places.index(PatchLocation(kind, layer, position, head))])


# ------------------------------------------------------------------------------------------------ what it finds
@pytest.mark.parametrize("block", [1, 4])
def test_the_head_and_the_token_that_carry_the_answer_are_found(block: int) -> None:
    """Behind a template's newline nothing else is written at the last token but −COMMON, by the same block's MLP."""
    found = patch_activations(refusing_context(block=block, clean="\n"), positions=2, heads=8)
    blocks = [PatchLocation("block", layer, -1) for layer in range(block, 8)]
    names = {found.places[i] for i in found.effects.significant}
    assert names >= {PatchLocation("attention", block, -1), *blocks}
    assert {(p.layer, p.position) for p in names - set(blocks)} == {(block, -1)}
    assert [found.heads[i] for i in found.head_effects.significant] == [PatchLocation("head", block, -1, 0)]
    assert effect(found, "block", 7, -1) == pytest.approx(found.gap.value, rel=1e-4)  # the whole way
    assert effect(found, "head", block, -1, 0) == pytest.approx(effect(found, "attention", block, -1), rel=1e-4)
    assert float(found.share(found.effects)[found.places.index(blocks[-1])]) == pytest.approx(1, rel=1e-4)
    assert found.gap.value > 1
    assert found.apart
    check_finding(found, ["layer", "token", "share of the gap"])


def test_the_other_way_round_and_by_projection() -> None:
    context = refusing_context(block=3)
    found = patch_activations(context, score="projection", into="control", heads=4)
    assert found.unit == "stream"
    assert found.gap.value < -1
    place = PatchLocation("attention", 3, -1)
    assert found.places[found.effects.significant[0]].layer >= 3
    assert float(found.share(found.effects)[found.places.index(place)]) == pytest.approx(1, rel=1e-4)
    delta = context.activations["control"].mean[-1] - context.activations["target"].mean[-1]
    first = [0, 1, 3, 4, 6, 7, 9, 10]  # eight of twelve, evenly
    rows = [context.activations[g].rows for g in ("control", "target")]
    expected = (rows[0][first, -1] - rows[1][first, -1]).mean(0) @ context.directions.basis[-1, 0]
    assert found.gap.value == pytest.approx(float(expected), rel=1e-4)
    assert delta @ context.directions.basis[-1, 0] < 0


# --------------------------------------------------------------------------------------- it is its definition
@pytest.mark.parametrize("name", ["llama_biased", "gemma2", "gpt2", "qwen2_moe"])
def test_one_pair_by_hand(name: str) -> None:
    """In double precision, with prompts of different lengths."""
    subject = tiny_subject(name)
    context = with_direction(context_of_model(subject, asked()), random_basis(subject.width, 1, 2)[0])
    found = patch_activations(context, score="projection", pairs=1, positions=2, heads=100)
    rows = [token_ids(context, group)[0] for group in ("target", "control")]
    assert len(rows[0]) != len(rows[1])
    assert len(found.heads) == subject.n_layers * 4 * 2
    base = by_hand(context, rows, None)
    assert found.gap.value == pytest.approx(base - by_hand(context, rows[1:] * 2, None), abs=1e-4)
    for place in (*found.places, *found.heads):
        expected = base - by_hand(context, rows, place)
        if place.kind == "mlp" and name == "qwen2_moe" and place.layer == 1:
            continue  # a gate stands between the shared expert and what the module gives
        value = effect(found, place.kind, place.layer, place.position, place.head)
        assert value == pytest.approx(expected, abs=1e-4), place


def by_hand(context: AnalysisContext, rows: list[list[int]], place: PatchLocation | None) -> float:
    """The score of the first row, with what the second gives at one place."""
    model, d = copy.deepcopy(context.subject.model), context.directions.basis[-1, 0]
    model = model if "moe" in model.config.model_type else model.double()  # grouped products are not for doubles
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    end: list[Tensor] = []
    if place is not None:
        exchange(blocks[place.layer], place)
    blocks[-1].register_forward_hook(lambda m, a, y: end.append(y[0] if isinstance(y, tuple) else y))
    with torch.no_grad():
        for row in reversed(rows):
            model(torch.tensor([row]))
    return float(end[-1][0, -1] @ d.to(end[-1]))


def exchange(block: Any, place: PatchLocation) -> None:
    """What the first pass gives there is put into the second."""
    seen: list[Tensor] = []

    def change(x: Tensor) -> Tensor:
        seen.append(x.clone())
        size = x.shape[-1] // 4
        columns = slice(place.head * size, (place.head + 1) * size) if place.kind == "head" else slice(None)
        x = x.clone()
        x[0, place.position, columns] = seen[0][0, place.position, columns]
        return x

    module = module_of(dict(block.named_children()), block, place.kind)
    if place.kind == "head":
        module.register_forward_pre_hook(lambda m, a: (change(a[0]), *a[1:]))
    else:
        module.register_forward_hook(
            lambda m, a, y: (change(y[0]), *y[1:]) if isinstance(y, tuple) else change(y),
        )


def module_of(names: dict[str, Any], block: Any, kind: str) -> Any:
    if kind == "block":
        return block
    sandwich, attention = "post_feedforward_layernorm" in names, names.get("self_attn") or names["attn"]
    if kind == "head":
        return attention.o_proj if "self_attn" in names else attention.c_proj
    if kind == "attention":
        return block.post_attention_layernorm if sandwich else attention
    return block.post_feedforward_layernorm if sandwich else block.mlp


def test_log_odds_are_of_the_two_first_choices() -> None:
    context = refusing_context(clean="\n")
    found = patch_activations(context, pairs=3, positions=1, heads=0)
    model = copy.deepcopy(context.subject.model).double()
    with torch.no_grad():
        ids = {g: [token_ids(context, g)[i] for i in (0, 4, 8)] for g in ("target", "control")}
        logp = {g: torch.stack([model(torch.tensor([r])).logits[0, -1].log_softmax(-1) for r in ids[g]]) for g in ids}
    one, two = logp["target"].argmax(1), logp["control"].argmax(1)
    rows = torch.arange(3)
    odds = [logp[g][rows, one] - logp[g][rows, two] for g in ("target", "control")]
    assert found.gap.value == pytest.approx(float((odds[0] - odds[1]).mean()), rel=1e-4)
    assert found.heads == ()


# ------------------------------------------------------------------------------------------------------- nulls
@pytest.mark.parametrize("score", ["logits", "projection"])
def test_identical_prompts_move_nothing(score: Any) -> None:
    found = patch_activations(with_same_groups(refusing_context()), score=score, pairs=6, positions=2, heads=4)
    assert found.effects.significant == found.head_effects.significant == []
    assert float(found.effects.value.abs().max()) < 1e-4
    assert float(found.share(found.effects).abs().max()) < 1e-4
    found.summary()


def test_shuffled_groups_move_nothing_on_average() -> None:
    context = refusing_context()
    null = with_direction(context_of_model(context.subject, shuffled(asked())), context.directions.basis[0, 0])
    found = patch_activations(null, score="projection", pairs=12, positions=1, heads=8)
    assert found.effects.significant == found.head_effects.significant == []


def test_a_random_direction_is_moved_by_nothing() -> None:
    found = patch_activations(with_random_direction(refusing_context()), score="projection", positions=2, heads=8)
    assert found.effects.significant == found.head_effects.significant == []


# ------------------------------------------------------------------------------------------------------ putting


def test_it_is_registered_with_its_cost() -> None:
    cost = analyses["patching"].cost({"pairs": 8, "positions": 3, "heads": 32})
    assert cost.forwards.evaluate({"N_search,target": 50, "L": 30}) == 8 * (2 + 3 * (3 * 30 + 32))
    assert cost.forwards.evaluate({"N_search,target": 5, "L": 30}) == 5 * (2 + 3 * (3 * 30 + 32))


# ------------------------------------------------------------------------------------------------ what it claims
def test_a_budget_below_a_block_of_heads_says_that_none_was_tried() -> None:
    found = patch_activations(refusing_context(), pairs=6, positions=1, heads=3)
    assert found.heads == ()
    words = "no head was tried (4 heads in a block, budget 3; give heads=4 or more)"
    assert f"heads: {words}" in found.summary()
    assert found.to_dict()["untried"] == words
    enough = patch_activations(refusing_context(), pairs=6, positions=1, heads=4)
    assert "tried" not in enough.summary()
    assert enough.to_dict()["untried"] == ""


def test_layers_are_ranked_whatever_the_signs_of_their_pairs() -> None:
    """A layer whose effects agree in sign by chance does not come before one with larger effects."""
    places = [PatchLocation("attention", 0, -1), PatchLocation("attention", 1, -1), PatchLocation("mlp", 2, -1)]
    effects = torch.tensor([[1.0, 2.0, 9.0], [1.0, -2.0, 9.0]])
    flipped = effects * torch.tensor([[1.0], [-1.0]])
    assert rank_layers(places, effects) == rank_layers(places, flipped) == [1, 0]


def test_heads_that_are_chosen_by_the_same_pairs_hold_the_level() -> None:
    """Effects of 20 attentions, and of the four heads of the largest, on eight pairs: one level for all of them.

    Ranked by the mean, with a limit of their own for the heads, the heads alone are found more often.
    """
    places = [PatchLocation("attention", layer, -1) for layer in range(20)]
    together = chosen_by_mean = 0
    for seed in range(200):
        heads = torch.randn(8, 20, 4, generator=torch.Generator().manual_seed(seed))
        effects = heads.sum(2)
        best = rank_layers(places, effects)[0]
        together += bool(contrast_within_pairs(torch.cat([effects, heads[:, best]], 1)).significant)
        largest = int(effects.mean(0).abs().argmax())
        chosen_by_mean += bool(contrast_within_pairs(heads[:, largest]).significant)
    assert together <= 21  # the binomial's 99.9 % point
    assert chosen_by_mean > 30
