"""A test of whether any difference between two groups is left in their activations, its error rate known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obliteratus.analyze.base import AnalysisContext, analyses
from obliteratus.analyze.samples import (
    DRAWS,
    FOLDS,
    LEVEL,
    Draws,
    Folds,
    Level,
    Sample,
    compute_thresholds,
    draw_permutations,
    familywise_p_values,
    permute_d_prime,
    read_sample,
    split_folds,
)
from obliteratus.core.shapes import Float
from obliteratus.report.curves import GREY, Figure, add_legend, plot_curve


@dataclass(frozen=True)
class Certificate:
    """What a test of ``level`` says of the groups at each stream index, and of all streams together."""

    d_prime: Float[Tensor, " streams"]
    """Separation of held-out rows along the direction of the other folds; 0 and below is none."""
    threshold: Float[Tensor, " streams"]
    """Above this, a stream's d′ is found at the level, all streams counted."""
    p: Float[Tensor, " streams"]
    """Corrected for all streams."""
    level: float
    draws: int
    n: tuple[int, int]
    """Prompts of target and control."""

    @property
    def signal(self) -> bool:
        """Whether any stream tells the groups apart."""
        return bool((self.p <= self.level).any())

    @property
    def significant(self) -> tuple[int, ...]:
        """Stream indices that do."""
        return tuple((self.p <= self.level).nonzero().flatten().tolist())

    @property
    def best(self) -> int:
        """The stream index farthest from chance."""
        return min(range(len(self.p)), key=lambda s: (float(self.p[s]), -float(self.d_prime[s])))

    def to_dict(self) -> dict[str, Any]:
        """The verdict, and each stream's d′ with what it would have to exceed."""
        return {
            "signal": self.signal,
            "p": float(self.p.min()),
            "level": self.level,
            "permutations": self.draws,
            "prompts": {"target": self.n[0], "control": self.n[1]},
            "found": list(self.significant),
            "d_prime": self.d_prime.tolist(),
            "threshold": self.threshold.tolist(),
            "p_stream": self.p.tolist(),
        }

    def summary(self) -> str:
        best = self.best
        p = f"p = {float(self.p[best]):.3g} over all {len(self.p)} streams, level {self.level:g}"
        least = f"above {float(self.threshold[best]):.2f} would have been found"
        if self.signal:
            return (
                f"the groups differ at {len(self.significant)} streams, most clearly at {best}: held-out d′ "
                f"{float(self.d_prime[best]):.2f} ({p})"
            )
        return f"no difference found ({p}); at stream {best} a held-out d′ {least}"

    def draw(self, figure: Figure) -> None:
        """d′ and its threshold over streams."""
        axes = figure.add_subplot(xlabel="stream index", ylabel="held-out d′")
        plot_curve(axes, self.d_prime, "measured")
        plot_curve(axes, self.threshold, f"found above this (level {self.level:g}, all streams)", GREY)
        axes.axhline(0, color=GREY, lw=0.5)
        add_legend(axes)


def certify(
    target: Float[Tensor, "target streams width"],
    control: Float[Tensor, "control streams width"],
    *,
    level: float = LEVEL,
    draws: int = DRAWS,
    folds: int = FOLDS,
    standardize: bool = True,
    seed: int = 0,
) -> Certificate:
    """Do the two groups' rows differ in their means at any stream?

    Statistic: d′ of rows along the mean difference that the other folds give, so a direction never scores the rows it
    was fitted on. p: how often ``draws`` permutations of the labels reach it, by the largest of all streams' statistics
    (`familywise_p_values`). If labels mean nothing a difference is found in at most a share ``level`` of all cases, exactly,
    whatever the rows' distribution: prompts need only be exchangeable. The other error is not bounded: ``threshold``
    says what would have been found. standardize: each dimension over its standard deviation first, so that the few
    massive ones of a real stream hide nothing; labels play no part in it. Time: draws × folds × streams × prompts².
    """
    return certify_sample(
        Sample(target, control), level=level, draws=draws, folds=folds, standardize=standardize, seed=seed
    )


def certify_sample(
    sample: Sample, *, level: float, draws: int, folds: int, standardize: bool, seed: int
) -> Certificate:
    """`certify` of a sample."""
    n, m = sample.n, len(sample) - sample.n
    plan, order = split_folds(n, m, folds, seed), draw_permutations(len(sample), draws, seed + 1)
    found = torch.stack([permute_d_prime(gram, plan, order) for gram in sample.grams(standardize)], 1)
    return Certificate(found[0], compute_thresholds(found, level), familywise_p_values(found), level, draws, (n, m))


@analyses.register("certificate", cite="ISBN 978-0-471-55761-6", needs=("rows",))
def certify_activations(
    context: AnalysisContext,
    *,
    level: Level = LEVEL,
    draws: Draws = DRAWS,
    folds: Folds = FOLDS,
    standardize: bool = True,
    seed: int = 0,
) -> Certificate:
    """Do target and control differ at any stream? A permutation test whose false positives are at most ``level``.

    As `certify`, which takes any two sets of rows: of an edited model it certifies what is left. Needs rows.
    """
    sample = read_sample(context.activations, "certificate", least=4)  # 2 folds of 2: a variance needs two
    return certify_sample(sample, level=level, draws=draws, folds=folds, standardize=standardize, seed=seed)
