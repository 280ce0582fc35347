"""The Optuna study of a search: which trial comes next, which processes work on it, and what has been found.

All of it lives in the storage, so several processes can share a study and an interrupted one can resume.
"""

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
from obliteratus.core.settings import Recipe, Search
from obliteratus.search.space import Suggest, start_values
from obliteratus.search.storage import StorageUnreachableError

# Of NSGA-II: a generation must end well before a study of 60 trials does. The default of 50 would be random search.
POPULATION = 12
# A running trial of another machine counts as dead after this many times the longest finished trial, and at least this
# long.
STALE_FACTOR, STALE_AFTER = 10, timedelta(minutes=10)
ASKING = "asking: "  # prefix of the study's attributes that name the processes taking a trial
EXCESS = "beyond the limits"  # the constraint: the largest excess over a limit, feasible at 0 and below


def _tpe(seed: int, search: Search) -> BaseSampler:
    # Values of one space are modeled jointly; paths that a choice removes form separate groups.
    return TPESampler(
        seed=seed,
        n_startup_trials=search.startup_trials,
        n_ei_candidates=search.candidates,
        multivariate=True,
        group=True,
        constant_liar=True,
    )


def _gp(seed: int, search: Search) -> BaseSampler:
    return GPSampler(seed=seed, n_startup_trials=search.startup_trials, warn_independent_sampling=False)


def _nsga2(seed: int, search: Search) -> BaseSampler:
    return NSGAIISampler(seed=seed, population_size=POPULATION)


SAMPLERS: dict[str, Callable[[int, Search], BaseSampler]] = {"tpe": _tpe, "gp": _gp, "nsga2": _nsga2}


