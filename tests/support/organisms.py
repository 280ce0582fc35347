"""Small parts of the organisms' prompts, so that tests on them end soon."""

from __future__ import annotations

from obliteratus.core.types import Prompt

FIT = 32  # prompts of each group that directions are found on
N = 16  # prompts of each group that are answered


def few(members: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
    """Return the first `FIT` fit prompts, and `N` report prompts spread over all of them."""
    fit, report = ([p for p in members if p.split == split] for split in ("fit", "report"))
    return (*fit[:FIT], *report[:: len(report) // N][:N])
