"""More prompts than a test writes down."""

from __future__ import annotations

from dataclasses import replace

from obliteratus.core.types import PromptSet

ENDINGS = ("", " Please!", " In short?", " Be kind.", " Quickly now.", " As a list.")


def vary(prompts: PromptSet, n: int) -> PromptSet:
    """Return each prompt with n different endings, n up to six."""
    return PromptSet(
        {g: tuple(replace(p, text=p.text + e) for e in ENDINGS[:n] for p in ps) for g, ps in prompts.groups.items()}
    )
