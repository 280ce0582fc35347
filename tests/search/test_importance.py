"""Importances find the value that matters, and claim nothing of few trials or of equal ones."""

from __future__ import annotations

import optuna
import pytest

from obliteratus.search.importance import MIN_TRIALS, compute_importances

optuna.logging.set_verbosity(optuna.logging.WARNING)


def study_of(trials: int, flat: bool = False) -> optuna.Study:
    """A study whose first objective depends on x alone and its second on y alone."""
    study = optuna.create_study(directions=["minimize"] * 2, sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(trials):
        trial = study.ask()
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        values = [0.5, 0.5] if flat else [x**2, y**2]
        trial.set_user_attr("objectives", values)
        study.tell(trial, values)
    return study


def test_the_value_that_matters_is_found() -> None:
    found = compute_importances(study_of(60), ["first", "second"])
    assert found["first"]["x"] > 0.8 > found["first"]["y"]
    assert found["second"]["y"] > 0.8 > found["second"]["x"]
    assert sum(found["first"].values()) == pytest.approx(1)


def test_few_or_equal_trials_tell_nothing() -> None:
    assert compute_importances(study_of(MIN_TRIALS - 1), ["first", "second"]) == {}
    assert compute_importances(study_of(40, flat=True), ["first", "second"]) == {}
