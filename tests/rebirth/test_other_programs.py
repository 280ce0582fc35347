"""What is saved is whole for others: transformers 4.57 reads the same model, and files beside the weights stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from tests.support.gguf_files import write_gguf
from tests.support.plans import random_plan
from tests.support.tiny import run_of
from tests.support.transformers4 import KINDS, PROMPT, SIDE_FILES, make_models, read_logits

from obliteratus.core.results import Run
from obliteratus.core.types import Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.rebirth.save import Form, save
from obliteratus.summon.load import open_subject
from obliteratus.weights.side_files import list_side_files

WRITERS = ("attn.out", "mlp.out")
COMMIT = "c" * 40


@dataclass(frozen=True)
class Saved:
    """A saved model, and what ours says of it."""

    folder: Path
    source: Path | None
    logits: np.ndarray
    run: Run


@dataclass(frozen=True)
class Case:
    """How a model is opened, edited and saved."""

    form: Form = "merged"
    parts: tuple[str, ...] = WRITERS
    opening: Mapping[str, Any] | None = None
    base: str = ""


CASES = {
    "merged": Case(),
    "untied": Case(parts=("embed", *WRITERS)),
    "hub": Case(),
    "packed, onto its base": Case(opening={"quantize": "4bit"}),
    "packed": Case(opening={"quantize": "4bit"}, base="none"),
    "adapter": Case("adapter"),
}
NO_ADAPTER = {("mixture", "adapter")}  # an adapter cannot hold all experts' tensor
GGUF = {"llama": "llama", "qwen3": "qwen3", "mixture": "qwen3_moe"}
NAMES = [f"{kind}, {case}" for kind in KINDS for case in CASES if (kind, case) not in NO_ADAPTER] + [
    f"{kind}, gguf" for kind in GGUF
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    make_models(folder)
    for kind, name in GGUF.items():
        write_gguf(folder / f"{kind}.gguf", name)
    return folder


@pytest.fixture(scope="module")
def saved(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    """Every kind of model in every form."""
    made, root = {}, tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(root / "hub"))
        for name in NAMES:
            kind, _, case = name.partition(", ")
            made[name] = _save(sources, kind, case, root / name.replace(", ", "-").replace(" ", "-"))
    return made


def _save(sources: Path, kind: str, name: str, out: Path) -> Saved:
    case, source = CASES.get(name, Case()), sources / kind
    model: str | Path = source
    if name == "hub":
        model = _publish(source, kind)
    elif name == "gguf":
        model, source = sources / f"{kind}.gguf", None
    subject = open_subject(model, **(case.opening or {}))
    plan = random_plan(subject, case.parts, strength=0.7)
    run = save(subject, plan, run_of(subject), out, case.form, base=case.base)
    if case.form == "merged":
        return Saved(out, source, read_ours(open_subject(out, dtype="float32")), run)
    with applied(subject, plan):
        return Saved(out, source, read_ours(subject), run)


def _publish(source: Path, kind: str) -> str:
    """Put the model into the hub's cache, and return its id."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--owner--{kind}"
    shutil.copytree(source, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return f"owner/{kind}"


def read_ours(subject: Subject) -> np.ndarray:
    ids = subject.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits: np.ndarray = subject.model(ids).logits[0, -1].float().numpy()
    return logits


@pytest.fixture(scope="module")
def theirs(saved: dict[str, Saved], tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The logits of each saved model under transformers 4.57."""
    found = read_logits(tmp_path_factory.mktemp("logits") / "logits.npz", [s.folder for s in saved.values()])
    return {name: found[str(one.folder)] for name, one in saved.items()}


@pytest.mark.parametrize("name", NAMES)
def test_transformers_4_reads_the_same_model(name: str, saved: dict[str, Saved], theirs: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(theirs[name], saved[name].logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_files_beside_the_weights_are_the_models_own(name: str, saved: dict[str, Saved]) -> None:
    one = saved[name]
    rewritten = one.run.saved["rewritten"]
    assert all(rewritten.values())  # with the reason
    if one.source is None:
        assert "has no files of it" in rewritten["tokenizer"]
        return
    own = {path.as_posix() for path in list_side_files(one.source)}
    assert own >= {"tokenizer_config.json", "generation_config.json", *SIDE_FILES} - {"README.md"}
    for file in {*own, "config.json", "README.md"} - ({"config.json"} if one.run.saved["form"] == "adapter" else set()):
        same = (one.folder / file).read_bytes() == (one.source / file).read_bytes()
        assert same != (file in rewritten), file


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "mixture"])
def test_untying_is_said_at_every_level(kind: str, saved: dict[str, Saved]) -> None:
    config = json.loads((saved[f"{kind}, untied"].folder / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is False
    assert config.get("text_config", config)["tie_word_embeddings"] is False


def test_a_missing_older_name_would_be_another_model(saved: dict[str, Saved], tmp_path: Path) -> None:
    """Negative control: without ``rope_theta`` transformers 4.57 takes a base of its own, without a word."""
    broken = tmp_path / "broken"
    shutil.copytree(saved["qwen3, packed"].folder, broken)
    config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    assert config.pop("rope_theta") == 50_000
    (broken / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (found,) = read_logits(tmp_path / "logits.npz", [broken]).values()
    assert np.abs(found - saved["qwen3, packed"].logits).max() > 1e-3


def test_names_that_the_source_lacks_are_added(saved: dict[str, Saved], tmp_path: Path) -> None:
    """A folder as transformers 5 saves it, without the older names; and how 4.57 then reads the result."""
    one = saved["llama, merged"]
    assert one.source is not None
    source = tmp_path / "source"
    shutil.copytree(one.source, source)
    subject = open_subject(source, dtype="float32")
    subject.model.config.save_pretrained(source)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    assert "rope_theta" not in config
    theta = config["rope_parameters"]["rope_theta"]
    plan = random_plan(subject, WRITERS)
    run = save(subject, plan, run_of(subject), tmp_path / "out", "merged")
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["rope_theta"] == theta
    assert "older names" in run.saved["rewritten"]["config.json"]
    with applied(subject, plan):
        ours = read_ours(subject)
    (found,) = read_logits(tmp_path / "logits.npz", [tmp_path / "out"]).values()
    np.testing.assert_allclose(found, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama, merged", "llama, hub", "llama, adapter", "llama, gguf"])
def test_the_card_names_a_base_on_the_hub_or_none(name: str, saved: dict[str, Saved]) -> None:
    from huggingface_hub import ModelCard

    one = saved[name]
    card = ModelCard.load(one.folder / "README.md")
    assert card.data.base_model == ("owner/llama" if name.endswith("hub") else None)
    assert str(one.source) not in card.content
    if one.source is not None:
        assert (card.data.license, card.data.license_name, card.data.language) == ("other", "tiny-terms", ["en", "de"])
