"""Strategies: what is knocked out is what is named, no more, and everything that can be asked for is there once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.executors import CLOSE, IDS, live, logits, opened
from tests.support.tiny import tiny, tiny_config

from obliteratus.core.errors import UserError
from obliteratus.core.types import Mask, Subject, ZeroOutput
from obliteratus.excise.plan import plan_digest
from obliteratus.study import Knockout, StudyContext
from obliteratus.study.base import strategies
from obliteratus.study.engine import list_knockouts
from obliteratus.study.strategies import mean_input_magnitudes

TEXTS = [[65, 66, 67, 68, 69], [97, 98, 99]]
DENSE = ["llama", "mistral", "gpt2", "gemma2", "llama_biased"]


def made(subject: Subject, use: str, seed: int = 0, **options: Any) -> list[Knockout]:
    return list(list_knockouts(StudyContext(subject, TEXTS, seed), use, options))


def columns_of(subject: Subject, layer: int, part: str) -> torch.Tensor:
    site = next(s for s in subject.sites if s.layer == layer and s.part == part)
    weight = subject.module(site.path).weight
    return weight.T if site.layout == "conv1d" else weight


# ---------------------------------------------------------------------------------------- whole blocks
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_silent_block_is_the_model_rebuilt_without_it(layer: int) -> None:
    subject = opened("llama")
    rest = [i for i in range(3) if i != layer]
    other = tiny("llama", num_hidden_layers=2)
    state = {k: v for k, v in subject.model.state_dict().items() if ".layers." not in k}
    for new, old in enumerate(rest):
        mine = f"model.layers.{old}."
        state |= {
            k.replace(mine, f"model.layers.{new}."): v for k, v in subject.model.state_dict().items() if mine in k
        }
    other.load_state_dict(state)
    found = live(subject, made(subject, "layers", layers=(layer,))[0].plan)
    torch.testing.assert_close(found, logits(other), **CLOSE)
    assert not torch.allclose(found, live(subject, made(subject, "layers")[(layer + 1) % 3].plan), **CLOSE)


@pytest.mark.parametrize("name", DENSE)
def test_halves_make_up_the_block(name: str) -> None:
    subject = opened(name)
    attention, ffn, block = (made(subject, use, layers=(1,))[0] for use in ("attention", "ffn", "layers"))
    both = replace(attention.plan, edits=(*attention.plan.edits, *ffn.plan.edits))
    torch.testing.assert_close(live(subject, both), live(subject, block.plan))
    assert attention.size + ffn.size == block.size
    assert not torch.allclose(live(subject, attention.plan), live(subject, ffn.plan), **CLOSE)


def test_ranges_are_neighbors_removed_together() -> None:
    subject = opened("llama")
    specs = made(subject, "ranges", size=2)
    assert [spec.component for spec in specs] == ["blocks 0–1", "blocks 1–2"]
    blocks = made(subject, "layers")
    both = replace(blocks[1].plan, edits=(*blocks[1].plan.edits, *blocks[2].plan.edits))
    torch.testing.assert_close(live(subject, specs[1].plan), live(subject, both))
    assert len(made(subject, "ranges", size=2, step=2)) == 1


def test_experts_of_a_block_are_part_of_its_ffn() -> None:
    subject = opened("mixtral")
    specs = made(subject, "experts", layers=(0,))
    assert [spec.part for spec in specs] == [0, 1, 2, 3]
    whole = made(subject, "ffn", layers=(0,))[0]
    assert sum(spec.size for spec in specs) == whole.size
    every = replace(specs[0].plan, edits=tuple(e for spec in specs for e in spec.plan.edits))
    torch.testing.assert_close(live(subject, every), live(subject, whole.plan), **CLOSE)
    assert not torch.allclose(live(subject, specs[0].plan), live(subject, specs[1].plan), **CLOSE)


# --------------------------------------------------------------------------------------------- heads
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma2"])
def test_a_head_is_its_columns_of_the_output_matrix_and_nothing_else(name: str) -> None:
    """Four query heads on two of keys and values; mistral's are 16 wide where width / heads is 12."""
    subject = opened(name)
    specs = made(subject, "heads")
    assert len(specs) == 4 * subject.n_layers
    width = 16 if name in ("mistral", "gemma2") else 8
    for spec in specs[-4:]:
        model = copy.deepcopy(subject.model)
        rebuilt = replace(subject, model=model)
        columns_of(rebuilt, spec.layer, "attn.out")[:, spec.part * width : (spec.part + 1) * width] = 0
        torch.testing.assert_close(live(subject, spec.plan), logits(model), **CLOSE)
        assert spec.size == width * subject.width
    assert not torch.allclose(live(subject, specs[-1].plan), live(subject, specs[-2].plan), **CLOSE)


def test_silencing_all_heads_is_silencing_attention_but_for_its_bias() -> None:
    subject = opened("llama")
    heads, whole = made(subject, "heads", layers=(1,)), made(subject, "attention", layers=(1,))[0]
    every = replace(whole.plan, edits=tuple(e for spec in heads for e in spec.plan.edits))
    torch.testing.assert_close(live(subject, every), live(subject, whole.plan), **CLOSE)


