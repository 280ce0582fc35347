"""A direction as a sum of a dictionary's features: how few explain it, and what each tells of the groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from obliteratus.core.results import Score
from obliteratus.core.shapes import Float
from obliteratus.report.curves import BLUE, GREY, ORANGE, Figure, add_legend

NAMED = 3  # features in the line for people


@dataclass(frozen=True)
class Atom:
    """A feature that the direction is made of."""

    feature: int
    """Row of the dictionary."""
    coefficient: float
    """Of its unit decoder row, where all atoms together are fitted to the unit direction."""
    auc: Score
    """Of how much it fires, target over control, on the prompts that the direction was fitted on."""
    target: Score
    """Share of target prompts that it fires on at all."""
    control: Score
    p: float
    """That the atom in this place of a direction of permuted labels tells *their* groups apart as well."""


@dataclass(frozen=True)
class SparseParts:
    """A direction as a sum of features."""

    stream: int
    source: str
    """Where the dictionary is from."""
    features: int
    """In it; of one trained here, those that fire on any of its prompts."""
    rows_explained: float
    """1 − Σ‖x − x̂‖² / Σ‖x − mean‖² of the prompts' rows: what the dictionary knows of this stream; may be below 0."""
    atoms: tuple[Atom, ...]
    """In the order they were taken."""
    share: Float[Tensor, " most"]
    """Of the direction's squared length, by the first 1, 2 … atoms."""
    by_chance: Float[Tensor, "ends most"]
    """2.5 % and 97.5 % quantiles of the same for mean differences of permuted labels."""
    p: Float[Tensor, " most"]
    """That these are as sparse, corrected for all numbers of atoms."""
    level: float
    draws: int
    prompts: tuple[int, int]
    """Target and control."""

    @property
    def found(self) -> tuple[int, ...]:
        """Numbers of atoms that explain more of the direction than chance allows: none where it is not sparse."""
        return tuple(((self.p <= self.level).nonzero().flatten() + 1).tolist())

    @property
    def telling(self) -> tuple[int, ...]:
        """Features among the atoms that tell the groups apart beyond what choosing them explains."""
        return tuple(atom.feature for atom in self.atoms if atom.p <= self.level)

    def numbers(self) -> dict[str, Any]:
        """Shares by number of atoms; the atoms, with intervals."""
        scores = {name: [vars(a)[name].model_dump() for a in self.atoms] for name in ("auc", "target", "control")}
        return {
            "stream": self.stream,
            "dictionary": self.source,
            "features": self.features,
            "rows_explained": self.rows_explained,
            "prompts": list(self.prompts),
            "level": self.level,
            "permutations": self.draws,
            "found": list(self.found),
            "telling": list(self.telling),
            "explained": self.share.tolist(),
            "explained_by_chance_low": self.by_chance[0].tolist(),
            "explained_by_chance_high": self.by_chance[1].tolist(),
            "p": self.p.tolist(),
            "atoms": {
                "feature": [a.feature for a in self.atoms],
                "coefficient": [a.coefficient for a in self.atoms],
                "auc": scores["auc"],
                "fires_on_target": scores["target"],
                "fires_on_control": scores["control"],
                "p": [a.p for a in self.atoms],
            },
        }

    def told(self) -> str:
        """Of how few features, beside chance."""
        n, where = sum(self.prompts), f"the direction at stream {self.stream}"
        if not self.found:
            return f"{where} is no sparser in {self.features} features than chance would have it ({n} prompts)"
        k = self.found[0]
        named = ", ".join(f"{a.feature} ({a.coefficient:+.2f}, AUC {a.auc.value:.2f})" for a in self.atoms[:NAMED])
        return (
            f"{where} is sparser in {self.features} features than chance: {k} {'explains' if k == 1 else 'explain'} "
            f"{float(self.share[k - 1]):.0%} (chance {float(self.by_chance[1, k - 1]):.0%} at most, {n} prompts); "
            f"first features {named}"
        )

    def draw(self, figure: Figure) -> None:
        """The share explained beside chance's, and how often each atom fires."""
        left, right = figure.subplots(1, 2)
        counts = range(1, len(self.share) + 1)
        left.plot(counts, self.share.tolist(), ".-", color=BLUE, label="the direction")
        low, high = self.by_chance.tolist()
        left.fill_between(counts, low, high, color=GREY, alpha=0.4, lw=0, label="permuted labels, 95 %")
        left.set(xlabel="features", ylabel="share of the direction explained", ylim=(0, 1.03))
        for name, colour, shift in (("target", ORANGE, -0.1), ("control", BLUE, 0.1)):
            scores = [vars(a)[name] for a in self.atoms]
            values, places = [s.value for s in scores], [i + shift for i in range(len(scores))]
            ends = [[s.value - s.low for s in scores], [s.high - s.value for s in scores]]
            right.errorbar(places, values, yerr=ends, fmt="o", color=colour, label=name)
        right.set_xticks(range(len(self.atoms)), [str(a.feature) for a in self.atoms], rotation=90)
        right.set(xlabel="feature, in the order taken", ylabel="share of prompts that it fires on", ylim=(-0.03, 1.03))
        add_legend(left)
        add_legend(right)
