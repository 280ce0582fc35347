"""Executors of a study: this process, several processes, or a Ray cluster.

Knockouts travel as component names and results as plain data, since each process lists the knockouts of its own model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, Protocol, runtime_checkable

import torch

from obliteratus.core.errors import UserError
from obliteratus.core.plugins import list_plugin_files, load_plugin
from obliteratus.core.progress import VARIABLE as PROGRESS
from obliteratus.core.types import Subject
from obliteratus.study.base import KnockoutResult
from obliteratus.study.engine import Engine
from obliteratus.study.settings import Study
from obliteratus.summon.load import open_subject

Names = list[str]
"""The components of one batch of knockouts."""


@runtime_checkable
class Executor(Protocol):
    """Measures the knockouts of a study. Models stay open until `close`."""

    def batches(self) -> list[Names]:
        """Return the components that are measured together, in order."""
        ...

    def measure_baseline(self) -> KnockoutResult: ...
    def measure_batches(self, batches: Sequence[Names]) -> Iterator[list[KnockoutResult]]:
        """Return the results of each batch, in the order in which they finish."""
        ...

    def close(self) -> None: ...


class Local:
    """Measures in this process, on one model."""

    def __init__(
        self, study: Study, opening: Mapping[str, Any], subject: Subject | None = None, plugins: Sequence[str] = ()
    ) -> None:
        """opening: options of `open_subject`, by which the model is opened unless it is given. plugins: files."""
        for file in plugins:
            load_plugin(file)
        self.engine = Engine.create(subject or open_subject(study.model, **opening), study)
        self.knockouts = {knockout.component: knockout for knockout in self.engine.knockouts}

    def batches(self) -> list[Names]:
        return [[knockout.component for knockout in batch] for batch in self.engine.batches()]

    def measure_baseline(self) -> KnockoutResult:
        return self.engine.measure_baseline()

    def measure(self, names: Names) -> list[KnockoutResult]:
        """Measure one batch."""
        return self.engine.measure([self.knockouts[name] for name in names])

    def measure_batches(self, batches: Sequence[Names]) -> Iterator[list[KnockoutResult]]:
        return map(self.measure, batches)

    def close(self) -> None:
        pass


_LOCAL: list[Local] = []  # in a worker process: its only member


def _open_local(study: Study, opening: Mapping[str, Any], threads: int, plugins: Sequence[str]) -> None:
    torch.set_num_threads(threads)
    os.environ[PROGRESS] = "off"  # the process that started this one shows how far all are
    _LOCAL.append(Local(study, opening, plugins=plugins))


def _batches() -> list[Names]:
    return _LOCAL[0].batches()


def _measure_baseline() -> KnockoutResult:
    return _LOCAL[0].measure_baseline()


def _measure(names: Names) -> list[KnockoutResult]:
    return _LOCAL[0].measure(names)


class Processes:
    """Measures in several processes of this machine, each with its own model and its share of the cores."""

    def __init__(self, study: Study, opening: Mapping[str, Any], workers: int) -> None:
        arguments = (study, dict(opening), max(1, (os.cpu_count() or 1) // workers), list_plugin_files())
        # spawned, because a forked process would inherit locks of threads that it does not have
        self.pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_open_local, initargs=arguments)

    def batches(self) -> list[Names]:
        return self.pool.submit(_batches).result()

    def measure_baseline(self) -> KnockoutResult:
        return self.pool.submit(_measure_baseline).result()

    def measure_batches(self, batches: Sequence[Names]) -> Iterator[list[KnockoutResult]]:
        for future in as_completed([self.pool.submit(_measure, names) for names in batches]):
            yield future.result()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


class Ray:
    """Measures by actors of a Ray cluster. Each opens the model where it runs, so the study's files must be there."""

    def __init__(self, study: Study, opening: Mapping[str, Any], workers: int, address: str) -> None:
        """address: the cluster's, or ``local`` to start one on this machine. Raises UserError if Ray is missing."""
        try:
            import ray
        except ModuleNotFoundError as error:
            raise UserError("--ray needs Ray; pip install 'obliteratus[ray]'") from error
        self.ray: Any = ray
        ray.init(address, log_to_driver=False, ignore_reinit_error=True)
        actor: Any = ray.remote(Local)
        self.actors: list[Any] = [actor.remote(study, dict(opening), None, list_plugin_files()) for _ in range(workers)]

    def batches(self) -> list[Names]:
        batches: list[Names] = self.ray.get(self.actors[0].batches.remote())
        return batches

    def measure_baseline(self) -> KnockoutResult:
        baseline: KnockoutResult = self.ray.get(self.actors[0].measure_baseline.remote())
        return baseline

    def measure_batches(self, batches: Sequence[Names]) -> Iterator[list[KnockoutResult]]:
        from ray.util import ActorPool

        pool: Any = ActorPool(self.actors)
        yield from pool.map_unordered(lambda actor, names: actor.measure.remote(names), list(batches))

    def close(self) -> None:
        self.ray.shutdown()
