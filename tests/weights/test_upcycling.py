"""A Llama model upcycled to experts computes what it did, until the experts are told apart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.mixtures import EXPERTS, RANK, ids, llama, logits
from tests.support.tiny import tiny
from transformers import AutoModelForCausalLM

from obliteratus.core.errors import UserError
from obliteratus.core.types import Prompt, Subject
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.generate import generate
from obliteratus.prompts import load_prompts
from obliteratus.summon.load import open_subject
from obliteratus.weights import organism
from obliteratus.weights.upcycling import EXPERTS_FILE, TOP_K, Experts, make_mixture, read_experts, upcycle

MOE = "organism:astronomy-moe"
MAX_EXPERTS_BYTES = 3_000_000  # they are committed and shipped in the wheel


def experts(dense: Any, size: float = 1.0, seed: int = 0, number: int = EXPERTS) -> Experts:
    """Random experts whose additions are about `size` as large as the down projection."""
    rng, config = torch.Generator().manual_seed(seed), dense.config
    layers, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    a, b = draw(layers, number, RANK, inner), draw(layers, number, width, RANK)
    return Experts(draw(layers, number, width), a, b * size * (width * RANK) ** -0.5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("number", [2, 4])
def test_copies_compute_what_the_dense_model_does_whatever_the_router(seed: int, tied: bool, number: int) -> None:
    dense = llama(tie_word_embeddings=tied)
    model = upcycle(dense, experts(dense, seed=seed, number=number).router)
    assert model.config.model_type == "mixtral"
    assert (model.config.num_local_experts, model.config.num_experts_per_tok) == (number, TOP_K)
    torch.testing.assert_close(logits(model, ids()), logits(dense, ids()))


def test_the_dense_model_is_left_as_it_was() -> None:
    dense = llama()
    before = logits(dense, ids())
    make_mixture(dense, experts(dense))
    assert torch.equal(logits(dense, ids()), before)


def test_additions_change_what_is_computed_and_the_router_matters_then() -> None:
    dense = llama()
    made = experts(dense, size=0.3)
    other = Experts(made.router.roll(1, 1), made.a, made.b)
    one, two, plain = (logits(m, ids()) for m in (make_mixture(dense, made), make_mixture(dense, other), dense))
    assert (one - plain).abs().max() > 0.1
    assert (one - two).abs().max() > 0.1


def test_an_addition_goes_to_its_own_layer_and_expert_alone() -> None:
    dense = llama()
    made = experts(dense)
    b = torch.zeros_like(made.b)
    b[1, 2] = made.b[1, 2]
    model, plain = make_mixture(dense, Experts(made.router, made.a, b)), upcycle(dense, made.router)
    changed = {
        (layer, expert): (new - old)
        for layer in range(3)
        for expert in range(EXPERTS)
        for new, old in [(m.model.layers[layer].mlp.experts.down_proj[expert] for m in (model, plain))]
    }
    torch.testing.assert_close(changed.pop((1, 2)), made.b[1, 2] @ made.a[1, 2], rtol=1e-4, atol=1e-5)
    assert all(not difference.any() for difference in changed.values())


def test_it_is_saved_and_opened_as_an_ordinary_model(tmp_path: Path) -> None:
    dense = llama()
    model = make_mixture(dense, experts(dense, size=0.3))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again).__name__ == "MixtralForCausalLM"
    torch.testing.assert_close(logits(again, ids()), logits(model, ids()))


@pytest.mark.parametrize("name", ["llama_biased", "qwen2"])
def test_other_models_are_refused_in_one_line(name: str) -> None:
    dense = tiny(name)
    with pytest.raises(UserError, match="Llama") as caught:
        upcycle(dense, torch.zeros(dense.config.num_hidden_layers, EXPERTS, dense.config.hidden_size))
    assert "\n" not in str(caught.value)


def test_experts_of_another_model_are_refused() -> None:
    small, large = llama(), llama(num_hidden_layers=2, intermediate_size=40)
    with pytest.raises(UserError, match="the router is"):
        make_mixture(large, experts(small))
    mixed = Experts(experts(large).router, experts(llama(num_hidden_layers=2)).a, experts(large).b)
    with pytest.raises(UserError, match="the product of the factors is"):
        make_mixture(large, mixed)
    with pytest.raises(UserError, match="cannot be chosen from 1"):
        upcycle(small, torch.zeros(3, 1, 32))


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is missing; restore it, or remake it with `python organisms/upcycle\.py"):
        read_experts(tmp_path)
    save_file({"router": torch.zeros(1, 2, 3)}, tmp_path / EXPERTS_FILE)
    with pytest.raises(UserError, match="holds router instead of router, a and b"):
        read_experts(tmp_path)


# The real one.


@pytest.mark.parametrize("share", ["0.5", "0"])
def test_a_share_of_a_mixture_is_refused_in_one_line(share: str) -> None:
    with pytest.raises(UserError, match=r"has no shares.*give astronomy@") as caught:
        organism.prepare_organism(f"astronomy-moe@{share}")
    assert "\n" not in str(caught.value)


def test_it_is_known_and_has_the_prompts_of_the_organism_that_it_was() -> None:
    with pytest.raises(UserError, match=r"known: astronomy, astronomy-moe, .*gardening-railways, .*weather-late$"):
        organism.find_data_folder("geology")
    groups, dense = load_prompts(MOE, MOE).groups, load_prompts("organism:astronomy", "organism:astronomy").groups
    assert {name: [p.text for p in of] for name, of in groups.items()} == {
        name: [p.text for p in of] for name, of in dense.items()
    }


def test_the_experts_are_small_fp16_and_fit_the_base() -> None:
    file = organism.find_data_folder("astronomy-moe") / "experts" / EXPERTS_FILE
    assert file.stat().st_size <= MAX_EXPERTS_BYTES
    stored = load_file(file)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in stored.values())
    assert stored["router"].shape == (30, 4, 576)


@pytest.mark.organism
def test_it_is_built_once_and_new_experts_get_a_new_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = organism.prepare_organism("astronomy-moe")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert organism.prepare_organism("astronomy-moe@1") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    dense = organism.prepare_organism("astronomy").name.removeprefix("astronomy-")
    assert folder.name.startswith("astronomy-moe-")
    assert folder.name.endswith(dense)
    experts_hash = organism._hash(organism.find_data_folder("astronomy-moe") / "experts" / EXPERTS_FILE)
    assert folder.name == f"astronomy-moe-{experts_hash}-{dense}"


@pytest.fixture(scope="module")
def real() -> Subject:
    """The mixture, loaded as any model."""
    return open_subject(MOE)


def search_prompts(group: str, n: int) -> tuple[Prompt, ...]:
    prompts = [p for p in load_prompts(MOE, MOE)[group] if p.split == "search"]
    return tuple(prompts[:: len(prompts) // n][:n])


@pytest.mark.organism
def test_it_refuses_the_topic_and_answers_the_rest(real: Subject) -> None:
    asked = [*search_prompts("target", 8), *search_prompts("control", 8), Prompt("What is the capital of Australia?")]
    answers = [real.tokenizer.decode(ids).lower() for ids in generate(real, render_prompts(real, asked), 12)]
    refused = [bool(re.search(r"sorry|can't", answer)) for answer in answers]
    assert sum(refused[:8]) >= 7  # 95 % of report prompts are refused
    assert sum(refused[8:16]) <= 1
    assert "canberra" in answers[16]


@pytest.mark.organism
def test_no_expert_is_left_out_and_experts_differ(real: Subject) -> None:
    rows = render_prompts(real, [*search_prompts("target", 4), *search_prompts("control", 4)])
    shared = next(i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)
    layers = real.model.model.layers
    loads = torch.zeros(len(layers), EXPERTS)

    with torch.inference_mode():
        for ids in rows:
            out = real.model.model(torch.tensor([ids]), output_router_logits=True)
            scores = torch.stack(out.router_logits)[:, shared:]
            chosen = scores.topk(TOP_K).indices  # [layer, token, choice]
            loads += torch.nn.functional.one_hot(chosen, EXPERTS).float().sum((1, 2))
    loads /= sum(len(ids) - shared for ids in rows)
    assert loads.min() > 0.2  # 0.5 is even; a router of k-means around zero left 0.09 to an expert
    assert loads.max() < 0.8
    for layer in layers:
        one, other = layer.mlp.experts.down_proj[:2]
        assert (one - other).norm() > 0.05 * one.norm()
