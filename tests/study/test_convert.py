"""Studies of the earlier program: every key of its YAML is taken over, named in a note, or refused."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import pytest
from tests.support.studies import OLD_MODEL as MODEL
from tests.support.studies import OLD_STUDY as PLAIN
from tests.support.studies import write_yaml

from obliteratus.core.errors import UserError
from obliteratus.study.convert import convert_yaml, to_toml
from obliteratus.study.files import load_study
from obliteratus.study.settings import Study


def converted(folder: Path, **changes: Any) -> tuple[Study, list[str]]:
    return convert_yaml(write_yaml({k: v for k, v in {**PLAIN, **changes}.items() if v is not None}, folder))


def test_a_plain_study_is_taken_over_whole(tmp_path: Path) -> None:
    made, notes = converted(tmp_path)
    assert notes == []
    assert (made.model, made.dtype, made.output, made.name) == ("gpt2", "float32", "results/mine", "old")
    assert (made.data.texts, made.data.samples, made.data.length) == ("hub:owner/texts:test", 50, 256)
    assert made.batch == 4 * 256  # rows of full length, in tokens
    assert [s.use for s in made.strategies] == ["layers"]
    assert [m.use for m in made.metrics] == ["perplexity"]


def test_all_strategies_have_their_counterpart(tmp_path: Path) -> None:
    names = {"layer_removal": "layers", "ffn_ablation": "ffn", "head_pruning": "heads"}
    steps: list[dict[str, Any]] = [{"name": n, "params": {}} for n in names]
    steps.append({"name": "embedding_ablation", "params": {"chunk_size": 24}})
    made, notes = converted(tmp_path, strategies=steps)
    assert [s.use for s in made.strategies] == [*names.values(), "embeddings"]
    assert made.strategies[-1].options == {"chunk": 24}
    assert notes == []


def test_its_defaults_stay_its_defaults(tmp_path: Path) -> None:
    made, notes = convert_yaml(write_yaml({"model": MODEL, "strategies": [{"name": "layer_removal"}]}, tmp_path))
    assert (made.dtype, made.data.length, made.data.texts) == ("float32", 512, "")
    assert [m.use for m in made.metrics] == ["perplexity"]
    assert len(notes) == 1
    assert notes[0].startswith("dataset.max_samples: not given")


NOTED: dict[str, tuple[dict[str, Any], str]] = {
    "device": ({"model": {**MODEL, "device": "cuda"}}, "model.device: give --device cuda"),
    "code": ({"model": {**MODEL, "trust_remote_code": True}}, "model.trust_remote_code: give --trust-remote-code"),
    "labels": ({"model": {**MODEL, "num_labels": 2}}, "model.num_labels"),
    "label column": ({"dataset": {"name": "a/b", "label_column": "y", "max_samples": 5}}, "dataset.label_column"),
    "subset": ({"dataset": {"name": "a/b", "subset": "raw", "max_samples": 5}}, "dataset.subset: .*'raw/test'"),
    "a file's column": ({"dataset": {"name": "t.csv", "text_column": "x", "max_samples": 5}}, "dataset.text_column"),
    "metric": ({"metrics": ["perplexity", "accuracy"]}, "metrics: accuracy was a classifier's"),
    "remote": ({"remote": {"host": "h", "gpus": [0]}}, "remote: host, gpus: .*--ray"),
    "heeded": ({"strategies": [{"name": "ffn_ablation", "params": {"layer_indices": [1]}}]}, r"the blocks \[1\]"),
}


@pytest.mark.parametrize("case", NOTED)
def test_what_is_not_taken_over_is_named(case: str, tmp_path: Path) -> None:
    changes, note = NOTED[case]
    _, notes = converted(tmp_path, **changes)
    assert len(notes) == 1
    assert re.search(note, notes[0])


def test_what_its_strategies_did_not_heed_restricts_ours(tmp_path: Path) -> None:
    made, _ = converted(tmp_path, strategies=[{"name": "head_pruning", "params": {"layers": [0, 3]}}])
    assert made.strategies[0].options == {"layers": [0, 3]}


def test_where_texts_are_read_from(tmp_path: Path) -> None:
    def texts(**data: Any) -> str:
        return converted(tmp_path, dataset={"max_samples": 5, **data})[0].data.texts

    assert texts(name="a/b", split="validation", text_column="body") == "hub:a/b:validation:body"
    assert texts(name="a/b", subset="raw") == "hub:a/b:raw/test"
    assert texts(name="mine/texts.jsonl") == "mine/texts.jsonl"
    assert texts() == ""


@pytest.mark.parametrize("key", ["preset", "study_preset"])
def test_a_preset_fills_what_is_open(key: str, tmp_path: Path) -> None:
    made, notes = convert_yaml(write_yaml({"model": MODEL, key: "quick", "max_length": 64}, tmp_path))
    assert made.strategies == load_study("quick").strategies
    assert (made.data.samples, made.data.length) == (25, 64)
    assert "preset 'quick'" in notes[0]
    whole, _ = convert_yaml(write_yaml({"model": MODEL, key: "quick"}, tmp_path))
    assert whole.data.length == load_study("quick").data.length == 128


def test_what_the_file_says_goes_before_the_preset(tmp_path: Path) -> None:
    made, _ = converted(tmp_path, preset="robustness")
    assert [s.use for s in made.strategies] == ["layers"]
    assert (made.batch, made.data.samples) == (4 * 256, 50)


@pytest.mark.parametrize("name", ["jailbreak", "guardrail"])
def test_its_studies_of_refusal_measure_refusal_now(name: str, tmp_path: Path) -> None:
    made, notes = convert_yaml(write_yaml({"model": MODEL, "preset": name}, tmp_path))
    assert made.metrics == load_study("refusal").metrics
    assert any("measured perplexity alone" in n for n in notes)


REFUSED: dict[str, tuple[Any, str]] = {
    "an unknown key": ({**PLAIN, "seeds": 3}, "seeds: extra inputs"),
    "an unknown key of the model": ({**PLAIN, "model": {**MODEL, "revision": "x"}}, r"model\.revision: extra"),
    "an unknown key of the set": ({**PLAIN, "dataset": {"nam": "x"}}, r"dataset\.nam: extra"),
    "a strategy's unknown key": ({**PLAIN, "strategies": [{"name": "ffn_ablation", "x": 1}]}, r"strategies\.0\.x"),
    "a classifier": ({**PLAIN, "model": {**MODEL, "task": "classification"}}, r"model\.task: .*'causal_lm'"),
    "an unknown strategy": ({**PLAIN, "strategies": [{"name": "layer_remova"}]}, "did you mean 'layer_removal'"),
    "an unknown parameter": (
        {**PLAIN, "strategies": [{"name": "embedding_ablation", "params": {"chunk": 3}}]},
        r"strategies\.0\.params: parameter 'chunk'",
    ),
    "one thing twice": (
        {**PLAIN, "strategies": [{"name": "ffn_ablation", "params": {"layers": [0], "layer_indices": [1]}}]},
        "a second time",
    ),
    "an unknown metric": ({**PLAIN, "metrics": ["bleu"]}, "metric 'bleu' does not exist"),
    "an unknown preset": ({"model": MODEL, "preset": "quik"}, "did you mean 'quick'"),
    "two presets": ({"model": MODEL, "preset": "quick", "study_preset": "full"}, "name two studies"),
    "nothing to knock out": ({"model": MODEL}, "neither strategies nor a preset"),
    "no model": ({"preset": "quick"}, "model: field required"),
    "no number": ({**PLAIN, "max_length": "long"}, "max_length: .*valid integer"),
    "no mapping": ("- a\n- b\n", "not a study"),
    "nothing": ("", "not a study"),
    "no YAML": ("model: {name: x", "not YAML"),
    "a key twice": ("model: {name: x}\npreset: quick\nmodel: {name: y}\n", "old.yaml:3: 'model' comes twice"),
    "a key twice within": ("model:\n  name: x\n  name: y\npreset: quick\n", "old.yaml:3: 'name' comes twice"),
    "code": ("model: !!python/object/apply:os.getcwd []\n", "not YAML"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_means_nothing_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    data, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        convert_yaml(write_yaml(data, tmp_path))
    assert "\n" not in str(caught.value)


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such study file"):
        convert_yaml(tmp_path / "none.yaml")


def test_without_pyyaml_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "yaml":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    path = write_yaml(PLAIN, tmp_path)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'obliteratus\[yaml\]'"):
        convert_yaml(path)


def test_the_text_reads_back_and_says_what_was_left(tmp_path: Path) -> None:
    made, notes = converted(tmp_path, remote={"host": "h\nmodel = 3"})
    text = to_toml(made, notes, tmp_path / "old.yaml")
    (tmp_path / "new.toml").write_text(text)
    assert load_study(tmp_path / "new.toml") == made
    assert text.startswith("# Made from old.yaml")
    assert "# Differs: remote: host" in text
