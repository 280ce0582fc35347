"""Who measures: this process, several, or a Ray cluster. Parts travel as names, results as plain data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextvars import Context, copy_context
from functools import cached_property
from multiprocessing import get_context
from queue import SimpleQueue
from typing import Any, Protocol, runtime_checkable

import torch

from obliteratus.core.errors import UserError
from obliteratus.study.base import KnockoutResult
from obliteratus.study.engine import Engine, shareable
from obliteratus.study.settings import Study
from obliteratus.summon.load import open_subject

Names = list[str]


@runtime_checkable
class Workers(Protocol):
    """Models are open until `close`."""

    def close(self) -> None: ...
    def chunks(self) -> list[Names]:
        """Components that are measured together, in order."""
        ...

    def baseline(self) -> KnockoutResult: ...
    def measured(self, wanted: Sequence[Names]) -> Iterator[list[KnockoutResult]]:
        """Of each chunk, in order of finishing."""
        ...


class Worker:
    """One engine, whose parts are asked for by name."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.specs = engine, {spec.component: spec for spec in engine.specs}

    def chunks(self) -> list[Names]:
        return [[spec.component for spec in chunk] for chunk in self.engine.chunks()]

    def baseline(self) -> KnockoutResult:
        return self.engine.baseline()

    def measure(self, names: Names) -> list[KnockoutResult]:
        return self.engine.measure([self.specs[name] for name in names])


def opened(made: Study, opening: Mapping[str, Any], threads: int = 0) -> Worker:
    """A worker with a model of its own. threads: of this process; 0 leaves them as they are."""
    if threads:
        torch.set_num_threads(threads)
    return Worker(Engine.of(open_subject(made.model, **opening), made))


# --------------------------------------------------------------------------------------- this process
class Local:
    """This process: on a CPU a lane for each core, one thread each, which all read the same weights.

    Two cores on SmolLM2: 1.06 to 1.13 times as fast as both on one part, since nothing waits for the other's share of
    a small operation (docs/experiments/studies.md, "Lanes").
    """

    def __init__(self, made: Study, opening: Mapping[str, Any]) -> None:
        self.worker = opened(made, opening)

    def close(self) -> None:
        """Nothing is to be closed."""

    def chunks(self) -> list[Names]:
        return self.worker.chunks()

    def baseline(self) -> KnockoutResult:
        return self.worker.baseline()

    def measured(self, wanted: Sequence[Names]) -> Iterator[list[KnockoutResult]]:
        idle: SimpleQueue[Worker] = SimpleQueue()
        for lane in self.lanes:
            idle.put(lane)

        def run(names: Names, context: Context) -> list[KnockoutResult]:
            worker = idle.get()
            try:
                return context.run(worker.measure, names)
            finally:
                idle.put(worker)

        threads = max(1, torch.get_num_threads() // len(self.lanes))
        with ThreadPoolExecutor(len(self.lanes), initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            futures = [pool.submit(run, names, copy_context()) for names in wanted]
            try:
                yield from (future.result() for future in as_completed(futures))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def lanes(self) -> list[Worker]:
        """Made when parts are first measured; they share the baseline."""
        engine = self.worker.engine
        count = min(torch.get_num_threads(), len(self.chunks())) if shareable(engine.subject) else 1
        return [self.worker, *(Worker(engine.lane()) for _ in range(count - 1))]


# ------------------------------------------------------------------------------------ several processes
_OWN: list[Worker] = []  # of a worker process, its one worker


def _begin(made: Study, opening: Mapping[str, Any], threads: int) -> None:
    _OWN.append(opened(made, opening, threads))


def _chunks() -> list[Names]:
    return _OWN[0].chunks()


def _baseline() -> KnockoutResult:
    return _OWN[0].baseline()


def _measure(names: Names) -> list[KnockoutResult]:
    return _OWN[0].measure(names)


class Processes:
    """Processes of this machine, which share its cores."""

    def __init__(self, made: Study, opening: Mapping[str, Any], workers: int) -> None:
        threads = max(1, (os.cpu_count() or 1) // workers)
        begin = (made, dict(opening), threads)
        # spawned: a forked process would inherit locks of threads that it has not
        self.pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=begin)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def chunks(self) -> list[Names]:
        return self.pool.submit(_chunks).result()

    def baseline(self) -> KnockoutResult:
        return self.pool.submit(_baseline).result()

    def measured(self, wanted: Sequence[Names]) -> Iterator[list[KnockoutResult]]:
        for future in as_completed([self.pool.submit(_measure, names) for names in wanted]):
            yield future.result()


# ----------------------------------------------------------------------------------------- a Ray cluster
class Actor:
    """What runs on the cluster."""

    def __init__(self, made: Study, opening: Mapping[str, Any]) -> None:
        self.worker = opened(made, opening)

    def chunks(self) -> list[Names]:
        return self.worker.chunks()

    def baseline(self) -> KnockoutResult:
        return self.worker.baseline()

    def measure(self, names: Names) -> list[KnockoutResult]:
        return self.worker.measure(names)


class Ray:
    """Actors of a Ray cluster: each opens the model where it runs, so all that the study names must be there."""

    def __init__(self, made: Study, opening: Mapping[str, Any], workers: int, address: str) -> None:
        """address: ``local`` begins a cluster on this machine."""
        try:
            import ray
        except ModuleNotFoundError as error:
            raise UserError("--ray needs Ray; pip install 'obliteratus[ray]'") from error
        self.ray: Any = ray
        ray.init(address, log_to_driver=False, ignore_reinit_error=True)
        actor: Any = ray.remote(Actor)
        self.actors: list[Any] = [actor.remote(made, dict(opening)) for _ in range(workers)]

    def close(self) -> None:
        self.ray.shutdown()

    def chunks(self) -> list[Names]:
        found: list[Names] = self.ray.get(self.actors[0].chunks.remote())
        return found

    def baseline(self) -> KnockoutResult:
        found: KnockoutResult = self.ray.get(self.actors[0].baseline.remote())
        return found

    def measured(self, wanted: Sequence[Names]) -> Iterator[list[KnockoutResult]]:
        from ray.util import ActorPool

        pool: Any = ActorPool(self.actors)
        yield from pool.map_unordered(lambda actor, names: actor.measure.remote(names), list(wanted))
