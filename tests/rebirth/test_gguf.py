"""The files beside what is saved for llama.cpp, the command that applies a plan to a GGUF file, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from tests.support.gguf_files import write_gguf
from tests.support.plans import PlanMaker
from tests.support.tiny import run_of, tiny_subject

from obliteratus.cli.apply_plan import apply_plan
from obliteratus.core.clock import Clock
from obliteratus.core.errors import UserError
from obliteratus.core.types import Plan, Shift, Subject
from obliteratus.excise.plan import load_plan, load_samples
from obliteratus.rebirth.llama_cpp import render_commands, render_modelfile
from obliteratus.rebirth.save import check_form, default_form, save
from obliteratus.summon.load import open_subject
from obliteratus.summon.model_samples import ModelSamples, sample_model
from obliteratus.weights.gguf_io import read_gguf


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return open_subject(write_gguf(tmp_path_factory.mktemp("gguf") / "llama.gguf"))


def test_a_saved_plan_knows_its_model(subject: Subject, make_plan: PlanMaker, tmp_path: Path) -> None:
    save(subject, make_plan(subject), run_of(subject), tmp_path / "plan", "plan")
    samples, known = load_samples(tmp_path / "plan"), sample_model(subject)
    assert samples.weights.keys() == known.weights.keys()
    assert all(torch.equal(samples.weights[name], known.weights[name]) for name in known.weights)
    assert (samples.rows, samples.tokens) == (known.rows, known.tokens)
    assert ModelSamples.from_dict(json.loads(json.dumps(known.to_dict()))).tokens == known.tokens


def test_the_command_writes_a_file_or_a_folder(subject: Subject, make_plan: PlanMaker, tmp_path: Path) -> None:
    save(subject, make_plan(subject), run_of(subject), tmp_path / "plan", "plan")
    out, folder = tmp_path / "edited.gguf", tmp_path / "folder"
    record = apply_plan(tmp_path / "plan", subject.source.id, out, "", {}, Clock())
    assert record["saved"]["form"] == "gguf"
    assert json.loads((tmp_path / "edited.json").read_text()) == record
    apply_plan(tmp_path / "plan", subject.source.id, folder, "", {}, Clock())
    assert (folder / "llama.gguf").read_bytes() == out.read_bytes()
    assert {path.name for path in folder.iterdir()} == {
        *("Modelfile", "README.md", "llama-cpp.sh", "llama.gguf", "plan.json", "plan.safetensors", "run.json"),
    }
    assert len(load_plan(folder).edits) == len(make_plan(subject).edits)
    with pytest.raises(UserError, match=r"edited\.gguf exists"):
        apply_plan(tmp_path / "plan", subject.source.id, out, "", {}, Clock())


def test_adapters_are_saved_for_safetensors_too(make_plan: PlanMaker, tmp_path: Path) -> None:
    """What was saved is read back, run on the model in memory, and scored as the live plan."""
    subject = tiny_subject("llama")
    run = save(subject, make_plan(subject, ("attn.in", "mlp.out")), run_of(subject), tmp_path / "out", "lora-gguf")
    assert run.saved["rescore"]["max_kl"] <= run.saved["rescore"]["tolerance"] == 1e-5
    reader = gguf.GGUFReader(tmp_path / "out/adapter.gguf")
    assert reader.fields["adapter.type"].contents() == "lora"
    shapes = {tensor.name: tensor.data.shape for tensor in reader.tensors}
    assert shapes["blk.0.ffn_down.weight.lora_a"] == (2, 56)
    assert shapes["blk.0.ffn_down.weight.lora_b"] == (32, 2)


def test_steering_is_saved_as_a_control_vector(tmp_path: Path) -> None:
    subject = tiny_subject("llama")
    site = next(site for site in subject.sites if site.part == "mlp.out" and site.layer == 1)
    plan = Plan((Shift(site, torch.ones(subject.width)),), subject.source.digest)
    run = save(subject, plan, run_of(subject), tmp_path / "out", "control-vector")
    assert run.saved["rescore"]["max_kl"] <= 1e-5
    assert list(read_gguf(tmp_path / "out/control-vector.gguf").tensors) == ["direction.1"]
    assert "Modelfile" not in {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("form", ["lora-gguf", "control-vector"])
def test_what_a_form_cannot_hold_is_refused(form: str, make_plan: PlanMaker, tmp_path: Path) -> None:
    subject = tiny_subject("llama")
    with pytest.raises(UserError) as error:
        save(subject, make_plan(subject, anchored=True), run_of(subject), tmp_path / "out", form)  # type: ignore[arg-type]
    assert f"--save {form}" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    first = next(site for site in subject.sites if site.part == "mlp.out")
    early = Plan((Shift(replace(first), torch.ones(subject.width)),), subject.source.digest)
    with pytest.raises(UserError, match="layers 1 and up" if form == "control-vector" else "steering changes the bias"):
        save(subject, early, run_of(subject), tmp_path / "out", form)  # type: ignore[arg-type]


def test_a_file_gives_a_file_and_a_folder_gives_a_folder(subject: Subject) -> None:
    assert default_form(subject.source.id) == "gguf"
    assert default_form("organism:astronomy") == "merged"
    check_form("gguf", model=subject.source.id)
    with pytest.raises(UserError, match="is not a GGUF file, which --save gguf edits"):
        check_form("gguf", model="organism:astronomy")


def test_loading_files_name_what_they_load() -> None:
    assert render_modelfile("gguf", "a b.gguf", "") == "# ollama create NAME -f Modelfile\nFROM ./a b.gguf\n"
    assert "FROM /m/base.gguf\nADAPTER ./adapter.gguf" in render_modelfile("lora-gguf", "adapter.gguf", "/m/base.gguf")
    lines = render_commands("lora-gguf", "adapter.gguf", "owner/name").splitlines()
    assert lines[0] == "# BASE.gguf stands for a GGUF file of owner/name."
    assert lines[2] == "llama-cli -m BASE.gguf --lora adapter.gguf -cnv"
    assert "--control-vector c.gguf" in render_commands("control-vector", "c.gguf", "/m/base.gguf")
    assert "-m 'a b.gguf' -cnv" in render_commands("gguf", "a b.gguf", "")