def test_blocks_without_heads_are_passed_over() -> None:
    subject = opened("lfm2")  # conv, attention, conv
    assert {spec.layer for spec in made(subject, "heads")} == {1}
    with pytest.raises(UserError, match="leave the strategy heads out"):
        made(subject, "heads", layers=(0,))
    assert {spec.layer for spec in made(subject, "attention")} == {0, 1, 2}


# ------------------------------------------------------------------------------- embeddings and neurons
@pytest.mark.parametrize("chunk", [0, 5, 32])
def test_chunks_hold_every_dimension_once(chunk: int) -> None:
    subject = opened("opt")
    specs = made(subject, "embeddings", chunk=chunk)
    tables = [s for s in subject.sites if s.part == "embed"]
    assert len(tables) == 2
    for table in tables:
        dims = [c.outputs for spec in specs for c in spec.plan.edits if isinstance(c, ZeroOutput) and c.site == table]
        assert torch.cat([d for d in dims if d is not None]).tolist() == list(range(32))
    assert len(specs) == -(-32 // (chunk or 2))
    assert [spec.part for spec in specs] == list(range(len(specs)))


@pytest.mark.parametrize("by", ["written", "weight"])
def test_a_planted_neuron_comes_first(by: str) -> None:
    subject = opened("llama")
    subject = replace(subject, model=copy.deepcopy(subject.model))
    columns_of(subject, 1, "mlp.out")[:, 33] *= 100
    specs = made(subject, "neurons", layers=(1,), top=3, by=by)
    assert len(specs) == 3
    assert specs[0].part == 33
    assert specs[0].size == subject.width
    assert made(opened("llama"), "neurons", layers=(1,), top=3, by=by)[0].part != 33


def test_activity_is_the_mean_over_all_tokens() -> None:
    subject = opened("llama")
    site = next(s for s in subject.sites if s.part == "mlp.out" and s.layer == 2)
    seen: list[torch.Tensor] = []
    handle = subject.module(site.path).register_forward_pre_hook(lambda m, a: seen.append(a[0][0]))
    for row in TEXTS:
        subject.model(torch.tensor([row]))
    handle.remove()
    torch.testing.assert_close(mean_input_magnitudes(subject, TEXTS, [site])[site.path], torch.cat(seen).abs().mean(0))


# ------------------------------------------------------------------------------------------- controls
@pytest.mark.parametrize("like", ["heads", "attention", "ffn", "layers", "neurons", "embeddings"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_controls_are_as_large_as_what_they_are_controls_of(name: str, like: str) -> None:
    subject = opened(name)
    controls = made(subject, "random", like=like, count=3)
    assert {c.size for c in controls} == {made(subject, like)[0].size}
    assert all(c.control for c in controls)
    assert not any(s.control for s in made(subject, like))
    assert len({plan_digest(c.plan) for c in controls}) == 3


def test_controls_of_experts() -> None:
    subject = opened("mixtral")
    control, real = made(subject, "random", like="experts", count=1)[0], made(subject, "experts")[0]
    assert control.size == real.size
    assert not torch.allclose(live(subject, control.plan), logits(subject.model), **CLOSE)


def test_controls_follow_the_seed() -> None:
    subject = opened("llama")

    def inputs(seed: int) -> list[list[int]]:
        specs = made(subject, "random", seed, like="heads", count=2)
        return [c.neurons.tolist() for spec in specs for c in spec.plan.edits if isinstance(c, Mask)]

    assert inputs(0) == inputs(0) != inputs(1)


# ---------------------------------------------------------------------------------------------- wrong
@pytest.mark.parametrize(
    ("use", "options", "said"),
    [
        ("layers", {"layers": (3,)}, "blocks 0 to 2"),
        ("layers", {"layers": (-1,)}, "blocks 0 to 2"),
        ("heads", {"heads": (4,)}, "only 0 to 3"),
        ("experts", {}, "expert.out"),
        ("ranges", {"size": 9}, "has 3"),
        ("ranges", {"size": 1}, "size"),
        ("embeddings", {"chunk": 64}, "have 32"),
        ("neurons", {"by": "luck"}, "by"),
        ("random", {"like": "ranges"}, "like"),
        ("layers", {"layer_indices": (0,)}, "layer_indices"),
        ("layer", {}, "did you mean 'layers'"),
    ],
)
def test_what_cannot_be_asked_for(use: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(opened("llama"), use, **options)


def test_neurons_of_experts_are_no_neurons_of_a_block() -> None:
    with pytest.raises(UserError, match=r"mlp\.out or shared\.out"):
        made(opened("mixtral"), "neurons")


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "opt"])
def test_every_part_changes_something_and_has_a_name_of_its_own(name: str) -> None:
    subject = opened(name)
    uses: Sequence[str] = [use for use in strategies if use not in ("experts",)]
    specs = [spec for use in uses for spec in made(subject, use)]
    assert len({spec.component for spec in specs}) == len(specs)
    before = logits(subject.model)
    for spec in specs:
        assert not torch.equal(live(subject, spec.plan), before), spec.component
    assert torch.equal(logits(subject.model), before)
    assert tiny_config(name).num_hidden_layers == subject.n_layers
    assert len(IDS)
