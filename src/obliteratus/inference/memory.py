"""How much memory passes may take: what is free on the model's device, or what the user's budget leaves of it."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import psutil
import torch

from obliteratus.core.types import Subject
from obliteratus.weights.devices import minimum_over_processes

MEMORY_LIMIT: ContextVar[float] = ContextVar("memory limit", default=math.inf)
"""Bytes that this process may hold on the model's device."""
FREE_MEMORY: ContextVar[int] = ContextVar("memory that counts as free", default=0)
"""Bytes that count as free however many are, so that batches are of the same sizes each time; 0 measures them."""
# Tokens whose logits over the whole vocabulary are held at once. 128 × 49 152 in fp32 are 25 MB, little beside any
# model. More would not be faster, since the head alone is a large matrix product at this size already.
LOGIT_TOKENS = 128
LOGIT_COPIES = 2  # the logits themselves and their log-probabilities; no batch size makes them smaller


@contextmanager
def memory_limit(limit: float) -> Iterator[None]:
    """Size batches inside the context so that this process holds at most ``limit`` bytes on the model's device,
    including the model."""
    token = MEMORY_LIMIT.set(limit)
    try:
        yield
    finally:
        MEMORY_LIMIT.reset(token)


def free_memory(subject: Subject) -> int:
    """Return the bytes that may still be taken on the model's device; 0 if the budget is used up."""
    if FREE_MEMORY.get():
        return FREE_MEMORY.get()
    free = torch.cuda.mem_get_info(subject.device)[0] if subject.device.type == "cuda" else host_memory()
    limit = MEMORY_LIMIT.get()
    allowed = free if limit == math.inf else max(0.0, min(free, limit - held_bytes(subject)))
    return int(minimum_over_processes(subject.model, float(allowed), subject.device))


def host_memory() -> int:
    """Return the bytes of main memory available without swapping; the system's file cache counts as free."""
    return int(psutil.virtual_memory().available)


def held_bytes(subject: Subject) -> int:
    """Return the bytes that this process holds on the model's device, including the model."""
    if subject.device.type == "cuda":
        return int(torch.cuda.memory_allocated(subject.device))
    return resident_bytes()


def resident_bytes() -> int:
    """Return the bytes of main memory that this process holds, without what it has freed."""
    trim_heap()
    return int(psutil.Process().memory_info().rss)


def trim_heap() -> None:
    """Return freed memory to the system. glibc would hold on to it, and it would count as held."""
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
