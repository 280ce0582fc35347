"""Opening a model: what goes in comes back, and bad input gets one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from accelerate import disk_offload
from safetensors.torch import load_file, save_file
from tests.support.gguf_files import write_gguf
from tests.support.tiny import tiny, tiny_tokenizer

from obliteratus.core.errors import UserError
from obliteratus.summon.load import assemble_subject, open_subject
from obliteratus.summon.summary import summarize_model
from obliteratus.weights.finite import check_finite


def saved(folder: Path, name: str = "llama", **options: object) -> Path:
    tiny(name).save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
def test_round_trip(name: str, tmp_path: Path) -> None:
    subject = open_subject(saved(tmp_path, name), device="cpu", self_test=True)
    model = tiny(name)
    ids = torch.arange(12)[None]
    assert torch.equal(subject.model(ids).logits, model(ids).logits)
    assert not subject.model.training
    assert not any(p.requires_grad for p in subject.model.parameters())
    assert subject.source.digest == assemble_subject(model, tiny_tokenizer(), id="x").source.digest
    assert subject.tokenizer("hi")["input_ids"] == tiny_tokenizer()("hi")["input_ids"]
    assert subject.source.id == str(tmp_path)
    assert (subject.source.dtype, subject.device.type) == ("float32", "cpu")


def test_shards(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert open_subject(tmp_path).n_layers == 3


def test_dtype(tmp_path: Path) -> None:
    subject = open_subject(saved(tmp_path), dtype="bf16")
    assert subject.model.dtype == torch.bfloat16
    assert subject.source.dtype == "bfloat16"


def test_device_map(tmp_path: Path) -> None:
    subject = open_subject(saved(tmp_path), device="map")
    assert subject.source.digest == open_subject(tmp_path).source.digest


def test_digest_knows_the_model_and_not_its_dtype(tmp_path: Path) -> None:
    digest = open_subject(saved(tmp_path)).source.digest
    assert digest == open_subject(tmp_path, dtype="bfloat16").source.digest
    assert digest != assemble_subject(tiny("llama", seed=1), tiny_tokenizer(), id="x").source.digest
    edited = tiny("llama")
    edited.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    assert digest != assemble_subject(edited, tiny_tokenizer(), id="x").source.digest


def test_digest_of_a_bf16_checkpoint_in_fp16() -> None:
    stored = tiny("mistral").bfloat16()
    other = tiny("mistral").bfloat16().half()
    assert assemble_subject(stored, None, id="x").source.digest == assemble_subject(other, None, id="x").source.digest


def test_offloaded_weights_are_sampled_and_checked(tmp_path: Path) -> None:
    digest = assemble_subject(tiny("mistral"), None, id="x").source.digest
    model = tiny("mistral")
    model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    disk_offload(model, tmp_path, execution_device="cpu")
    assert model.model.embed_tokens.weight.is_meta
    assert assemble_subject(model, None, id="x").source.digest == digest
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        check_finite(model, "x")


def test_organism_base_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OBLITERATUS_CACHE", str(tmp_path))
    saved(tmp_path / "smollm2-135m-instruct-q4_1")  # a tiny model in the place of the converted base
    assert open_subject("organism:base").source.id == "organism:base"


# --------------------------------------------------------------------------------------- bad folders
def truncate(file: Path, size: int = -100) -> None:
    file.write_bytes(file.read_bytes()[:size])


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def only_pickles(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def bad_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"?" * 8 + file.read_bytes()[16:])


def lose_a_shard(folder: Path) -> None:
    shutil.rmtree(folder)
    saved(folder, max_shard_size="20KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()


def bad_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[]")


def rewrite_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def nan(folder: Path, value: float) -> None:
    edit_weights(folder, lambda w: w["model.layers.1.mlp.up_proj.weight"][0, 0].fill_(value))


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


DOWN = "model.layers.1.mlp.down_proj.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "adapter": (adapter, "holds an adapter"),
    "garbled config": (lambda f: (f / "config.json").write_text("{"), "configuration cannot be read: .*JSON"),
    "impossible config": (lambda f: rewrite_config(f, hidden_size=33), "configuration cannot be read: .*33"),
    "unknown to transformers": (lambda f: rewrite_config(f, model_type="novel"), "'?`?novel"),
    "unknown to us": (lambda f: rewrite_config(f, model_type="bloom"), "add an entry for it to summon/architectures"),
    "pickles": (only_pickles, r"pickled weights \(pytorch_model.bin\); only safetensors and GGUF are read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "truncated": (
        lambda f: truncate(f / "model.safetensors"),
        "is truncated: .* expected; download it again",
    ),
    "cut in its header": (lambda f: truncate(f / "model.safetensors", 40), "is truncated"),
    "empty file": (lambda f: truncate(f / "model.safetensors", 0), "is truncated"),
    "corrupt header": (bad_header, "corrupt safetensors header"),
    "too long": (lambda f: (f / "model.safetensors").open("ab").write(b"x"), "is corrupt: "),
    "lost shard": (lose_a_shard, "lacks the shard model-00002"),
    "bad index": (bad_index, "is not a valid shard index"),
    "lost tensor": (lambda f: edit_weights(f, lambda w: w.pop(DOWN)), f"1 weights are missing, e.g. {DOWN}"),
    "wrong shape": (
        lambda f: edit_weights(f, lambda w: w.update({DOWN: torch.zeros(3, 3)})),
        "weights cannot be loaded",
    ),
    "NaN": (lambda f: nan(f, torch.nan), r"layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"),
    "Inf": (lambda f: nan(f, -torch.inf), r"layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"),
    "no tokenizer": (
        lambda f: [file.unlink() for file in f.glob("*token*")],
        "no usable tokenizer",
    ),
    "garbled tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "no usable tokenizer"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_folder(case: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    spoil, message = BAD[case]
    spoil(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_subject(folder)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value) or "architectures" in message


# ------------------------------------------------------------------------------------- bad arguments
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "does not exist; give a model folder"),
        ("./no/such/folder", "does not exist"),
        ("missing.gguf", "does not exist"),
        ("no model name", "does not exist"),
        ("", "does not exist|has no config.json"),
        (
            "nobody/no-such-model",
            "configuration cannot be read: .*; check the name, the revision and the network",
        ),
        ("organism:nonesuch", "nonesuch"),
    ],
)
def test_bad_source(source: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_subject(source)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="is a file; give a model folder"):
        open_subject(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float23"}, "dtype 'float23' does not exist; did you mean"),
        ({"device": "gpu"}, "device 'gpu' does not exist"),
        ({"device": "cuda:7"}, "device 'cuda:7' is not available"),
    ],
)
def test_bad_option(options: dict[str, str], message: str, tmp_path: Path) -> None:
    if options.get("device", "").startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is such a device")
    with pytest.raises(UserError, match=message):
        open_subject(tmp_path, **options)


# --------------------------------------------------------------------------------------------- GGUF
def test_gguf(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    subject = open_subject(file, self_test=True)
    assert subject.source.quantization == "F32"
    assert torch.equal(
        subject.module("model.layers.0.mlp.down_proj").weight,
        tiny("llama").model.layers[0].mlp.down_proj.weight,
    )
    subject.model.save_pretrained(tmp_path / "again")  # the quantization mark is gone
    found = summarize_model(file)
    assert (found.sites, found.dtype, found.quantization) == (subject.sites, "float32", "F32")


def test_the_header_of_a_gguf_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, parsed = write_gguf(tmp_path / "tiny.gguf"), []
    build = gguf.GGUFReader._build_fields
    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", lambda *a: (parsed.append(1), build(*a))[1])
    open_subject(file)
    assert len(parsed) == 1
    open_subject.__wrapped__(file)  # without the decorator transformers parses it for each part
    assert len(parsed) > 2
    assert gguf.GGUFReader(file) is not gguf.GGUFReader(file)  # nothing is kept beyond the call


@pytest.mark.parametrize("size", [-100, 2000, 10, 3, 0])
def test_truncated_gguf(size: int, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    truncate(file, size)
    for opener in (open_subject, summarize_model):
        with pytest.raises(UserError, match=r"is truncated|not a GGUF file"):
            opener(file)


def test_a_folder_with_gguf_only_says_so(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(UserError, match=r"give the GGUF file itself, e\.g\. .*tiny\.gguf"):
        open_subject(tmp_path)
