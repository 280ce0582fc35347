"""Runs that give the same bits again: deterministic kernels, a fixed number of threads, and batches of a fixed size."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

from obliteratus.core.progress import note
from obliteratus.core.types import Subject
from obliteratus.inference.memory import FREE_MEMORY, free_memory

# cuBLAS gives the same sums only with a workspace of fixed size.
CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
# Activations from the user's cache would hide that a pass computes something else.
NO_CACHE = {"OBLITERATUS_PROBE_CACHE": "off"}
MISSING = re.compile(r"(\S+) does not have a deterministic implementation")


@dataclass
class Determinism:
    """What is fixed in a deterministic run."""

    threads: int
    """Threads of an operation. How a sum is divided among them decides its last bits."""
    memory: int = 0
    """Bytes that count as free, which the sizes of batches follow from; 0 until the model is loaded."""
    not_deterministic: list[str] = field(default_factory=list)
    """Operations that ran and have no deterministic implementation."""


DETERMINISM: ContextVar[Determinism | None] = ContextVar("determinism", default=None)


@contextmanager
def deterministic(threads: int = 0, memory: int = 0) -> Iterator[Determinism]:
    """Fix inside the block what can be fixed. Operations that no setting makes deterministic run, and are named.

    threads: of an operation; 0 keeps the present number. memory: see `Determinism`; 0 lets `fix_memory` choose it.
    """
    fixed = Determinism(threads or torch.get_num_threads(), memory)
    token = DETERMINISM.set(fixed)
    try:
        with _environment(CUBLAS | NO_CACHE), _settings(fixed.threads), _listen(fixed):
            yield fixed
    finally:
        DETERMINISM.reset(token)
        if fixed.not_deterministic:
            names = ", ".join(fixed.not_deterministic)
            note("deterministic", f"warning: {names} have no deterministic form here, so bits may differ next time")


@contextmanager
def fix_memory(subject: Subject) -> Iterator[None]:
    """In a deterministic run, let the same number of bytes count as free inside the block, whatever else runs."""
    fixed = DETERMINISM.get()
    if fixed is None:
        yield
        return
    here = choose_memory(free_memory(subject))
    if here < fixed.memory:
        note(
            "deterministic",
            f"warning: {fixed.memory / 1e9:.1f} GB counted as free then and {here / 1e9:.1f} GB do here: batches are "
            "smaller, so bits may differ",
        )
    fixed.memory = min(here, fixed.memory or here)
    token = FREE_MEMORY.set(fixed.memory)
    try:
        yield
    finally:
        FREE_MEMORY.reset(token)


def choose_memory(free: int) -> int:
    """Return the largest power of two that is at most half of ``free`` bytes, so that small changes change nothing."""
    return 1 << max(0, free.bit_length() - 2)


def without_probe_cache() -> AbstractContextManager[None]:
    """Return a context in which PROBE computes all activations anew."""
    return _environment(NO_CACHE)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _settings(threads: int) -> Iterator[None]:
    """Set torch's switches, and set them back."""
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    before, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False  # it times kernels and takes the fastest, which is another one each time
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        torch.backends.cudnn.benchmark = benchmark
        torch.set_num_threads(before)


@contextmanager
def _listen(fixed: Determinism) -> Iterator[None]:
    """Collect the names of operations that torch warns of, and pass all other warnings on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=MISSING.pattern)
        show = warnings.showwarning

        def hear(message: Warning | str, *rest: object, **options: object) -> None:
            found = MISSING.match(str(message))
            if found is None:
                show(message, *rest, **options)  # type: ignore[arg-type]
            elif found[1] not in fixed.not_deterministic:
                fixed.not_deterministic.append(found[1])

        warnings.showwarning = hear
        yield
