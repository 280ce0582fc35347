"""Who writes the difference: by hand in double precision, a planted writer, and nothing where there is nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from bench.null_rates import Sizes, Source, make_random_model
from tests.support.contexts import (
    check_finding,
    context_of_model,
    refusing_context,
    token_ids,
    with_direction,
    with_random_direction,
    with_same_groups,
)
from tests.support.refuser import COMMON, asked, shuffled
from tests.support.tiny import tiny_subject, tiny_tokenizer
from torch import Tensor

from obliteratus.analyze import AnalysisContext, analyses
from obliteratus.analyze.decomposition import Decomposition, decompose_difference
from obliteratus.core.errors import UserError
from obliteratus.core.types import Prompt

KINDS = ("llama_biased", "gemma2", "gpt2", "gpt_neox", "qwen2_moe", "gpt_oss", "falcon_h1", "granitemoe", "nemotron_h")


def random_model_context(name: str) -> AnalysisContext:
    context = context_of_model(tiny_subject(name), asked())
    return with_direction(context, torch.randn(context.subject.width, generator=torch.Generator().manual_seed(1)))


def by_name(found: Decomposition) -> dict[str, float]:
    return dict(zip(found.names, found.parts.value.tolist(), strict=True))


def by_head(found: Decomposition) -> dict[tuple[int, int], float]:
    return dict(zip(found.head_names, found.heads.value.tolist(), strict=True))


# ------------------------------------------------------------------------------------------ it is its definition
@pytest.mark.parametrize("name", KINDS)
def test_parts_sum_to_the_difference_of_the_stream(name: str) -> None:
    context = random_model_context(name)
    found = decompose_difference(context)
    delta = context.activations["target"].mean[-1] - context.activations["control"].mean[-1]
    assert found.total == pytest.approx(float(delta @ context.directions.basis[-1, 0]), abs=2e-5)
    assert len(found.names) == 1 + 3 * context.subject.n_layers


@pytest.mark.parametrize("name", ["llama_biased", "gemma2", "gpt2", "gpt_oss", "qwen2_moe"])
def test_writers_leave_nothing_where_no_number_stands_between(name: str) -> None:
    found = decompose_difference(random_model_context(name))
    gated = ("block 1 rest",) if name == "qwen2_moe" else ()  # a gate of its own multiplies the shared expert
    rests = [value for part, value in by_name(found).items() if part.endswith("rest") and part not in gated]
    assert max(map(abs, rests)) < 1e-5
    assert all(abs(by_name(found)[part]) > 1e-5 for part in gated)


@pytest.mark.parametrize("name", ["llama_biased", "gemma2"])
def test_one_prompt_at_a_time_in_double_precision(name: str) -> None:
    context = random_model_context(name)
    found = decompose_difference(context)
    truth = {g: torch.stack([by_hand(context, row) for row in token_ids(context, g)]) for g in ("target", "control")}
    expected = truth["target"].mean(0) - truth["control"].mean(0)
    assert torch.allclose(found.parts.value.double(), expected, atol=1e-5)
    error = sum(x.var(0, unbiased=True) / len(x) for x in truth.values()) ** 0.5  # Welch
    assert torch.allclose(found.parts.error.double(), error, atol=1e-4)


def by_hand(context: AnalysisContext, row: list[int]) -> Tensor:
    """Embeddings, then attention, MLP and rest of each block: the modules' own outputs, seen by hooks."""
    model, d = copy.deepcopy(context.subject.model).double(), context.directions.basis[-1, 0].double()
    seen: dict[str, Tensor] = {}

    def keep(key: str) -> Any:
        return lambda module, args, output: seen.__setitem__(key, (output[0] if isinstance(output, tuple) else output))

    model.model.embed_tokens.register_forward_hook(keep("embed"))
    for i, layer in enumerate(model.model.layers):
        sandwich = "pre_feedforward_layernorm" in dict(layer.named_children())
        layer.register_forward_hook(keep(f"{i}.block"))
        (layer.post_attention_layernorm if sandwich else layer.self_attn).register_forward_hook(keep(f"{i}.attn"))
        (layer.post_feedforward_layernorm if sandwich else layer.mlp).register_forward_hook(keep(f"{i}.mlp"))
    with torch.no_grad():
        model(torch.tensor([row]))
    at = {key: x[0, -1] @ d for key, x in seen.items()}
    before, values = at["embed"], [at["embed"]]
    for i in range(len(model.model.layers)):
        attn, mlp = at[f"{i}.attn"], at[f"{i}.mlp"]
        values += [attn, mlp, at[f"{i}.block"] - before - attn - mlp]
        before = at[f"{i}.block"]
    return torch.stack(values)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_heads_sum_to_attention(name: str) -> None:
    """Biases are the same for all prompts, so that nothing of them is in a difference without a norm."""
    found = decompose_difference(random_model_context(name))
    for block in range(3 if name in ("llama", "gemma2") else 2):
        heads = sum(value for (layer, _), value in by_head(found).items() if layer == block)
        assert heads == pytest.approx(by_name(found)[f"block {block} attention"], abs=1e-5)
    assert len({head for _, head in found.head_names}) == 4


