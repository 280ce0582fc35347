"""A model in memory is found, edited and saved like one that was opened, and PEFT's adapters take part in all of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tests.support.notes import Notes
from tests.support.plans import random_plan
from tests.support.tiny import tiny_subject

import obliteratus as ob
from obliteratus.core.progress import report_to
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.logits import first_token_log_probs
from obliteratus.probe.cache import CACHE_VARIABLE, collect_cached_activations
from obliteratus.weights.adapters import find_adapted
from obliteratus.weights.matrices import read_weight

PROMPTS = [ob.Prompt("Tell me about stars."), ob.Prompt("Why?")]
TARGETS = {
    "llama": ["o_proj", "down_proj", "q_proj", "embed_tokens"],
    "gpt2": ["c_proj", "c_attn"],
    "opt": ["out_proj", "fc2", "q_proj"],
    "qwen2": ["o_proj", "down_proj", "embed_tokens"],  # its embedding is tied to the head
}
MERGEABLE = ("llama", "gpt2", "opt")  # PEFT merges an adapter of a tied embedding into the head as well


def add_adapter(name: str, **options: Any) -> tuple[Any, Any]:
    """Return a copy of a tiny model with random adapters, and its tokenizer."""
    subject = tiny_subject(name)
    torch.manual_seed(0)
    made = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=TARGETS[name],
        init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
        **options,
    )
    return get_peft_model(copy.deepcopy(subject.model), made), subject.tokenizer


def answers(subject: ob.Subject) -> torch.Tensor:
    return first_token_log_probs(subject, render_prompts(subject, PROMPTS))


# ------------------------------------------------------------------------------------- without adapters
def test_it_is_the_model_that_was_opened(tmp_path: Path) -> None:
    opened = tiny_subject("llama")
    wrapped = ob.wrap(opened.model, opened.tokenizer)
    assert (wrapped.sites, wrapped.source.digest) == (opened.sites, opened.source.digest)
    assert wrapped.source.id.startswith("memory:")
    assert wrapped.model is opened.model


def test_a_model_that_is_trained_is_frozen_with_a_word() -> None:
    subject, notes = tiny_subject("llama"), Notes()
    model: Any = copy.deepcopy(subject.model).train().requires_grad_(True)
    with report_to(notes):
        ob.wrap(model, subject.tokenizer, id="mine")
        ob.wrap(model, subject.tokenizer, id="mine")  # nothing is left to say
    said = [text for text in notes.texts if "evaluation mode" in text]
    count = len(list(model.parameters()))
    assert said == [f"SUMMON: memory:mine is put into evaluation mode, and its {count} trainable tensors are frozen"]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_was_changed_in_memory_is_saved(tmp_path: Path) -> None:
    """The files that the model was loaded from are not taken for it, also where no edited matrix has changed."""
    subject = tiny_subject("llama")
    subject.model.save_pretrained(tmp_path / "model")
    subject.tokenizer.save_pretrained(tmp_path / "model")
    opened = ob.open_subject(tmp_path / "model")
    opened.model.model.layers[0].mlp.gate_proj.weight.data += 0.5
    wrapped = ob.wrap(opened.model, opened.tokenizer)
    assert wrapped.source.id == "memory:model"
    ob.save(wrapped, random_plan(wrapped), out=tmp_path / "out")
    again = ob.open_subject(tmp_path / "out").model.model.layers[0].mlp.gate_proj.weight
    assert torch.equal(again, opened.model.model.layers[0].mlp.gate_proj.weight)


BAD: dict[str, tuple[Any, str]] = {
    "a name": ("gpt2", "this is a builtins.str; give the transformers model itself"),
    "another module": (torch.nn.Linear(2, 2), "this is a torch.nn.modules.linear.Linear"),
    "nothing": (None, "this is a builtins.NoneType"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_model(kind: str) -> None:
    model, message = BAD[kind]
    with pytest.raises(ob.UserError, match=message):
        ob.wrap(model, tiny_subject("llama").tokenizer)


def test_what_is_no_tokenizer_or_broken() -> None:
    subject = tiny_subject("llama")
    for tokenizer in ("gpt2", None):
        with pytest.raises(ob.UserError, match="give the model's tokenizer"):
            ob.wrap(subject.model, tokenizer)
    broken: Any = copy.deepcopy(subject.model)
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ob.UserError, match=r"up_proj\.weight holds NaN"):
        ob.wrap(broken, subject.tokenizer)


# ---------------------------------------------------------------------------------------- with adapters
@pytest.mark.parametrize("name", MERGEABLE)
def test_adapters_are_part_of_the_model(name: str, tmp_path: Path) -> None:
    """Live, baked and reloaded, it is the model into which PEFT itself merges the adapters."""
    model, tokenizer = add_adapter(name, use_dora=name == "opt")
    subject = ob.wrap(model, tokenizer, id="mine")
    merged: Any = copy.deepcopy(model).merge_and_unload()
    reference = ob.wrap(merged, tokenizer)
    assert subject.source.digest == reference.source.digest != tiny_subject(name).source.digest
    assert subject.coverage == reference.coverage
    assert subject.sites == reference.sites
    for site in subject.sites:
        expected = read_weight(reference.module(site.path), site)
        torch.testing.assert_close(read_weight(subject.module(site.path), site), expected)
    plan = random_plan(subject, norm="columns")
    with ob.applied(reference, plan):
        expected = answers(reference)
    with ob.applied(subject, plan):
        torch.testing.assert_close(answers(subject), expected, atol=1e-4, rtol=1e-4)
    saved = ob.save(subject, plan, out=tmp_path / "out")
    assert saved.saved["rescore"]["max_kl"] < 1e-5
    torch.testing.assert_close(answers(ob.open_subject(tmp_path / "out")), expected, atol=1e-4, rtol=1e-4)
    assert ob.save(subject, plan, out=tmp_path / "plan", form="plan").saved["form"] == "plan"
    assert find_adapted(subject.model)  # nothing was merged into the original
    assert torch.equal(answers(subject), answers(ob.wrap(model, tokenizer)))


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about the same
def test_an_adapter_of_a_tied_embedding_leaves_the_head_alone(tmp_path: Path) -> None:
    model, tokenizer = add_adapter("qwen2")
    subject = ob.wrap(model, tokenizer)
    ids = torch.tensor(render_prompts(subject, PROMPTS)[:1])
    with torch.no_grad():
        expected = model(ids).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(answers(subject)[0], expected, atol=1e-4, rtol=1e-4)
    ob.save(subject, ob.Plan((), subject.source.digest), out=tmp_path / "out")
    torch.testing.assert_close(answers(ob.open_subject(tmp_path / "out"))[0], expected, atol=1e-4, rtol=1e-4)


def test_a_disabled_adapter_takes_no_part() -> None:
    model, tokenizer = add_adapter("llama")
    plain = tiny_subject("llama")
    with model.disable_adapter():
        assert ob.wrap(model, tokenizer).source.digest == plain.source.digest
    assert ob.wrap(model, tokenizer).source.digest != plain.source.digest


def test_other_forms_would_lose_the_adapter(tmp_path: Path) -> None:
    model, tokenizer = add_adapter("llama")
    subject = ob.wrap(model, tokenizer)
    with pytest.raises(ob.UserError, match="the model has adapters of its own, which only merged holds"):
        ob.save(subject, random_plan(subject), out=tmp_path / "out", form="adapter")
    assert not (tmp_path / "out").exists()


def test_activations_of_adapted_models_are_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: ob.PromptSet
) -> None:
    """Which adapters are active is no part of the cache's key."""
    monkeypatch.setenv(CACHE_VARIABLE, "hash")
    monkeypatch.setenv("OBLITERATUS_CACHE", str(tmp_path))
    model, tokenizer = add_adapter("llama")
    subject = ob.wrap(model, tokenizer)
    active = collect_cached_activations(subject, prompts)
    with model.disable_adapter():
        disabled = collect_cached_activations(subject, prompts)
    assert not torch.allclose(active["target"].mean, disabled["target"].mean)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_adapters_that_are_no_part_of_a_matrix() -> None:
    subject = tiny_subject("llama")
    with_prompt = get_peft_model(copy.deepcopy(subject.model), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ob.UserError, match="a learned prompt, which no edit of weights sees"):
        ob.wrap(with_prompt, subject.tokenizer)
    model, tokenizer = add_adapter("llama", modules_to_save=["lm_head"])
    assert isinstance(model, PeftModel)
    with pytest.raises(ob.UserError, match=r"lm_head is trained beside its adapters"):
        ob.wrap(model, tokenizer)
