"""Clusters of prompts that have to stay in one part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from obliteratus.core.types import Prompt
from obliteratus.prompts.folding import fold_prompt, fold_words
from obliteratus.prompts.shingles import find_components, number_shingles

# Two prompts share much wording if three in ten of their word triples, or more, are in both. At this threshold prompts
# of one template are found (97 % of those of an organism's templates, all of those of long ones, 69 % of short ones),
# while the largest cluster of prompts written one by one is 2 % of them. See docs/experiments/splits.md.
THRESHOLD = 0.3
# Where a cluster is too large for its part, it is linked anew at the next of these.
LEVELS = (THRESHOLD, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
NEAR_DUPLICATES = len(LEVELS)
"""Level at which only near duplicates are linked. These always stay together."""


@dataclass(frozen=True)
class Cluster:
    """Prompts that stay in one part."""

    members: tuple[int, ...]
    """Indices of the prompts."""
    level: int
    """Index in `LEVELS` of the threshold that links them, or `NEAR_DUPLICATES`."""


def cluster_by_wording(prompts: Sequence[Prompt], members: Iterable[int], level: int) -> list[Cluster]:
    """Return clusters of the members: any two of different clusters share less wording than the level's threshold."""
    if level == NEAR_DUPLICATES:
        same = _group_by({i: fold_prompt(prompts[i]) for i in members})
        return [Cluster(tuple(found), level) for found in same]
    by_words = _group_by({i: fold_words(prompts[i].text) for i in members})
    rows = number_shingles([fold_words(prompts[found[0]].text) for found in by_words])
    return [
        Cluster(tuple(i for text in component for i in by_words[text]), level)
        for component in find_components(rows, LEVELS[level])
    ]


def cluster_by_category(prompts: Sequence[Prompt]) -> list[Cluster]:
    """Return a cluster for each category, or for several that near duplicates connect."""
    name = {p.category: p.category for p in prompts}
    for same in _group_by(dict(enumerate(map(fold_prompt, prompts)))):
        joined = {name[prompts[i].category] for i in same}
        if len(joined) > 1:
            name = {category: min(joined) if old in joined else old for category, old in name.items()}
    groups = _group_by({i: name[p.category] for i, p in enumerate(prompts)})
    return [Cluster(tuple(found), NEAR_DUPLICATES) for found in groups]


def break_cluster(prompts: Sequence[Prompt], cluster: Cluster) -> list[Cluster]:
    """Return the clusters into which the lowest threshold that divides this one divides it."""
    for level in range(cluster.level + 1, NEAR_DUPLICATES + 1):
        found = cluster_by_wording(prompts, cluster.members, level)
        if len(found) > 1:
            return found
    return [Cluster(cluster.members, NEAR_DUPLICATES)]


def count_near_duplicates(prompts: Sequence[Prompt]) -> int:
    """Return how many prompts equal an earlier one after folding (see `fold_prompt`)."""
    return len(prompts) - len({fold_prompt(p) for p in prompts})


def _group_by(keys: Mapping[int, Hashable]) -> list[list[int]]:
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for i, key in keys.items():
        groups[key].append(i)
    return list(groups.values())
