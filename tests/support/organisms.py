"""Small parts of the organisms' prompts, so that tests on them end soon."""

from __future__ import annotations

from obliteratus.core.types import Prompt

FIT = 24  # prompts of each group that directions are found on
N = 12  # prompts of each group that are answered


def few(members: tuple[Prompt, ...], n: int = N, fit: int = FIT, search: int = 0) -> tuple[Prompt, ...]:
    """Return the first fit and search prompts, as many as asked, and n report prompts spread over all of them."""
    found, searched, report = ([p for p in members if p.split == split] for split in ("fit", "search", "report"))
    return (*found[:fit], *searched[:search], *report[:: len(report) // n][:n])
