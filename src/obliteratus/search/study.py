"""One study: who works on it, which trial comes next, and what has been found. All of it lives in the storage."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Recipe
from obliteratus.search.space import Suggest, start_values
from obliteratus.search.storage import SilentStorageError

# Of NSGA-II: a generation must be over well before a study of 60 ends; 50, the default, would be random search.
POPULATION = 12
# A trial of another machine is given up when it has run for so many times the longest finished one, or so long.
TIMES, LEAST = 10, timedelta(minutes=10)
EXCESS = "refused controls"  # constraint: by how much more of them than is allowed; at most 0 is feasible


def _tpe(seed: int) -> BaseSampler:
    # Values of one space belong together; paths that a choice removes make groups.
    return TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)


def _gp(seed: int) -> BaseSampler:
    return GPSampler(seed=seed, warn_independent_sampling=False)


def _nsga2(seed: int) -> BaseSampler:
    return NSGAIISampler(seed=seed, population_size=POPULATION)


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {"tpe": _tpe, "gp": _gp, "nsga2": _nsga2}


class SearchStudy:
    """Trials of one recipe on one model with the same prompts, by any number of processes."""

    def __init__(self, storage: BaseStorage, name: str, made: Recipe, identity: Mapping[str, Any]) -> None:
        """Open or begin the study. Raises UserError where one of this name is about something else."""
        assert made.search is not None
        self.search, self.seed, self.name = made.search, made.seed, name
        self.inner = _opened(storage, name, len(self.search.minimise))
        _check(self.inner, name, dict(identity))
        self.fail_stale_trials()
        if not any(t.state != TrialState.FAIL for t in self.inner.get_trials(deepcopy=False)):
            self.inner.enqueue_trial(start_values(made))  # begins where the recipe stands

    def ask(self, trials: int) -> optuna.Trial | None:
        """The next trial, or None when ``trials`` have been made or are being made.

        The sampler is made anew for each trial, its seed from the trial's place: it remembers nothing that the storage
        does not hold, so that a resumed study goes on exactly as it would have.
        """
        self.fail_stale_trials()
        if len(self.alive) >= trials:
            return None
        lives = sum(t.state not in (TrialState.FAIL, TrialState.WAITING) for t in self.inner.get_trials(deepcopy=False))
        self.inner.sampler = self._sampler(lives)
        trial = self.inner.ask()
        trial.set_user_attr("worker", worker_name())
        return trial

    def _sampler(self, index: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return SAMPLERS[self.search.sampler](self.seed * 100_003 + index)  # a prime: seeds do not meet

    def tell(self, trial: optuna.Trial, values: Sequence[float], excess: float, known: Mapping[str, Any]) -> None:
        """The trial is done."""
        trial.set_constraint(EXCESS, excess)
        for key, value in known.items():
            trial.set_user_attr(key, value)
        self.inner.tell(trial, list(values))

    @contextmanager
    def at(self, trial: optuna.Trial) -> Iterator[None]:
        """Inside, the trial is worked on: what ends it early, an interrupt or an error, gives its place to another."""
        try:
            yield
        except SilentStorageError:
            raise  # nobody can be told; the next to open the study sees that this process is gone
        except BaseException:
            self.inner.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise

    @property
    def done(self) -> list[FrozenTrial]:
        """Finished trials, in order."""
        return [t for t in self.inner.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]

    @property
    def alive(self) -> list[FrozenTrial]:
        """Finished trials, and those that some process is at."""
        states = (TrialState.COMPLETE, TrialState.RUNNING)
        return [t for t in self.inner.get_trials(deepcopy=False) if t.state in states]

    def fail_stale_trials(self) -> None:
        """Trials whose process has died count as failed: another takes their place."""
        longest = max((t.duration for t in self.done if t.duration is not None), default=timedelta())
        for trial in self.inner.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if _dead(trial, max(TIMES * longest, LEAST)):
                self.inner.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def suggest(trial: optuna.Trial) -> Suggest:
    """What a space draws from."""

    def of(path: str, values: BaseDistribution) -> Any:
        if isinstance(values, CategoricalDistribution):
            return trial.suggest_categorical(path, values.choices)
        if isinstance(values, IntDistribution):
            return trial.suggest_int(path, values.low, values.high, log=values.log)
        assert isinstance(values, FloatDistribution), "ranges are of these three kinds"
        return trial.suggest_float(path, values.low, values.high, log=values.log)

    return of


def _opened(storage: BaseStorage, name: str, objectives: int) -> optuna.Study:
    directions = [StudyDirection.MINIMIZE] * objectives
    try:
        return optuna.create_study(storage=storage, study_name=name, directions=directions)
    except DuplicatedStudyError:
        return optuna.load_study(storage=storage, study_name=name)


def _check(study: optuna.Study, name: str, identity: Mapping[str, Any]) -> None:
    kept = study.user_attrs.get("identity")
    if kept is None:
        study.set_user_attr("identity", identity)
        return
    changed = sorted(key for key in identity if kept.get(key) != identity[key])
    if changed:
        raise UserError(f"study '{name}' was made with another {', '.join(changed)}; name another with --study")


def worker_name() -> str:
    """This process: host, number, and when it began, since numbers are used again."""
    return f"{socket.gethostname()} {os.getpid()} {_began(os.getpid())}"


def _dead(trial: FrozenTrial, most: timedelta) -> bool:
    host, pid, began = (trial.user_attrs.get("worker", "") + "  ").split(" ")[:3]
    if host == socket.gethostname() and pid.isdigit():
        return str(began) != _began(int(pid))
    assert trial.datetime_start is not None, "a running trial has begun"
    age: timedelta = datetime.now() - trial.datetime_start
    return bool(age > most)


def _began(pid: int) -> str:
    """When the process began, in clock ticks since the machine's start; empty for none, and for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]  # state and starttime, fields 3 and 22 of proc(5)
