"""Which of several edits each row is under, where the rows of one pass are under different ones.

`excise.live_rows` says so for the rows of a list of prompts; what runs them says which rows a pass holds; hooks ask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from obliteratus.core.shapes import Int

_PROMPTS: ContextVar[tuple[int, ...] | None] = ContextVar("variant of each prompt", default=None)
_PASS: ContextVar[Tensor | None] = ContextVar("variant of each row of this pass", default=None)


@contextmanager
def with_variants(of_row: Sequence[int]) -> Iterator[None]:
    """Inside, prompt i of what is run is under variant ``of_row[i]``."""
    token = _PROMPTS.set(tuple(of_row))
    try:
        yield
    finally:
        _PROMPTS.reset(token)


def variants_of(rows: int) -> tuple[int, ...] | None:
    """The variant of each prompt; None where all are under the same edits. ValueError for another number of prompts."""
    found = _PROMPTS.get()
    if found is not None and len(found) != rows:
        raise ValueError(f"edits were given for {len(found)} rows, and {rows} prompts are run")
    return found


def all_variants() -> list[int]:
    """All variants there are; [0] where rows do not differ."""
    return list(range(max(_PROMPTS.get() or (0,)) + 1))


@contextmanager
def rows_in_pass(of_row: Sequence[int] | Tensor | None) -> Iterator[None]:
    """Around one pass: the variant of each of its rows. None: rows do not differ."""
    token = _PASS.set(None if of_row is None else torch.as_tensor(of_row))
    try:
        yield
    finally:
        _PASS.reset(token)


def variants_of_pass() -> Int[Tensor, " rows"]:
    """The variant of each row of the pass that runs now. ValueError where what runs it did not say."""
    found = _PASS.get()
    if found is None:
        raise ValueError("rows are under different plans, and this pass does not say which rows it holds")
    return found
