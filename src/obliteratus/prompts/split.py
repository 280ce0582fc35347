"""Split prompts into fit, search and report, so that prompts which share much wording are in one part."""

from __future__ import annotations

from obliteratus.core.progress import note
from obliteratus.core.separation import SplitBy
from obliteratus.core.types import PromptSet, Splits
from obliteratus.prompts.checks import check_categories, check_enough, check_prompts, check_splits, describe_shortage
from obliteratus.prompts.division import divide
from obliteratus.prompts.separation import measure_separation, note_separation


def split_prompts(
    prompts: PromptSet,
    seed: int = 0,
    uses_search_split: bool = False,
    *,
    split_by: SplitBy = "wording",
    force: bool = False,
) -> Splits:
    """Check the prompts and split them into disjoint parts: 60 % fit, 15 % search and 25 % report of every group.

    Prompts of all groups that share much wording (see `clusters.THRESHOLD`), or with ``category`` those of one
    category, stay in one part, and the fractions hold as closely as that allows. A pinned prompt stays where it is
    pinned, and draws those that share its wording to it. A cluster that leaves too few prompts for the other parts is
    broken, which a note says. The result depends on the prompts and the seed, not on their order.

    force: note what `check_enough` would refuse, and go on. Raises UserError for prompts that `check_prompts` refuses,
    that leave a part empty (search only where it is used), or that are too few.

    >>> ob.split_prompts(prompts)
    <Splits: fit 21 target, 21 control; search 6 target, 6 control; report 9 target, 9 control>
    """
    prompts = check_prompts(prompts)
    if split_by == "category":
        check_categories(prompts)
    division = divide(prompts, seed, split_by)
    separation = measure_separation(division, split_by, prompts.dropped)
    fit, search, report = division.parts()
    splits = Splits(fit, search, report, prompts.digest, separation)
    check_splits(splits, uses_search_split)
    if not force:
        check_enough(splits, uses_search_split)
    elif missing := describe_shortage(splits, uses_search_split):
        note("prompts", f"warning: {missing}")
    note_separation(separation)
    return splits
