"""Variants: which of several plans each row is under, where the rows of one pass are under different ones.

`excise.live.hooks_per_row` assigns a variant to each prompt of a list. Whatever runs the list says which rows a pass
holds, and the hooks ask for the variants of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from obliteratus.core.shapes import Int

_OF_PROMPTS: ContextVar[tuple[int, ...] | None] = ContextVar("variant of each prompt", default=None)
_OF_PASS: ContextVar[Tensor | None] = ContextVar("variant of each row of the pass", default=None)


@contextmanager
def assign_prompt_variants(variants: Sequence[int]) -> Iterator[None]:
    """Inside the context, put prompt i of a list that is run under variant ``variants[i]``."""
    token = _OF_PROMPTS.set(tuple(variants))
    try:
        yield
    finally:
        _OF_PROMPTS.reset(token)


def prompt_variants(rows: int) -> tuple[int, ...] | None:
    """Return the variant of each prompt, or None if all are under the same plan.

    Raises ValueError if variants were assigned to another number of prompts than ``rows``.
    """
    variants = _OF_PROMPTS.get()
    if variants is not None and len(variants) != rows:
        raise ValueError(f"plans were assigned to {len(variants)} rows, but {rows} prompts are run")
    return variants


def all_variants() -> list[int]:
    """Return the numbers of all variants, or [0] if rows do not differ."""
    return list(range(max(_OF_PROMPTS.get() or (0,)) + 1))


@contextmanager
def assign_pass_variants(variants: Sequence[int] | Tensor | None) -> Iterator[None]:
    """Around one pass, tell the hooks the variant of each of its rows. None: rows do not differ."""
    token = _OF_PASS.set(None if variants is None else torch.as_tensor(variants))
    try:
        yield
    finally:
        _OF_PASS.reset(token)


def pass_variants() -> Int[Tensor, " rows"]:
    """Return the variant of each row of the current pass. Raises ValueError if none were assigned."""
    variants = _OF_PASS.get()
    if variants is None:
        raise ValueError("rows are under different plans, and this pass does not say which rows it holds")
    return variants
