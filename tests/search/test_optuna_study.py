"""A study outlives its workers: it resumes, refuses what is something else, and is shared by processes."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import optuna
import pytest
from tests.support.refuser import refuser
from tests.support.searches import REFUSAL, make_scorer, run_search, search_recipe, start_workers

from obliteratus.core.errors import UserError
from obliteratus.search import optuna_study, set_trial_count
from obliteratus.search.optuna_study import SAMPLERS, SearchStudy
from obliteratus.search.storage import open_storage
from obliteratus.search.trials import run_trials

TRIALS = 24  # shared by two processes: enough that neither finishes them before the other begins


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2"])
def test_a_resumed_study_goes_on_as_it_would_have(sampler: str, tmp_path: Path) -> None:
    """Thirteen trials in one go, and ten (the eleventh lost) and three: the same values.

    The samplers draw the first ten at random, NSGA-II the first twelve.
    """
    recipe = search_recipe(13, sampler=sampler)
    whole = run_search(recipe)
    journal = str(tmp_path / "study")
    run_search(set_trial_count(recipe, 10), journal)
    study = optuna.load_study(study_name="study", storage=open_storage(journal))
    study.ask()
    _kill_worker(study)
    resumed = run_search(recipe, journal)
    assert [t.values for t in resumed.trials] == [t.values for t in whole.trials]
    other = run_search(set_trial_count(recipe, 3).model_copy(update={"seed": 1}))
    assert [t.values for t in other.trials] != [t.values for t in whole.trials[:3]]


def _kill_worker(study: optuna.Study) -> None:
    """Make the running trial that of a process of this machine that is gone."""
    trial = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))[0]
    study._storage.set_trial_user_attr(trial._trial_id, "worker", f"{socket.gethostname()} 1 0")


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    journal = str(tmp_path / "study")
    run_search(search_recipe(2), journal)
    run_search(search_recipe(3), journal)  # more trials of the same: welcome
    with pytest.raises(UserError, match="was made with another recipe; choose another study name with --study"):
        run_search(search_recipe(3, tokens=5), journal)
    with pytest.raises(UserError, match="was made with another model"):
        run_search(search_recipe(3), journal, subject=refuser(block=3, word=REFUSAL))


def test_an_interrupt_loses_one_trial() -> None:
    recipe = search_recipe(4)
    cache, judge = make_scorer(recipe)
    study = SearchStudy(open_storage(""), "s", recipe, {})
    trial = study.ask(4)
    assert trial is not None
    with pytest.raises(KeyboardInterrupt), study.running(trial):
        raise KeyboardInterrupt
    trials = run_trials(study, recipe, cache, judge, 4)
    assert len(trials) == 4
    assert trials[0].number == 1  # the first died


def test_a_trial_of_a_live_worker_is_not_failed() -> None:
    study = SearchStudy(open_storage(""), "s", search_recipe(4), {})
    assert study.ask(4) is not None
    study.fail_stale_trials()
    assert len(study.finished_or_running) == 1
    assert study.ask(1) is None  # the one that is allowed is running


def test_a_worker_that_dies_before_it_signs_its_trial_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, recipe = open_storage(""), search_recipe(4)
    study = SearchStudy(storage, "s", recipe, {})
    with monkeypatch.context() as dying:
        dying.setattr(optuna_study, "worker_name", lambda: f"{socket.gethostname()} 1 0")
        dying.setattr(optuna.Trial, "set_user_attr", _die)
        with pytest.raises(KeyboardInterrupt):
            study.ask(1)
    assert len(study.finished_or_running) == 1
    assert study.ask(1) is not None


def test_a_trial_that_a_live_worker_has_not_signed_is_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    study = SearchStudy(open_storage(""), "s", search_recipe(4), {})
    with monkeypatch.context() as slow:
        slow.setattr(optuna.Trial, "set_user_attr", _die)
        with pytest.raises(KeyboardInterrupt):
            study.ask(1)
    assert study.ask(1) is None


def _die(*_: object) -> None:
    raise KeyboardInterrupt


def test_two_processes_share_a_study_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    storage = str(tmp_path / "study")
    first, second = start_workers(2, TRIALS, storage)
    try:
        wait_for(storage, 2)
        first.send_signal(signal.SIGKILL)
        assert second.wait(120) == 0
    finally:
        for worker in (first, second):
            worker.kill()
    trials = optuna.load_study(study_name="study", storage=open_storage(storage)).get_trials()
    done = [t for t in trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert len(done) == TRIALS
    assert len(trials) - len(done) <= 1  # the killed worker lost at most its running trial
    assert len({t.user_attrs["worker"] for t in done}) == 2


def wait_for(storage: str, n: int) -> None:
    """Return when this many workers have finished a trial each."""
    studies = open_storage(storage)
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        if any(s.study_name == "study" for s in studies.get_all_studies()):
            study = optuna.load_study(study_name="study", storage=studies)
            done = [t for t in study.get_trials() if t.state == optuna.trial.TrialState.COMPLETE]
            if len({t.user_attrs["worker"] for t in done}) >= n:
                return
        time.sleep(0.1)
    raise AssertionError("no trials came")


def test_the_sampler_has_the_settings_of_the_search() -> None:
    """Start-up trials are drawn at random: as many as asked for do not depend on what came before."""

    def drawn(startup: int) -> list[float]:
        found = run_search(search_recipe(6, startup_trials=startup, max_remaining=1.0, minimize=("refusal.target",)))
        other = run_search(search_recipe(6, startup_trials=startup, max_remaining=1.0, minimize=("-refusal.target",)))
        pairs = zip(found.trials, other.trials, strict=True)
        return [abs(a.values["excise.strength"] - b.values["excise.strength"]) for a, b in pairs]

    assert max(drawn(6)) == 0.0
    assert max(drawn(1)) > 0.0  # what is minimized decides where the second is drawn
    sampler = SAMPLERS["tpe"](0, search_recipe(candidates=128, startup_trials=60).search)
    assert (sampler._n_ei_candidates, sampler._n_startup_trials) == (128, 60)
