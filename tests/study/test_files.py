"""Study files: all shipped ones are valid, each is its own text again, and mistakes get one line."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from obliteratus.cli.study import PRESETS
from obliteratus.core.errors import UserError
from obliteratus.core.toml import dump_toml, parse_overrides
from obliteratus.study.data import check_study
from obliteratus.study.files import fill_prompts, list_studies, load_study, parse_study

WANTED = ["attention", "embeddings", "full", "knowledge", "layers", "pruning", "quick", "refusal", "robustness"]
BASE: dict[str, Any] = {"strategies": [{"use": "layers"}]}


def test_the_presets_are_there_and_the_help_names_them() -> None:
    assert list_studies() == WANTED == sorted(PRESETS.split(", "))


@pytest.mark.parametrize("name", WANTED)
def test_a_preset_parses_and_says_what_it_is_for(name: str) -> None:
    made = load_study(name)
    assert made.name == name
    assert made.about
    assert not made.model
    assert not made.output


@pytest.mark.parametrize("name", WANTED)
def test_a_preset_names_what_is_registered(name: str) -> None:
    changes = {"model": "organism:astronomy"}
    check_study(fill_prompts(load_study(name, changes)))


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(UserError, match="sizes"):
        check_study(load_study("robustness", {"strategies.3.sizes": 3}))


def test_presets_measure_what_the_earlier_program_measured() -> None:
    """Its strategies, texts and lengths, where both have the preset."""
    kinds = {"quick": "layers ffn", "full": "layers heads ffn embeddings", "attention": "heads", "layers": "layers ffn"}
    kinds |= {"knowledge": "ffn embeddings", "pruning": "heads ffn", "embeddings": "embeddings"}
    for name, wanted in kinds.items():
        assert [s.use for s in load_study(name).strategies] == wanted.split(), name
    sizes = {
        name: (load_study(name).data.samples, load_study(name).data.length) for name in ("quick", "full", "robustness")
    }
    assert sizes == {"quick": (25, 128), "full": (200, 256), "robustness": (500, 512)}
    chunks = {name: load_study(name).strategies[-1].options["chunk"] for name in ("full", "knowledge", "embeddings")}
    assert chunks == {"full": 48, "knowledge": 32, "embeddings": 16}
    assert load_study("robustness").batch == 8 * 512


def test_the_refusal_preset_measures_refusal_first() -> None:
    assert [m.use for m in load_study("refusal").metrics] == ["behavior", "first_token_kl", "perplexity"]


@pytest.mark.parametrize("name", WANTED)
def test_a_dump_reads_back(name: str, tmp_path: Path) -> None:
    made = load_study(name, {"model": "some/model", "data.target": 'a "quoted" file.txt', "seed": 3})
    (tmp_path / "copy.toml").write_text(dump_toml(made))
    assert load_study(tmp_path / "copy.toml") == made


def test_values_are_replaced_by_path() -> None:
    changes = {"data.samples": 3, "strategies.1.layers": [0, 2], "strategies.0.use": "attention", "model": "m"}
    made = load_study("quick", changes)
    assert (made.data.samples, made.model) == (3, "m")
    assert [(s.use, s.options) for s in made.strategies] == [("attention", {}), ("ffn", {"layers": [0, 2]})]
    assert load_study("quick").data.samples == 25


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a key that is none": ({"sample": 3}, "key 'sample' does not exist"),
    "a renamed key": ({"data.labelled": "x.jsonl"}, "'labelled' is now called 'labeled'"),
    "a key of data that is none": (
        {"data.sample": 3},
        r"key 'data\.sample' does not exist; did you mean 'data\.samples'",
    ),
    "too few": ({"data.samples": 0}, r"data\.samples: .* greater than or equal to 1 \(got 0\)"),
    "no strategy": ({"strategies": []}, "strategies: .*at least 1 item"),
    "a strategy without a name": ({"strategies": [{"size": 2}]}, r"strategies\.0\.use: field required"),
    "past the end": ({"strategies.7.size": 2}, "there is no entry '7'; the entries are 0 to 1"),
    "below a value": ({"seed.x": 2}, "'seed' is a single value"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_gets_one_line(case: str) -> None:
    changes, message = MISTAKES[case]
    with pytest.raises(UserError, match=message) as caught:
        load_study("quick", changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "text", "message"),
    [
        ("qick", None, "preset 'qick' does not exist; did you mean 'quick'"),
        ("none.toml", None, "this study file does not exist"),
        ("bad.toml", "strategies = [", "not valid TOML"),
        ("old.yaml", "model: {}", "study --from-yaml"),
        ("bad.toml", "about = 'nothing'", "strategies: field required"),
    ],
)
def test_a_source_that_is_none(source: str, text: str | None, message: str, tmp_path: Path) -> None:
    where = tmp_path / source if "." in source else Path(source)
    if text is not None:
        where.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_study(where)
    assert "\n" not in str(caught.value)


def test_an_organism_has_its_own_prompts() -> None:
    def prompts(model: str, source: str = "refusal", **changes: Any) -> tuple[str, str]:
        data = fill_prompts(load_study(source, {"model": model, **changes})).data
        return data.target, data.control

    own = "organism:astronomy"
    assert prompts(own) == (own, own)
    assert prompts("organism:astronomy@0.5") == (own, own)  # half of the adapter, all of the prompts
    assert prompts("organism:astronomy-moe") == ("organism:astronomy-moe",) * 2
    assert prompts("organism:base") == ("", "")  # has none
    assert prompts("some/model") == ("", "")
    assert prompts(own, "quick") == ("", "")  # needs none
    assert prompts(own, **{"data.target": "mine.txt"}) == ("mine.txt", "")  # one given: the other is missing, not ours


def test_plain_data_is_a_study() -> None:
    assert parse_study(BASE, "here").metrics[0].use == "perplexity"


def test_the_guide_shows_studies_that_work() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "studies.md").read_text()
    texts = [t for t in re.findall(r"```toml\n(.*?)```", guide, re.DOTALL) if "[[strategies]]" in t]
    assert len(texts) == 1
    made = parse_study(tomllib.loads(texts[0]), "studies.md")
    assert [s.use for s in made.strategies] == ["heads", "random"]
    changes = re.findall(r"obliteratus study (\S+) (\S+) (.*) --out", guide)
    assert len(changes) == 2
    for source, model, options in changes:
        pairs = [a or b for a, b in re.findall(r"--set (?:'([^']*)'|(\S+))", options)]
        assert fill_prompts(load_study(source, {**parse_overrides(pairs), "model": model})).data.samples == 8