class SearchStudy:
    """Trials of one recipe on one model with the same prompts, run by any number of processes."""

    def __init__(self, storage: BaseStorage, name: str, recipe: Recipe, identity: Mapping[str, Any]) -> None:
        """Open or create the study. Raises UserError if a study of this name has another identity."""
        assert recipe.search is not None
        self.search, self.seed, self.name = recipe.search, recipe.seed, name
        self.study = _open_study(storage, name, len(self.search.minimize))
        _check_identity(self.study, name, dict(identity))
        self.fail_stale_trials()
        if not any(t.state != TrialState.FAIL for t in self.study.get_trials(deepcopy=False)):
            self.study.enqueue_trial(start_values(recipe))  # the first trial is the recipe itself

    def ask(self, trials: int) -> optuna.Trial | None:
        """Return the next trial, or None if ``trials`` are finished or running.

        Each trial gets a new sampler seeded by the trial's index. The sampler thus knows nothing beyond the storage,
        and a resumed study continues exactly as it would have without the interruption.
        """
        self.fail_stale_trials()
        if len(self.finished_or_running) >= trials:
            return None
        states = [t.state for t in self.study.get_trials(deepcopy=False)]
        index = sum(state not in (TrialState.FAIL, TrialState.WAITING) for state in states)
        self.study.sampler = self._make_sampler(index)
        return self._ask_and_sign()

    def _ask_and_sign(self) -> optuna.Trial:
        """Take a trial and write this process on it. The mark tells whose trial it is if the process dies in between.

        Without it, a trial that nobody signed would count as running until it is too old.
        """
        mark = ASKING + worker_name()
        self.study.set_user_attr(mark, True)
        trial = self.study.ask()
        trial.set_user_attr("worker", worker_name())
        self.study.set_user_attr(mark, False)
        return trial

    def _make_sampler(self, index: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            # A prime factor, so that trials of different recipe seeds get different sampler seeds.
            return SAMPLERS[self.search.sampler](self.seed * 100_003 + index, self.search)

    def tell(self, trial: optuna.Trial, values: Sequence[float], excess: float, attributes: Mapping[str, Any]) -> None:
        """Store the result of a trial. values: what the sampler is to minimize (`TrialScorer.sampled_objectives`)."""
        trial.set_constraint(EXCESS, excess)
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        self.study.tell(trial, list(values))

    @contextmanager
    def running(self, trial: optuna.Trial) -> Iterator[None]:
        """Inside, the trial runs. An error or an interrupt marks it as failed, so that another trial replaces it."""
        try:
            yield
        except StorageUnreachableError:
            raise  # the storage cannot be told; whoever opens the study next sees that this process is gone
        except BaseException:
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise

    @property
    def finished(self) -> list[FrozenTrial]:
        """Finished trials, in order."""
        return [t for t in self.study.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE]

    @property
    def finished_or_running(self) -> list[FrozenTrial]:
        """Trials that are finished or that a process is running."""
        states = (TrialState.COMPLETE, TrialState.RUNNING)
        return [t for t in self.study.get_trials(deepcopy=False) if t.state in states]

    def fail_stale_trials(self) -> None:
        """Mark running trials as failed if their process has died, so that other trials replace them."""
        longest = max((t.duration for t in self.finished if t.duration is not None), default=timedelta())
        # Read before, between and after: a trial that a living process has not signed in the last reading was asked
        # for all along.
        before = {t.number for t in self._running_trials}
        asking = self._asking_workers()
        for trial in self._running_trials:
            signed = trial.user_attrs.get("worker")
            dead = _has_died(trial, [signed] if signed else asking, max(STALE_FACTOR * longest, STALE_AFTER))
            if trial.number in before and dead:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    @property
    def _running_trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _asking_workers(self) -> list[str]:
        """Return the processes that have begun to take a trial and not signed it."""
        marks = self.study.user_attrs.items()
        return [key.removeprefix(ASKING) for key, asking in marks if key.startswith(ASKING) and asking]


def make_suggester(trial: optuna.Trial) -> Suggest:
    """Return the function by which a space draws this trial's values."""

    def suggest(path: str, values: BaseDistribution) -> Any:
        if isinstance(values, CategoricalDistribution):
            return trial.suggest_categorical(path, values.choices)
        if isinstance(values, IntDistribution):
            return trial.suggest_int(path, values.low, values.high, log=values.log)
        assert isinstance(values, FloatDistribution), "a range gives one of these three distributions"
        return trial.suggest_float(path, values.low, values.high, log=values.log)

    return suggest


def _open_study(storage: BaseStorage, name: str, objectives: int) -> optuna.Study:
    directions = [StudyDirection.MINIMIZE] * objectives
    try:
        return optuna.create_study(storage=storage, study_name=name, directions=directions)
    except DuplicatedStudyError:
        return optuna.load_study(storage=storage, study_name=name)


def _check_identity(study: optuna.Study, name: str, identity: Mapping[str, Any]) -> None:
    stored = study.user_attrs.get("identity")
    if stored is None:
        study.set_user_attr("identity", identity)
        return
    changed = sorted(key for key in identity if stored.get(key) != identity[key])
    if changed:
        raise UserError(
            f"study '{name}' was made with another {', '.join(changed)}; choose another study name with --study"
        )


def worker_name() -> str:
    """Identify this process by host, process id and start time, because process ids are reused."""
    return f"{socket.gethostname()} {os.getpid()} {_start_time(os.getpid())}"


def _has_died(trial: FrozenTrial, workers: Sequence[str], max_age: timedelta) -> bool:
    """Whether none of the workers, one of which runs the trial, is alive.

    Those of other machines cannot be looked at: with one among them, the trial counts as dead when older than max_age.
    """
    if all(_is_local(worker) for worker in workers):
        return not any(_is_alive(worker) for worker in workers)
    assert trial.datetime_start is not None, "a running trial has a start time"
    age: timedelta = datetime.now() - trial.datetime_start
    return bool(age > max_age)


def _is_local(worker: str) -> bool:
    return worker.partition(" ")[0] == socket.gethostname()


def _is_alive(worker: str) -> bool:
    """Whether a process of this machine still runs, and is not another one with its process id."""
    _, pid, started = worker.split(" ")
    return started == _start_time(int(pid))


def _start_time(pid: int) -> str:
    """Return a process's start in clock ticks since boot, or '' if there is no such process or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]  # state and starttime, fields 3 and 22 of proc(5)
