"""Our side of the comparison with Heretic, without Heretic: its configuration, its journal and its menus."""

from __future__ import annotations

import sys
import tomllib
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest
from bench.heretic import HereticStudy, HereticTrial, export_trial, find_in_menu, first_prompts, read_study
from bench.heretic_setup import CHECKPOINTS, SYSTEM, StudySettings, install_heretic, load_markers, write_configuration
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from obliteratus.core.errors import UserError
from obliteratus.core.types import Prompt, PromptSet
from obliteratus.inference.chat_template import render_prompts
from obliteratus.judge.judge import Judge
from obliteratus.prompts import load_prompts, split_prompts
from obliteratus.summon.load import open_subject

MENU = """? Which trial do you want to use? (Use arrow keys)
 » [Trial  12] Refusals:  0/48, KL divergence: 0.1100
   [Trial   7] Refusals:  2/48, KL divergence: 0.0860
   [Trial   3] Refusals: 48/48, KL divergence: 0.0000
   Run additional trials
   Exit program
"""


# ------------------------------------------------------------------------------------------------ configuration
def test_the_configuration_says_what_was_asked(prompts: PromptSet, tmp_path: Path) -> None:
    other = PromptSet({"target": (Prompt("Why is it dark?"),), "control": (Prompt('Say "so": \\ and é'),)})
    settings = StudySettings(tokens=32, trials=24, seed=5)
    write_configuration(tmp_path / "model", prompts, other, settings, tmp_path / "study")
    written = tomllib.loads((tmp_path / "study/config.toml").read_text())
    assert written["model"] == str((tmp_path / "model").resolve())
    assert (written["max_response_length"], written["n_trials"], written["seed"]) == (32, 24, 5)
    assert written["n_startup_trials"] == 7
    assert written["refusal_markers"] == load_markers()

    def lines(name: str) -> list[str]:
        return (tmp_path / "study" / written[name]["dataset"]).read_text().splitlines()

    assert lines("bad_prompts") == [p.text for p in prompts["target"]]
    assert lines("good_prompts") == [p.text for p in prompts["control"]]
    assert lines("bad_evaluation_prompts") == ["Why is it dark?"]
    assert lines("good_evaluation_prompts") == ['Say "so": \\ and é']


@pytest.mark.parametrize("bad", [Prompt("two\nlines"), Prompt("two  blanks"), Prompt("x", system="Be brief.")])
def test_a_prompt_that_would_change_is_refused(prompts: PromptSet, tmp_path: Path, bad: Prompt) -> None:
    changed = PromptSet({**prompts.groups, "target": (bad,)})
    with pytest.raises(UserError, match="give plain prompts of one line"):
        write_configuration(tmp_path, changed, prompts, StudySettings(8, 3), tmp_path)
    with pytest.raises(UserError, match="no prompts"):
        write_configuration(tmp_path, PromptSet({"target": (), "control": ()}), prompts, StudySettings(8, 3), tmp_path)


def test_few_trials_still_begin_at_random(prompts: PromptSet, tmp_path: Path) -> None:
    for trials, random in ((1, 1), (3, 1), (200, 60)):
        write_configuration(tmp_path, prompts, prompts, StudySettings(8, trials), tmp_path)
        assert tomllib.loads((tmp_path / "config.toml").read_text())["n_startup_trials"] == random


@pytest.mark.organism
def test_the_system_turn_is_the_one_that_the_template_writes_by_itself() -> None:
    subject = open_subject("organism:astronomy")
    asked = load_prompts("organism:astronomy", "organism:astronomy")["control"][:3]
    plain = render_prompts(subject, asked)
    assert render_prompts(subject, [Prompt(p.text, system=SYSTEM) for p in asked]) == plain
    assert render_prompts(subject, [Prompt(p.text, system="You are a helpful assistant.") for p in asked]) != plain


def test_the_organisms_prompts_can_be_given(tmp_path: Path) -> None:
    fit, search, report = split_prompts(load_prompts("organism:astronomy", "organism:astronomy"), 0)
    write_configuration(tmp_path, first_prompts(fit, 256), first_prompts(search, 100), StudySettings(8, 3), tmp_path)
    assert all(len(first_prompts(report, 5)[g]) == 5 for g in ("target", "control"))
    with pytest.raises(UserError, match="give plain prompts of one line"):  # control: one of them has lines
        write_configuration(tmp_path, fit, search, StudySettings(8, 3), tmp_path)


def test_a_message_of_pip_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho no room >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(UserError, match="no room"):
        install_heretic(tmp_path / "venv")


# ------------------------------------------------------------------------------------------------ results
def journal(work: Path, values: list[tuple[int, float]], running: bool = False) -> datetime:
    """A journal as Heretic's: the values as attributes of each trial. Returns a time 5 s before the first."""
    (work / CHECKPOINTS).mkdir(parents=True)
    storage = JournalStorage(JournalFileBackend(str(work / CHECKPOINTS / "model.jsonl")))
    study = optuna.create_study(storage=storage, study_name="heretic", directions=["minimize", "minimize"])
    for number, (refusals, kl) in enumerate(values, 1):
        trial = study.ask()
        attributes = {"index": number, "refusals": refusals, "kl_divergence": kl, "base_refusals": 9}
        for name, value in attributes.items():
            trial.set_user_attr(name, value)
        study.tell(trial, [kl, refusals / 9])
    if running:
        study.ask()
    start = study.trials[0].datetime_start if study.trials else datetime.now()
    assert start is not None
    return start - timedelta(seconds=5)


def test_trials_are_read_from_the_journal(tmp_path: Path) -> None:
    values = [(3, 0.1), (0, 0.5), (3, 0.2), (9, 0.0)]
    started = journal(tmp_path, values, running=True)
    study = read_study(tmp_path, started)
    assert study.values == values  # the running trial is none of them
    assert [t.number for t in study.trials] == [1, 2, 3, 4]
    assert study.setup_seconds == pytest.approx(5, abs=1e-3)
    assert study.base_refusals == 9
    assert all(0 <= s < 5 for s in study.trial_seconds)
    assert {t.number for t in study.front} == {1, 2, 4}


def test_a_folder_without_trials_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no journal"):
        read_study(tmp_path, datetime.now())
    started = journal(tmp_path, [], running=True)
    with pytest.raises(UserError, match="finished no trial"):
        read_study(tmp_path, started)


def test_a_trial_is_found_in_the_menu() -> None:
    assert [find_in_menu(MENU, n) for n in (12, 7, 3)] == [0, 1, 2]
    assert find_in_menu(MENU + MENU, 3) == 2  # drawn twice
    with pytest.raises(UserError, match="not on its front, which has 12, 7, 3"):
        find_in_menu(MENU, 4)


# ------------------------------------------------------------------------------------------------ export, and markers
def test_export_refuses_a_folder_that_is_there(tmp_path: Path) -> None:
    study = HereticStudy(1.0, (HereticTrial(1, 0, 0.1, 2.0),), 9, tmp_path)
    with pytest.raises(UserError, match="exists already"):
        export_trial(study, 1, tmp_path)


def test_markers_count_a_refusal_for_both() -> None:
    """Ours begin at a word of normalized text; Heretic looks for the same strings anywhere: each refusal has one."""
    said = "I'm sorry, but I can't help with that."
    assert Judge().judge_answer(said) == "shown"
    assert any(m in said.lower() for m in load_markers())
