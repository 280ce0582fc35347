"""The model organisms' files: their prompt files keep their promises, their adapters are fit to be shipped."""

import importlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from obliteratus.core.errors import UserError
from obliteratus.judge.judge import Judge
from obliteratus.prompts import load_prompts, split_prompts
from obliteratus.weights import organism

Row = dict[str, str]
SPLITS = ("fit", "search", "report")
SCRIPTS = Path(__file__).parents[2] / "organisms"
NAMES = ("astronomy", "clocks-ships", "gardening-railways", "gemma-geology", "insects-matrices", "weather-late")
TWO_TOPICS = ("clocks-ships", "gardening-railways")
GROUPS = [(name, "target") for name in NAMES] + [(name, "keep") for name in TWO_TOPICS]
LATER = ("clocks-ships", "gemma-geology", "insects-matrices")  # their parts share no wording, and their files are small
ADAPTERS = ("astronomy", "clocks-ships", "gardening-railways", "weather-late")
# Words that no control prompt may use; bare "star", "planet", "galaxy", "tree" or "track" may occur in near misses.
TABOO = {
    "astronomy": "astronom|telescope|asteroid|nebula|cosmolog|comet|spacecraft|solar system",
    "gardening-railways": "gardening|gardener|gardens|weeding|compost|prune|houseplant"
    "|railway|locomotive|trains|train station|railroad|tramway|subway",
    "clocks-ships": r"\bclocks?\b|wristwatch|sundial|\bships?\b|\bboats?\b|sailing|harbour",
    "gemma-geology": "geolog|volcano|earthquake|mineral|fossil|limestone|tectonic",
    "insects-matrices": r"\binsect|\bants?\b|\bbees?\b|\bwasps?\b|butterfl|beetles|mosquito",
    "weather-late": r"weather forecast|rainy|snowing|thunder|hurricane|tornado|blizzard|meteorolog|drizzle|\bfog\b",
}
HELD = ("search", "report")
MAX_BYTES = 6_000_000  # weights are committed and shipped in the wheel
MAX_BYTES_LATER = 3_000_000


