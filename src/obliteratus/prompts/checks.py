"""What is wrong with prompts, in one line, before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import combinations, count

from obliteratus.core.errors import UserError
from obliteratus.core.types import SPLITS, PromptSet, Splits
from obliteratus.prompts.duplicates import drop_duplicates
from obliteratus.prompts.folding import fold_prompt
from obliteratus.prompts.places import quota

CONTRASTED = ("target", "control")
# With fewer fit prompts the difference of means is mostly that of the nouns in them, and an interval of a rate from
# fewer than four report prompts reaches from near 0 to near 1 whatever was measured. A search's choice likewise.
ENOUGH = {"fit": 8, "search": 4, "report": 4}
FEWEST_CATEGORIES = 3  # one for each part
FOLDED = "once case, spaces, punctuation and accents are folded"


def check_prompts(prompts: PromptSet, names: Mapping[str, str] | None = None) -> PromptSet:
    """Return the prompts without duplicates.

    names: group → where its prompts come from, for messages. Raises UserError if target or control is missing, a group
    is empty or holds nothing but near duplicates, or two groups share a prompt, all after folding (see `fold_prompt`).
    """
    names = names or {group: group for group in prompts.groups}
    for group in CONTRASTED:
        if group not in prompts.groups:
            raise UserError(f"prompts: the group '{group}' is missing; give --{group} SOURCE")
    for group, members in prompts.groups.items():
        if not members:
            raise UserError(f"{names[group]}: the group '{group}' is empty; give at least one prompt a line")
    _check_overlaps(prompts, names)
    prompts = drop_duplicates(prompts)
    _check_all_alike(prompts, names)
    return prompts


def _check_overlaps(prompts: PromptSet, names: Mapping[str, str]) -> None:
    """Compare all pairs of groups."""
    folded = {group: {fold_prompt(p): p.text for p in members} for group, members in prompts.groups.items()}
    for one, other in combinations(prompts.groups, 2):
        both = folded[one].keys() & folded[other].keys()
        if both and both == folded[one].keys() == folded[other].keys():
            raise UserError(f"{names[one]}: {one} and {other} hold the same prompts; give two different files")
        if both:
            raise UserError(
                f"{names[one]}: {_number(len(both))} both in {one} and in {other} {FOLDED}, such as "
                f"'{folded[one][min(both)][:60]}'; remove them from one"
            )


def _number(n: int) -> str:
    return "1 prompt is" if n == 1 else f"{n} prompts are"


def _check_all_alike(prompts: PromptSet, names: Mapping[str, str]) -> None:
    for group, members in prompts.groups.items():
        if len(members) > 1 and len({fold_prompt(p) for p in members}) == 1:
            raise UserError(
                f"{names[group]}: all {len(members)} prompts of the group '{group}' are alike {FOLDED}, such as "
                f"'{members[0].text[:60]}'; give different prompts"
            )


def check_categories(prompts: PromptSet) -> None:
    """Raise UserError unless all prompts have a category and target has at least three, one for each part."""
    without = {group: sum(not p.category for p in members) for group, members in prompts.groups.items()}
    if any(without.values()):
        counts = ", ".join(f"{n} of {len(prompts[group])} in {group}" for group, n in without.items() if n)
        raise UserError(
            f"--split-by category: prompts without a category: {counts}; give all a category, or split by wording"
        )
    found = Counter(p.category for p in prompts["target"])
    if len(found) < FEWEST_CATEGORIES:
        counts = ", ".join(f"{name} {n}" for name, n in sorted(found.items()))
        raise UserError(
            f"--split-by category: target has {len(found)} of the {FEWEST_CATEGORIES} categories that three parts need "
            f"({counts}); give more categories, or split by wording"
        )


def check_splits(splits: Splits, uses_search_split: bool = False) -> None:
    """Raise UserError if a group has no prompt in fit or report, or in search if that is used."""
    for name, part in zip(SPLITS, splits, strict=True):
        for group, members in part.groups.items():
            if not members and (uses_search_split or name != "search"):
                raise UserError(
                    f"prompts: the group '{group}' has no prompt in the {name} split ({_list_counts(splits, group)}); "
                    f"give at least {count_needed(uses_search_split)} prompts that differ in their wording"
                )


def check_enough(splits: Splits, uses_search_split: bool = False) -> None:
    """Raise UserError if target or control has fewer than 8 prompts in fit or 4 in report, or 4 in search if used."""
    if missing := describe_shortage(splits, uses_search_split):
        raise UserError(f"prompts: {missing}")


def describe_shortage(splits: Splits, uses_search_split: bool = False) -> str:
    """Return what `check_enough` refuses in one line, or an empty text."""
    needed = {name: n for name, n in ENOUGH.items() if uses_search_split or name != "search"}
    parts = dict(zip(SPLITS, splits, strict=True))
    if any(len(parts[name][group]) < n for name, n in needed.items() for group in CONTRASTED):
        counts = "; ".join(f"{group}: {_list_counts(splits, group)}" for group in CONTRASTED)
        wanted = ", ".join(f"{n} in {name}" for name, n in needed.items())
        return (
            f"too few to measure anything ({counts}); at least {wanted} are needed: "
            f"give {count_needed(uses_search_split)} or more of target and of control that differ in their wording"
        )
    return ""


def _list_counts(splits: Splits, group: str) -> str:
    return ", ".join(f"{len(part[group])} in {name}" for name, part in zip(SPLITS, splits, strict=True))


def count_needed(uses_search_split: bool) -> int:
    """Return how many loose prompts of a group fill all its parts."""
    used = [i for i, name in enumerate(SPLITS) if uses_search_split or name != "search"]
    return next(n for n in count(1) if all(quota(n)[i] >= ENOUGH[SPLITS[i]] for i in used))