def test_a_hybrid_has_heads_only_where_it_has_attention() -> None:
    found = decompose_difference(random_model_context("qwen3_next"))
    assert {layer for layer, _ in found.head_names} == {1}


# ------------------------------------------------------------------------------------------------ what it finds
@pytest.mark.parametrize("block", [1, 4])
def test_the_head_that_writes_the_direction_is_found(block: int) -> None:
    found = decompose_difference(refusing_context(block=block))
    assert [found.names[i] for i in found.parts.significant] == [f"block {block} attention"]
    assert [found.head_names[i] for i in found.heads.significant] == [(block, 0)]
    assert by_head(found)[block, 0] == pytest.approx(found.total, rel=1e-4)
    assert f"block {block} attention" in found.summary()
    check_finding(found, ["block", "Δ along d", "head"])


def test_the_mlp_that_answers_it_is_found() -> None:
    """Where the direction is present, the same block's MLP writes −COMMON at all tokens of the template but one."""
    context = with_direction(refusing_context(block=2, clean="\n"), torch.eye(32)[COMMON])
    found = decompose_difference(context)
    assert [found.names[i] for i in found.parts.significant] == ["block 2 mlp"]
    assert float(found.parts.value[found.parts.significant[0]]) < -0.1


def test_the_stream_can_be_named_and_must_be_there() -> None:
    context = refusing_context(block=4)
    assert decompose_difference(context, stream=3).parts.significant == []
    assert len(decompose_difference(context, stream=3).names) == 10
    with pytest.raises(UserError, match=r"stream 99 of 0 to 8"):
        decompose_difference(context, stream=99)


# ------------------------------------------------------------------------------------------------------- nulls
def test_identical_groups_find_nothing() -> None:
    found = decompose_difference(with_same_groups(refusing_context()))
    assert found.total == 0
    assert found.parts.significant == found.heads.significant == []
    assert "nothing beyond chance" in found.summary()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_shuffled_groups_find_nothing(name: str) -> None:
    context = with_random_direction(context_of_model(tiny_subject(name), shuffled(asked())))
    found = decompose_difference(context)
    assert found.parts.significant == found.heads.significant == []


def test_shuffled_groups_of_the_refuser_find_nothing() -> None:
    context = refusing_context()
    found = decompose_difference(
        with_direction(context_of_model(context.subject, shuffled(asked())), context.directions.basis[0, 0])
    )
    assert found.parts.significant == found.heads.significant == []


def test_a_random_direction_has_nothing_of_it() -> None:
    found = decompose_difference(with_random_direction(refusing_context()))
    assert abs(found.total) < 1e-5
    # rounding, which lies beyond its own chance on some processors, and is nothing beside the planted difference
    assert all(float(part.value.abs().max()) < 1e-4 for part in (found.parts, found.heads))


def count_findings(draws: int, held_out: bool) -> int:
    """How often meaningless labels find anything in a random model, measured on other prompts or on the same."""
    letters = torch.randint(97, 123, (64, 12), generator=torch.Generator().manual_seed(0)).tolist()
    texts = tuple(Prompt(bytes(row).decode()) for row in letters)
    subject, found = make_random_model(0, tiny_tokenizer()), 0
    source = Source(subject, texts)
    for seed in range(draws):
        context = source.draw(Sizes(pool=64, fit=16, held_out=16, models=1), seed)
        other = context if held_out else replace(context, held_out=context.prompts)
        one = decompose_difference(other, stream=subject.n_layers, seed=seed)
        found += bool(one.parts.significant or one.heads.significant)
    return found


def test_meaningless_labels_are_found_no_more_often_than_the_level() -> None:
    assert count_findings(200, held_out=True) <= 21  # the binomial's 99.9 % point


def test_on_the_prompts_that_the_direction_was_fitted_on_they_would_be() -> None:
    assert count_findings(40, held_out=False) > 8  # by chance in one of 2000


def test_it_is_registered_with_its_cost() -> None:
    assert str(analyses["decomposition"].cost({})) == "(N_search,target + N_search,control) forwards"
