"""Prompts that a group holds twice."""

from __future__ import annotations

from collections.abc import Iterable

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.types import Prompt, PromptSet


def drop_duplicates(prompts: PromptSet) -> PromptSet:
    """Return the prompts without those that equal another of their group in text and earlier turns, and note how many.

    Of two such prompts, one that is pinned to a split remains. Raises UserError if they are pinned to different ones.
    """
    groups = {group: _distinct(members) for group, members in prompts.groups.items()}
    dropped = {g: len(prompts[g]) - len(members) for g, members in groups.items() if len(members) < len(prompts[g])}
    if not dropped:
        return prompts
    counts = ", ".join(f"{group} {count}" for group, count in dropped.items())
    note("prompts", f"duplicates left out: {counts} (same text and earlier turns)")
    return PromptSet(groups, prompts.dropped + sum(dropped.values()), prompts.sources)


def _distinct(members: Iterable[Prompt]) -> tuple[Prompt, ...]:
    found: dict[tuple[str, ...], Prompt] = {}
    for prompt in members:
        same = found.setdefault((prompt.text, *prompt.context), prompt)
        if prompt.split and same.split and prompt.split != same.split:
            pins = " and to ".join(sorted((prompt.split, same.split)))
            raise UserError(f"prompts: '{prompt.text[:60]}' is pinned to {pins}; pin it to one split")
        found[prompt.text, *prompt.context] = min(same, prompt, key=_precedence)
    return tuple(found.values())


def _precedence(prompt: Prompt) -> tuple[bool, bool, str]:
    """Pinned before loose and labeled before not, so that the order of the file decides nothing."""
    return not prompt.split, not prompt.category, prompt.category
