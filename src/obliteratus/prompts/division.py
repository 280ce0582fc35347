"""Divide the prompts of all groups among the parts, cluster by cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from obliteratus.core.separation import SplitBy
from obliteratus.core.types import SPLITS, Prompt, PromptSet, digest_of
from obliteratus.prompts.checks import CONTRASTED, ENOUGH
from obliteratus.prompts.clusters import (
    NEAR_DUPLICATES,
    Cluster,
    break_cluster,
    cluster_by_category,
    cluster_by_wording,
)
from obliteratus.prompts.places import NONE, Ints, Load, Placement, fill, place, quota

# A cluster that holds less than this share of every group is never what keeps a part from being filled.
LARGE = 0.05


@dataclass(frozen=True)
class Members:
    """All prompts of all groups in one row."""

    groups: tuple[str, ...]
    prompts: Sequence[Prompt]
    group: Ints
    """[prompts]: index of each prompt's group."""
    pin: Ints
    """[prompts]: the part that each is pinned to, or `NONE`."""
    rank: Sequence[str]
    """Hash of each prompt, which orders what nothing else orders."""

    @property
    def loose(self) -> Ints:
        """Indices of the prompts that are not pinned."""
        return numpy.flatnonzero(self.pin == NONE)


@dataclass(frozen=True)
class Division:
    """A part for each prompt."""

    members: Members
    part: Ints
    """[prompts]: index in `SPLITS`."""
    clusters: Sequence[Cluster]
    """The clusters that stayed whole."""
    first: Sequence[Cluster]
    """The clusters before any was broken."""

    def parts(self) -> list[PromptSet]:
        """Return fit, search and report, in which pinned prompts come first, then loose ones by their hash."""
        members, parts = self.members, [{group: list[Prompt]() for group in self.members.groups} for _ in SPLITS]
        pinned = numpy.flatnonzero(members.pin != NONE).tolist()
        for i in (*pinned, *sorted(members.loose.tolist(), key=lambda i: members.rank[i])):
            parts[self.part[i]][members.groups[members.group[i]]].append(members.prompts[i])
        return [PromptSet({group: tuple(found) for group, found in part.items()}) for part in parts]


def divide(prompts: PromptSet, seed: int, split_by: SplitBy) -> Division:
    """Divide the prompts. Where a part cannot be filled, the largest cluster is broken until all can be."""
    members = list_members(prompts, seed)
    if split_by == "category":
        first = cluster_by_category(members.prompts)
    else:
        first = cluster_by_wording(members.prompts, range(len(members.prompts)), 0)
    clusters = sort_clusters(members, first)
    while True:
        sizes = count_loose(members, clusters)
        load, whole = weigh_clusters(members, clusters, sizes)
        placement = place(load)
        largest = find_largest(clusters, sizes) if placement.unfilled else None
        if largest is None:
            return Division(members, assign_parts(members, clusters, whole, load, placement), clusters, first)
        rest = [cluster for cluster in clusters if cluster is not largest]
        clusters = sort_clusters(members, [*rest, *break_cluster(members.prompts, largest)])


def list_members(prompts: PromptSet, seed: int) -> Members:
    """Return the prompts of all groups in one row."""
    groups = tuple(prompts.groups)
    every = [p for group in groups for p in prompts[group]]
    return Members(
        groups,
        every,
        numpy.repeat(numpy.arange(len(groups)), [len(prompts[group]) for group in groups]),
        numpy.array([SPLITS.index(p.split) if p.split else NONE for p in every], dtype=numpy.int64),
        [digest_of([seed, *p.context, p.text]) for p in every],
    )


def sort_clusters(members: Members, clusters: Sequence[Cluster]) -> list[Cluster]:
    """Return the largest first, since small ones fit in after them; those of one size in the order of a hash."""
    return sorted(clusters, key=lambda c: (-len(c.members), min(members.rank[i] for i in c.members)))


def count_loose(members: Members, clusters: Sequence[Cluster]) -> Ints:
    """Return [clusters, groups]: the number of loose prompts."""
    return _count(members, clusters, members.group, len(members.groups), members.loose)


def _count(members: Members, clusters: Sequence[Cluster], kind: Ints, kinds: int, which: Ints) -> Ints:
    label = numpy.zeros(len(members.prompts), dtype=numpy.int64)
    for number, cluster in enumerate(clusters):
        label[list(cluster.members)] = number
    counts = numpy.zeros((len(clusters), kinds), dtype=numpy.int64)
    numpy.add.at(counts, (label[which], kind[which]), 1)
    return counts


def count_pins(members: Members, clusters: Sequence[Cluster]) -> Ints:
    """Return [clusters, parts]: the number of prompts that are pinned to each part."""
    return _count(members, clusters, members.pin, len(SPLITS), numpy.flatnonzero(members.pin != NONE))


def weigh_clusters(members: Members, clusters: Sequence[Cluster], sizes: Ints) -> tuple[Load, Ints]:
    """Return what is to be placed, and the indices of the clusters in it: all but single loose prompts."""
    pins = count_pins(members, clusters)
    fixed = numpy.where(pins.any(1), pins.argmax(1), NONE)  # where most of its pinned prompts are
    single = (sizes.sum(1) == 1) & (fixed == NONE)
    load = Load(sizes[~single], fixed[~single], sizes[single].sum(0), count_needed_loose(members))
    return load, numpy.flatnonzero(~single)


def count_needed_loose(members: Members) -> Ints:
    """Return [parts, groups]: half of the quota, or what `check_enough` asks for, less the pinned prompts."""
    needed = []
    for number, name in enumerate(members.groups):
        pins = members.pin[members.group == number]
        whole, loose = numpy.array(quota(len(pins))), numpy.array(quota(int((pins == NONE).sum())))
        enough = numpy.array([ENOUGH[part] if name in CONTRASTED else 0 for part in SPLITS])
        wanted = numpy.maximum((whole + 1) // 2, numpy.minimum(enough, whole))
        pinned = numpy.array([(pins == part).sum() for part in range(len(SPLITS))])
        needed.append(numpy.minimum(numpy.maximum(wanted - pinned, 0), loose))
    return numpy.stack(needed, axis=1)


def find_largest(clusters: Sequence[Cluster], sizes: Ints) -> Cluster | None:
    """Return the cluster with the largest share of a group's loose prompts, if there is a large one to break."""
    shares = (sizes / numpy.maximum(sizes.sum(0), 1)).max(1)
    for number in numpy.argsort(-shares, kind="stable").tolist():
        cluster: Cluster = clusters[number]
        if shares[number] <= LARGE:
            return None
        if cluster.level < NEAR_DUPLICATES and len(cluster.members) > 1:
            return cluster
    return None


def assign_parts(members: Members, clusters: Sequence[Cluster], whole: Ints, load: Load, placement: Placement) -> Ints:
    """Return the part of each prompt: where it is pinned, where its cluster is, or where `fill` puts a single one."""
    part = numpy.full(len(members.prompts), NONE, dtype=numpy.int64)
    for number, place_ in zip(whole.tolist(), placement.parts.tolist(), strict=True):
        part[list(clusters[number].members)] = place_
    for group in range(len(members.groups)):
        left = numpy.flatnonzero((part == NONE) & (members.group == group)).tolist()
        filled = fill(placement.counts[:, group], load.need[:, group], len(left))
        part[sorted(left, key=lambda i: members.rank[i])] = numpy.repeat(numpy.arange(len(SPLITS)), filled)
    return numpy.where(members.pin == NONE, part, members.pin)
