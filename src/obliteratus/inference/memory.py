"""How much memory passes may take: what is free on the model's device, or what a budget leaves of it."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import psutil
import torch
from pydantic import ByteSize, TypeAdapter, ValidationError

from obliteratus.core.errors import UserError
from obliteratus.core.types import Subject
from obliteratus.weights.devices import minimum_over_processes

LIMIT: ContextVar[float] = ContextVar("LIMIT", default=math.inf)
"""Bytes that the process may hold where the model is."""
# Tokens whose logits over the whole vocabulary are held at once: 128 × 49 152 fp32 = 25 MB, small beside any
# model, and more would not be faster, since the head alone is a large matrix product already at this size.
LOGIT_TOKENS = 128
COPIES = 2  # of these logits: as they are, and as log-probabilities. No batch size makes them smaller


@contextmanager
def memory_limit(limit: float) -> Iterator[None]:
    """Inside, batches are sized so that this process holds at most ``limit`` bytes on the model's device, the model's
    own included."""
    token = LIMIT.set(limit)
    try:
        yield
    finally:
        LIMIT.reset(token)


def free_memory(subject: Subject) -> int:
    """Bytes that may still be taken on the model's device; 0 where the budget is used up."""
    free = torch.cuda.mem_get_info(subject.device)[0] if subject.device.type == "cuda" else host_memory()
    limit = LIMIT.get()
    here = free if limit == math.inf else max(0.0, min(free, limit - held_bytes(subject)))
    return int(minimum_over_processes(subject.model, float(here), subject.device))


def host_memory() -> int:
    """Bytes of main memory that can be had without swapping; what files' caches hold counts as free."""
    return int(psutil.virtual_memory().available)


def held_bytes(subject: Subject) -> int:
    """Bytes that this process holds on the model's device, the model's own included."""
    if subject.device.type == "cuda":
        return int(torch.cuda.memory_allocated(subject.device))
    return resident_bytes()


def resident_bytes() -> int:
    """Bytes of main memory that this process holds, without what it has freed."""
    trim_heap()
    return int(psutil.Process().memory_info().rss)


def trim_heap() -> None:
    """Freed memory goes back to the system, which glibc else holds on to, and which would count as held."""
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def parse_size(text: str) -> float:
    """Bytes of a size such as ``6GB`` or ``1.5GiB``. Raises UserError for anything else."""
    try:
        return float(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise UserError(f"--memory {text}: give a size such as 6GB or 900MB") from error
