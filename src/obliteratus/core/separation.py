"""Define how far apart the parts of a prompt set are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SplitBy = Literal["wording", "category"]


@dataclass(frozen=True)
class Separation:
    """How far apart the parts of a prompt set are. Similarity is the Jaccard index (0–1) of two prompts' word triples:
    the number of triples in both over the number in either."""

    split_by: SplitBy
    threshold: float
    """Prompts at least this similar share much wording. Split by wording, they stay in one part."""
    clusters: int
    """Clusters of two prompts or more that stayed in one part each."""
    clustered: int
    """Prompts in these clusters."""
    broken: int
    """Prompts in clusters that were too large for one part and were therefore divided."""
    raised: float
    """Threshold at which the last of them could be divided; equal to ``threshold`` if none was."""
    pinned: int
    """Prompts in clusters that the prompt file itself pins to more than one part."""
    duplicates: int
    """Prompts that were left out, since their group holds the same text with the same earlier turns."""
    near_duplicates: int
    """Prompts that equal another once case, spaces, punctuation and accents are folded."""
    measured: int
    """Report prompts for which the nearest fit or search prompt was looked up."""
    median: float
    """Their median similarity to it."""
    largest: float
    """The largest."""
    above: int
    """Number of them whose similarity reaches the threshold."""
