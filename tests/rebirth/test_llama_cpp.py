"""What is saved for llama.cpp, in a real llama.cpp: it computes what the live plan does here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.support.gguf_files import write_gguf
from tests.support.llama_cpp import MISSING, find_llama, run_llama
from tests.support.plans import PlanMaker
from tests.support.tiny import run_of

from obliteratus.core.types import Plan, Shift, Subject
from obliteratus.excise.bake.gguf_names import OPTIONAL_BIASES, GgufModel
from obliteratus.excise.live.hooks import applied
from obliteratus.rebirth.gguf import save_as_file
from obliteratus.rebirth.save import save
from obliteratus.summon.load import open_subject
from obliteratus.summon.model_samples import sample_model
from obliteratus.weights.gguf_io import GgufTensor, read_gguf
from obliteratus.weights.rewrite_gguf import rewrite_gguf

pytestmark = pytest.mark.skipif(find_llama() is None, reason=MISSING)
IDS = [[1, 72, 105, 33, 40, 90], [256, 3, 4, 99, 100]]
SAME = {"rtol": 0, "atol": 2e-5}  # two orders of arithmetic in fp32, on log-probabilities of about −5


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return open_subject(write_gguf(tmp_path_factory.mktemp("gguf") / "llama.gguf"))


@torch.no_grad()
def ours(subject: Subject, plan: Plan | None = None) -> torch.Tensor:
    with applied(subject, plan or Plan()):
        return torch.stack([subject.model(torch.tensor([row])).logits[0, -1].log_softmax(-1) for row in IDS])


def theirs(model: Path, folder: Path, **adapters: str) -> torch.Tensor:
    return torch.from_numpy(run_llama(model, IDS, folder, **adapters).log_probs)


def write(subject: Subject, plan: Plan, out: Path, form: str = "gguf") -> Path:
    save_as_file(GgufModel(read_gguf(Path(subject.source.id))), plan, sample_model(subject), run_of(subject), out, form)
    return out


@pytest.mark.parametrize("options", [{}, {"anchored": True}, {"parts": ("embed", "attn.out")}], ids=str)
def test_an_edited_file_computes_the_live_edit(
    options: dict[str, Any], subject: Subject, make_plan: PlanMaker, tmp_path: Path
) -> None:
    plan, base = make_plan(subject, **options), Path(subject.source.id)
    torch.testing.assert_close(theirs(base, tmp_path), ours(subject), **SAME)
    edited = write(subject, plan, tmp_path / "edited.gguf")
    torch.testing.assert_close(theirs(edited, tmp_path), ours(subject, plan), **SAME)
    assert float((ours(subject, plan) - ours(subject)).abs().max()) > 0.1


@pytest.mark.parametrize("parts", [("attn.out", "mlp.out"), ("attn.in", "mlp.in")], ids=str)
def test_an_adapter_computes_the_live_edit(
    parts: tuple[str, ...], subject: Subject, make_plan: PlanMaker, tmp_path: Path
) -> None:
    """Queries and keys, whose rows llama.cpp has in another order, among them."""
    plan = make_plan(subject, parts)
    adapter = write(subject, plan, tmp_path / "adapter.gguf", "lora-gguf")
    found = theirs(Path(subject.source.id), tmp_path, lora=str(adapter))
    torch.testing.assert_close(found, ours(subject, plan), **SAME)


def test_a_control_vector_steers_as_the_live_plan(subject: Subject, tmp_path: Path) -> None:
    sites = [site for site in subject.sites if site.part == "mlp.out" and site.layer > 0]
    vectors = [torch.linspace(-1, 1, subject.width), torch.linspace(1, 0, subject.width)]
    plan = Plan(tuple(Shift(site, vector) for site, vector in zip(sites, vectors, strict=True)), subject.source.digest)
    control = write(subject, plan, tmp_path / "control.gguf", "control-vector")
    found = theirs(Path(subject.source.id), tmp_path, control=str(control))
    torch.testing.assert_close(found, ours(subject, plan), **SAME)
    assert float((found - ours(subject)).abs().max()) > 0.1


def test_a_run_on_a_file_saves_one_that_loads(subject: Subject, make_plan: PlanMaker, tmp_path: Path) -> None:
    plan = make_plan(subject, anchored=True)
    run = save(subject, plan, run_of(subject), tmp_path / "out", "gguf")
    assert run.saved["rescore"]["max_kl"] <= run.saved["rescore"]["tolerance"] == 1e-5
    torch.testing.assert_close(theirs(tmp_path / "out/llama.gguf", tmp_path), ours(subject, plan), **SAME)


@pytest.mark.parametrize("architecture", OPTIONAL_BIASES)
def test_graphs_add_the_biases_that_they_are_said_to(architecture: str, subject: Subject, tmp_path: Path) -> None:
    """A graph that has no place for a bias refuses the file or ignores it; neither happens."""
    if architecture == "apertus":
        pytest.skip("apertus files have other tensors; its graph was read, not run")
    plain, biased = tmp_path / "plain.gguf", tmp_path / "biased.gguf"
    rename(Path(subject.source.id), plain, architecture)
    names = {"attn": "attn_output", "mlp": "ffn_down"}
    base = theirs(plain, tmp_path)
    for half in sorted(OPTIONAL_BIASES[architecture]):
        bias = GgufTensor(f"blk.1.{names[half]}.bias", (subject.width,), gguf.GGMLQuantizationType.F32)
        numbers = np.linspace(-2, 2, subject.width, dtype=np.float32)
        rewrite_gguf(read_gguf(plain), biased, {bias.name: lambda n=numbers: [n.view(np.uint8)]}, {bias.name: bias})
        assert float((theirs(biased, tmp_path) - base).abs().max()) > 0.1, half


def test_graphs_without_a_place_refuse_the_file(subject: Subject, tmp_path: Path) -> None:
    """Negative control: what would happen if a plan that needs a bias were not refused."""
    source = write_gguf(tmp_path / "qwen3.gguf", "qwen3")
    bias = GgufTensor("blk.1.ffn_down.bias", (48,), gguf.GGMLQuantizationType.F32)
    rewrite_gguf(
        read_gguf(source), tmp_path / "biased.gguf", {bias.name: lambda: [np.zeros(192, np.uint8)]}, {bias.name: bias}
    )
    with pytest.raises(RuntimeError, match="did not load"):
        run_llama(tmp_path / "biased.gguf", IDS, tmp_path)


def rename(source: Path, target: Path, architecture: str) -> None:
    """The same tensors for another graph of the same kind."""
    reader, writer = gguf.GGUFReader(source), gguf.GGUFWriter(target, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        item = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key.replace("llama.", f"{architecture}.", 1), field.contents(), kind, item)
    if architecture == "granite":
        writer.add_logit_scale(1.0)  # its graph wants one
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