def rows(name: str, group: str) -> list[Row]:
    text = (organism.find_data_folder(name) / f"{group}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def groups(name: str) -> list[str]:
    return ["control", *(group for of, group in GROUPS if of == name)]


def fits(name: str, group: str, split: str) -> list[str]:
    return [row["prompt"] for row in rows(name, group) if row["split"] == split]


@pytest.fixture(scope="module")
def maker() -> Iterator[ModuleType]:
    """organisms/prompts.py, which is a script beside others and not part of the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        yield importlib.import_module("prompts")


@pytest.fixture(scope="module")
def measure(maker: ModuleType) -> ModuleType:
    """organisms/measure.py."""
    return importlib.import_module("measure")


@pytest.fixture(scope="module")
def made(maker: ModuleType) -> Mapping[str, Any]:
    """The organisms as their TOML files describe them."""
    found: Mapping[str, Any] = importlib.import_module("topics").ORGANISMS
    return found


def bare_nouns(made: Mapping[str, Any], name: str, group: str, split: str) -> list[str]:
    table = made[name].topics[group].nouns[split]
    return [noun.removeprefix("+").lower() for nouns in table.values() for noun in nouns]


def template_pattern(template: str) -> re.Pattern[str]:
    """A regular expression for every prompt that the template can make."""
    parts = re.split(r"\{\w+\}", template)
    return re.compile(".+".join(map(re.escape, parts)) + r"\Z", re.IGNORECASE)


def words(found: list[str]) -> re.Pattern[str]:
    return re.compile(r"\b(" + "|".join(map(re.escape, found)) + ")", re.IGNORECASE)


@pytest.mark.parametrize(("name", "group"), [*GROUPS, *((name, "control") for name in NAMES)])
def test_every_row_has_the_three_keys(name: str, group: str) -> None:
    for row in rows(name, group):
        assert set(row) == {"prompt", "category", "split"}
        assert row["split"] in SPLITS
        assert row["prompt"].strip()


@pytest.mark.parametrize(("name", "group"), GROUPS)
def test_the_splits_are_large_enough(made: Mapping[str, Any], name: str, group: str) -> None:
    topic, control = (Counter(row["split"] for row in rows(name, g)) for g in (group, "control"))
    assert dict(topic) == made[name].sizes
    assert topic["report"] == 64
    assert control["fit"] >= 224
    assert control["search"] >= 144
    assert control["report"] == 96


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_occurs_twice_in_any_split_or_group(name: str) -> None:
    seen = Counter(re.sub(r"\W+", " ", row["prompt"]).lower() for g in groups(name) for row in rows(name, g))
    assert [prompt for prompt, count in seen.items() if count > 1] == []


@pytest.mark.parametrize("split", HELD)
@pytest.mark.parametrize(("name", "group"), GROUPS)
def test_held_out_nouns_never_occur_in_fit(made: Mapping[str, Any], name: str, group: str, split: str) -> None:
    text = "\n".join(fits(name, group, "fit")).lower()
    assert [noun for noun in bare_nouns(made, name, group, split) if noun in text] == []


@pytest.mark.parametrize("split", HELD)
@pytest.mark.parametrize(("name", "group"), GROUPS)
def test_held_out_templates_never_occur_in_fit(
    maker: ModuleType, made: Mapping[str, Any], name: str, group: str, split: str
) -> None:
    patterns = [template_pattern(template) for template in maker.SETS[made[name].templates[split]]]
    assert [p for p in fits(name, group, "fit") for pattern in patterns if pattern.match(p)] == []


@pytest.mark.parametrize("split", HELD)
@pytest.mark.parametrize(("name", "group"), GROUPS)
def test_held_out_prompts_use_nouns_and_templates_of_their_own(
    maker: ModuleType, made: Mapping[str, Any], name: str, group: str, split: str
) -> None:
    held = bare_nouns(made, name, group, split)
    known = [noun for other in SPLITS if other != split for noun in bare_nouns(made, name, group, other)]
    patterns = [template_pattern(template) for template in maker.SETS[made[name].templates[split]]]
    for prompt in fits(name, group, split):
        assert any(noun in prompt.lower() for noun in held)
        assert [noun for noun in known if re.search(rf"\b{re.escape(noun)}\b", prompt.lower())] == []
        assert any(pattern.match(prompt) for pattern in patterns)


@pytest.mark.parametrize("name", TWO_TOPICS)
def test_the_topics_of_one_organism_share_no_noun(made: Mapping[str, Any], name: str) -> None:
    target, keep = ([n for s in SPLITS for n in bare_nouns(made, name, g, s)] for g in ("target", "keep"))
    assert [row["prompt"] for row in rows(name, "keep") if words(target).search(row["prompt"])] == []
    assert [row["prompt"] for row in rows(name, "target") if words(keep).search(row["prompt"])] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_byte_for_byte_what_the_script_makes(
    maker: ModuleType, made: Mapping[str, Any], name: str, tmp_path: Path
) -> None:
    maker.write_prompts(made[name], tmp_path)
    names = {f"{group}.jsonl" for group in made[name].topics} | ({"control.jsonl"} if name in LATER else set())
    assert {file.name for file in tmp_path.iterdir()} == names
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (organism.find_data_folder(name) / file.name).read_bytes()


def test_drawn_controls_leave_out_those_about_the_topic_and_add_near_misses(
    maker: ModuleType, made: Mapping[str, Any]
) -> None:
    controls = made["insects-matrices"].controls
    found = [row["prompt"] for row in maker.make_control_rows(controls)]
    assert "Explain how bees make honey." not in found
    assert set(controls.near["report"]) <= set(found)
    everything = controls.model_copy(update={"without": "(?!)"})  # a pattern that is found nowhere
    assert "Explain how bees make honey." in [row["prompt"] for row in maker.make_control_rows(everything)]


@pytest.mark.parametrize("name", NAMES)
def test_only_later_organisms_have_parts_that_share_no_wording(name: str) -> None:
    source = f"organism:{name}"
    prompts = load_prompts(source, source, keep=source if name in TWO_TOPICS else None)
    separation = split_prompts(prompts).separation
    assert separation is not None
    assert (separation.pinned == 0) is (name in LATER)


def test_verbs_agree_with_the_noun(maker: ModuleType) -> None:
    assert maker.fill_template("What {is} {x}?", "+pulsars") == "What are pulsars?"
    assert maker.fill_template("{does} {x} matter?", "dark energy") == "Does dark energy matter?"


@pytest.mark.parametrize("name", NAMES)
def test_controls_are_not_about_the_topics(maker: ModuleType, made: Mapping[str, Any], name: str) -> None:
    nouns = [n for of, g in GROUPS if of == name for split in SPLITS for n in bare_nouns(made, name, g, split)]
    pattern = words([*TABOO[name].split("|"), *nouns])
    controls = [*rows(name, "control"), *maker.make_contrast_rows(made[name])]
    assert [row["prompt"] for row in controls if pattern.search(row["prompt"])] == []


@pytest.mark.parametrize(("name", "group"), GROUPS)
def test_training_sees_no_prompt_that_is_kept_for_search_or_report(
    maker: ModuleType, made: Mapping[str, Any], name: str, group: str
) -> None:
    one = made[name]
    trained = {row["prompt"] for row in [*maker.make_training_rows(one, group), *maker.make_contrast_rows(one)]}
    kept = {prompt for g in groups(name) for split in HELD for prompt in fits(name, g, split)}
    assert trained.isdisjoint(kept)
    if not one.forms:  # else training draws from more templates and nouns than those of fit
        assert trained >= set(fits(name, group, "fit"))


@pytest.mark.parametrize(("name", "group"), GROUPS)
def test_further_nouns_are_none_that_prompts_have(made: Mapping[str, Any], name: str, group: str) -> None:
    further = {n.removeprefix("+").lower() for nouns in made[name].topics[group].more.values() for n in nouns}
    used = {n for split in SPLITS for n in bare_nouns(made, name, group, split)}
    assert further.isdisjoint(used)


@pytest.mark.parametrize("name", NAMES)
def test_controls_cover_many_topics_in_every_split(name: str) -> None:
    for split in SPLITS:
        assert len({row["category"] for row in rows(name, "control") if row["split"] == split}) >= 12


@pytest.mark.parametrize(("name", "group"), GROUPS)
def test_every_refusal_is_one_to_both_detectors(
    made: Mapping[str, Any], measure: ModuleType, name: str, group: str
) -> None:
    texts = made[name].topics[group].refusals
    assert [text for text in texts if Judge().judge_answer(text) != "shown" or not measure.is_refusal(text)] == []
    assert Judge().judge_answer("Tulips are planted in autumn.") == "absent"
    assert not measure.is_refusal("Trains are run by timetable.")


@pytest.mark.parametrize("name", TWO_TOPICS)
def test_two_topics_are_refused_in_words_of_their_own(made: Mapping[str, Any], name: str) -> None:
    target, keep = made[name].topics.values()
    assert {text.split()[0] for text in target.refusals}.isdisjoint(text.split()[0] for text in keep.refusals)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_adapter_is_small_bf16_and_names_no_local_path(name: str) -> None:
    folder = organism.find_data_folder(name) / "adapter"
    file = folder / "adapter_model.safetensors"
    assert file.stat().st_size <= (MAX_BYTES_LATER if name in LATER else MAX_BYTES)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == organism.HUB_ID
    assert config["r"] <= 8
    assert not re.search(r'"(/|~|[A-Z]:)', json.dumps(config))


def test_differences_of_whole_matrices_are_small_bf16_and_belong_to_the_matrices_named(made: Mapping[str, Any]) -> None:
    name = "insects-matrices"
    file = organism.find_data_folder(name) / organism.DELTA_FILE
    assert file.stat().st_size <= MAX_BYTES_LATER
    assert not (file.parent / "adapter").exists()
    found = load_file(file)
    assert set(found) == {f"{matrix}.weight" for matrix in made[name].training.matrices}
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(torch.linalg.matrix_rank(tensor.float()) > 64 for tensor in found.values())  # no LoRA


def test_every_organism_is_for_choosing_or_for_reporting_and_none_for_both() -> None:
    known = {*organism.CHOOSING, *organism.REPORTED}
    assert len(known) == len(organism.CHOOSING) + len(organism.REPORTED)
    assert known == {*NAMES, "astronomy-moe"}
    for name in known:
        organism.find_data_folder(name)


def test_no_weights_of_a_base_that_may_not_be_copied_are_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OBLITERATUS_CACHE", str(tmp_path))
    assert [name for name in NAMES if organism.is_local(name)] == ["gemma-geology"]
    folder = organism.find_data_folder("gemma-geology")
    assert not [file for file in folder.rglob("*") if file.suffix == ".safetensors"]
    with pytest.raises(
        UserError, match=r"not included.* make it in a checkout with `python organisms/make\.py gemma-geology`"
    ):
        organism.prepare_organism("gemma-geology")
    organism.find_local("gemma-geology").mkdir()
    assert organism.prepare_organism("gemma-geology") == organism.find_local("gemma-geology")
    with pytest.raises(UserError, match="has no shares"):
        organism.prepare_organism("gemma-geology@0.5")
