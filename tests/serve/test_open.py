"""A chat opens models, plans, adapters and the output folders of runs, and says in one line what it cannot open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.notes import Notes
from tests.support.plans import random_plan
from tests.support.tiny import run_of, tiny, tiny_tokenizer

from obliteratus.core.chat import Turn
from obliteratus.core.errors import UserError
from obliteratus.core.progress import report_to
from obliteratus.excise.plan import save_plan
from obliteratus.inference.stream import AnswerLimits
from obliteratus.rebirth.save import save
from obliteratus.serve.dial import Dial
from obliteratus.serve.open import name_folders, open_for_chat
from obliteratus.summon.load import open_subject

LIMITS = AnswerLimits(tokens=8)
ASKED = [Turn("user", "What is a comet?")]


def answer(opened: tuple[Any, dict[str, Any]], strength: float = 1.0) -> str:
    subject, plans = opened
    return "".join(Dial(subject, *list(plans.values())[:1]).stream(ASKED, strength, LIMITS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, and ``merged``, ``adapter`` and ``plan`` as runs write them."""
    folder = tmp_path_factory.mktemp("saved")
    tiny("llama").save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    subject = open_subject(folder / "base")
    plan = random_plan(subject, strength=1.5)
    for form in ("merged", "adapter", "plan"):
        save(subject, plan, run_of(subject), folder / form, form)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("form", ["merged", "adapter", "plan"])
def test_every_form_of_output_answers_as_the_plan(folders: Path, form: str) -> None:
    expected = answer(open_for_chat(str(folders / "base"), [folders / "plan"]))
    opened = open_for_chat(str(folders / form))
    assert answer(opened) == expected
    unedited = answer(open_for_chat(str(folders / "base")))
    assert unedited != expected
    assert answer(opened, 0.0) == (expected if form == "merged" else unedited)
    assert list(opened[1]) == ([] if form == "merged" else [form])


def test_an_adapter_without_a_plan_is_merged(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "lora" / name).write_bytes((folders / "adapter" / name).read_bytes())
    with report_to(notes := Notes()):
        opened = open_for_chat(str(tmp_path / "lora"))
    assert opened[1] == {}
    assert any("merged into its model" in text for text in notes.texts)
    assert answer(opened) == answer(open_for_chat(str(folders / "plan")))


def test_a_merged_model_says_how_its_strength_could_be_turned(folders: Path) -> None:
    with report_to(notes := Notes()):
        open_for_chat(str(folders / "merged"))
        open_for_chat(str(folders / "base"))
    told = [text for text in notes.texts if text.startswith("dial:")]
    assert len(told) == 1
    assert f"chat {folders / 'base'} --plan {folders / 'merged'}" in told[0]


def test_folders_are_named_by_what_tells_them_apart() -> None:
    paths = [Path("/x/a/plan"), Path("/x/b/plan"), Path("/x/lean"), Path("/x/lean")]
    assert list(name_folders(paths)) == ["a/plan", "b/plan", "lean"]


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / f"{name}.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return folder


def test_what_cannot_be_opened_is_one_line(folders: Path, tmp_path: Path) -> None:
    base, plan = str(folders / "base"), folders / "plan"
    alone = tmp_path / "alone"
    subject = open_subject(folders / "base")
    save_plan(random_plan(subject), alone)
    tiny("llama", seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    config = {"base_model_name_or_path": base, "peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}
    pickled, broken = write(tmp_path / "pickled", adapter_config=config), write(tmp_path / "broken", adapter_config="{")
    (broken / "adapter_model.safetensors").write_bytes(b"")
    foreign = write(tmp_path / "foreign", adapter_config={**config, "target_modules": ["nothing"]})
    (foreign / "adapter_model.safetensors").write_bytes((folders / "adapter/adapter_model.safetensors").read_bytes())
    for model, plans, said in (
        (str(alone), [], "which model this plan was made for; give MODEL --plan"),
        (base, [tmp_path], "there is no plan.safetensors"),
        (str(tmp_path / "other"), [plan], "plan: the plan was made for another model"),
        (str(pickled), [], "only safetensors are read"),
        (str(broken), [], "cannot be read"),
        (str(foreign), [], "PEFT cannot merge this adapter"),
        (str(tmp_path / "nowhere"), [], "does not exist"),
    ):
        with pytest.raises(UserError, match=r"^[^\n]*$") as error:
            open_for_chat(model, plans)
        assert said in str(error.value)
