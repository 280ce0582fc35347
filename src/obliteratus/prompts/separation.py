"""How far apart the parts of a division are."""

from __future__ import annotations

from statistics import median

from obliteratus.core.progress import note
from obliteratus.core.separation import Separation, SplitBy
from obliteratus.core.types import SPLITS
from obliteratus.prompts.clusters import LEVELS, THRESHOLD, count_near_duplicates
from obliteratus.prompts.division import Division, Members, count_pins
from obliteratus.prompts.folding import fold_words
from obliteratus.prompts.shingles import largest_similarities, number_shingles
from obliteratus.prompts.spacing import pick_evenly

# Report prompts whose nearest fit or search prompt is looked up, evenly spaced by the alphabet: a second's work.
MOST = 2000


def measure_separation(division: Division, split_by: SplitBy, dropped: int) -> Separation:
    """Return how far apart the parts are. dropped: the number of duplicates that were left out."""
    members = division.members
    kept = [len(cluster.members) for cluster in division.clusters if len(cluster.members) > 1]
    broken, raised = _count_broken(division)
    nearest = _find_nearest(division)
    return Separation(
        split_by=split_by,
        threshold=THRESHOLD,
        clusters=len(kept),
        clustered=sum(kept),
        broken=broken,
        raised=raised,
        pinned=_count_pinned_apart(members, division),
        duplicates=dropped,
        near_duplicates=count_near_duplicates(members.prompts),
        measured=len(nearest),
        median=median(nearest) if nearest else 0.0,
        largest=max(nearest, default=0.0),
        above=sum(similarity >= THRESHOLD for similarity in nearest),
    )


def _count_broken(division: Division) -> tuple[int, float]:
    """Return how many prompts were in clusters that were broken, and the threshold of the last piece."""
    whole = {frozenset(cluster.members) for cluster in division.clusters}
    broken = {i for cluster in division.first if frozenset(cluster.members) not in whole for i in cluster.members}
    levels = [cluster.level for cluster in division.clusters if not broken.isdisjoint(cluster.members)]
    return len(broken), LEVELS[min(max(levels, default=0), len(LEVELS) - 1)]


def _count_pinned_apart(members: Members, division: Division) -> int:
    pins = count_pins(members, division.first)
    return int(pins[(pins > 0).sum(1) > 1].sum())


def _find_nearest(division: Division) -> list[float]:
    """Return the similarity of report prompts to the nearest fit or search prompt."""
    report = SPLITS.index("report")
    words = [fold_words(p.text) for p in division.members.prompts]
    asked = sorted({words[i] for i, part in enumerate(division.part.tolist()) if part == report})
    asked = pick_evenly(asked, MOST)
    others = sorted({words[i] for i, part in enumerate(division.part.tolist()) if part != report})
    rows = number_shingles([*asked, *others])
    return largest_similarities(rows[: len(asked)], rows[len(asked) :])


def note_separation(found: Separation) -> None:
    """Say how far apart the parts are, and what keeps them from being further apart."""
    kept = "of one category" if found.split_by == "category" else f"that share {found.threshold:.0%} of their wording"
    note(
        "prompts",
        f"{found.clusters} clusters {kept} ({found.clustered} prompts) stay in one part each, with "
        f"{found.near_duplicates} near duplicates; report prompts share a median of {found.median:.0%} and at most "
        f"{found.largest:.0%} of their wording with the nearest fit or search prompt",
    )
    if found.broken:
        note(
            "prompts",
            f"warning: {found.broken} prompts are of so few templates that no part could be filled without dividing "
            f"them; they stay together from {found.raised:.0%} of shared wording on, so figures on report prompts are "
            "optimistic: give prompts that differ more, or --split-by category",
        )
    if found.pinned:
        note("prompts", f"warning: {found.pinned} pinned prompts share wording with prompts pinned to another part")
