"""What REBIRTH saves matches what was measured, in any precision and any number of shards; nothing else changes."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.support.checkpoints import read_weights
from tests.support.plans import PlanMaker
from tests.support.tiny import run_of, tiny, tiny_subject, tiny_tokenizer

from obliteratus.core.errors import UserError
from obliteratus.core.types import Plan, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.logits import first_token_log_probs
from obliteratus.rebirth import save as rebirth
from obliteratus.rebirth.save import save
from obliteratus.summon.load import assemble_subject, open_subject

KINDS = ["llama", "gpt2", "gemma3_text", "llama_biased"]


def half(name: str) -> Subject:
    """A tiny subject in bf16, as most checkpoints are stored."""
    return assemble_subject(tiny(name).to(torch.bfloat16), tiny_tokenizer(), id=f"tiny:{name}")


@pytest.mark.parametrize("name", KINDS)
def test_half_precision_is_cast_once_at_the_end(
    name: str, make_plan: PlanMaker, prompts: PromptSet, tmp_path: Path
) -> None:
    """The saved bf16 weight is the fp32 edit of the loaded one, rounded: not an edit computed in bf16."""
    subject = half(name)
    plan = make_plan(subject, norm="columns")
    run = save(subject, plan, run_of(subject), tmp_path / "out", "merged", prompts)
    assert run.saved["rescore"]["max_kl"] <= run.saved["rescore"]["tolerance"] == 1e-2
    saved, loaded = read_weights(tmp_path / "out"), subject.model.state_dict()
    assert {x.dtype for x in saved.values()} == {torch.bfloat16}
    edited = {f"{e.site.path}.weight" for e in plan.edits}
    assert edited < saved.keys() | {"lm_head.weight"}
    exact = {k: v() for k, v in rebirth.bake(tiny_as(subject), plan).items()}
    for key, value in saved.items():
        if key in edited:
            torch.testing.assert_close(value, exact[key].to(torch.bfloat16), rtol=0, atol=0)
            assert not torch.equal(value, loaded[key])
        elif key not in exact:
            assert torch.equal(value, loaded[key])


def tiny_as(subject: Subject) -> Subject:
    """The same weights in fp32: what the edit must be computed from."""
    return assemble_subject(deepcopy(subject.model).float(), subject.tokenizer, id=subject.source.id)


@pytest.mark.parametrize("name", KINDS)
def test_shards_hold_the_same_model_as_one_file(
    name: str, make_plan: PlanMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = tiny_subject(name)
    plan = make_plan(subject)
    save(subject, plan, run_of(subject), tmp_path / "one", "merged")
    monkeypatch.setattr(rebirth, "MAX_SHARD", 20_000)
    save(subject, plan, run_of(subject), tmp_path / "many", "merged")
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())["weight_map"]
    one, many = read_weights(tmp_path / "one"), read_weights(tmp_path / "many")
    assert one.keys() == many.keys() == index.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)
    assert all(key in load_file(tmp_path / "many" / file) for key, file in index.items())


def test_a_sharded_model_loads_and_answers_as_measured(
    make_plan: PlanMaker, prompts: PromptSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebirth, "MAX_SHARD", 20_000)
    subject = tiny_subject("qwen2")
    plan = make_plan(subject, ("embed", "attn.out", "mlp.out"))
    save(subject, plan, run_of(subject), tmp_path / "out", "merged", prompts)
    ids = render_prompts(subject, prompts["target"])
    with applied(subject, plan):
        live = first_token_log_probs(subject, ids)
    torch.testing.assert_close(first_token_log_probs(open_subject(tmp_path / "out"), ids), live, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first_token_log_probs(subject, ids), live, atol=1e-2)


def test_a_model_that_answers_otherwise_is_not_published(
    make_plan: PlanMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the rescore: weights that were not edited are noticed, and no folder appears."""

    def forgetful(subject: Subject, plan: Plan, folder: Path) -> dict[str, Any]:
        subject.model.save_pretrained(folder)
        subject.tokenizer.save_pretrained(folder)
        return {}

    subject = tiny_subject("llama")
    monkeypatch.setitem(rebirth.WRITERS, "merged", forgetful)
    with pytest.raises(UserError, match="the reloaded model differs from the measured one"):
        save(subject, make_plan(subject), run_of(subject), tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()


def test_saving_leaves_the_subject_as_it_was(make_plan: PlanMaker, tmp_path: Path) -> None:
    subject = tiny_subject("llama")
    before = {k: v.clone() for k, v in subject.model.state_dict().items()}
    for form in ("merged", "adapter", "plan"):
        save(subject, make_plan(subject), run_of(subject), tmp_path / form, form)
    after = subject.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
