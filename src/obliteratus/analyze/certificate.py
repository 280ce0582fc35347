"""A permutation test of whether two groups' activations differ, with a known rate of false positives."""

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
    """The outcome of the test at ``level``, for each stream and for all streams together."""

    d_prime: Float[Tensor, " streams"]
    """Separation of held-out rows along the direction fitted on the other folds; 0 and below is none."""
    threshold: Float[Tensor, " streams"]
    """A stream whose d′ exceeds this is significant at the level, corrected for all streams."""
    p: Float[Tensor, " streams"]
    """p values, corrected for all streams."""
    level: float
    draws: int
    """Permutations of the labels."""
    n: tuple[int, int]
    """Target and control prompts."""

    @property
    def signal(self) -> bool:
        """Whether the groups differ at any stream."""
        return bool((self.p <= self.level).any())

    @property
    def significant(self) -> tuple[int, ...]:
        """Streams at which the groups differ."""
        return tuple((self.p <= self.level).nonzero().flatten().tolist())

    @property
    def best(self) -> int:
        """The stream with the lowest p, and the largest d′ if several have it."""
        return min(range(len(self.p)), key=lambda s: (float(self.p[s]), -float(self.d_prime[s])))

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict, and each stream's d′ with its threshold."""
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
        """Return the verdict with the clearest stream's d′."""
        best = self.best
        p = f"p = {float(self.p[best]):.3g} over all {len(self.p)} streams, level {self.level:g}"
        if self.signal:
            return (
                f"the groups differ at {len(self.significant)} streams, most clearly at {best}: held-out d′ "
                f"{float(self.d_prime[best]):.2f} ({p})"
            )
        least = f"a held-out d′ above {float(self.threshold[best]):.2f} would have been significant"
        return f"no difference found ({p}); at stream {best} {least}"

    def draw(self, figure: Figure) -> None:
        """Draw d′ and its threshold over streams."""
        axes = figure.add_subplot(xlabel="stream index", ylabel="held-out d′")
        plot_curve(axes, self.d_prime, "measured")
        plot_curve(axes, self.threshold, f"threshold (level {self.level:g}, all streams)", GREY)
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
    """Test whether the means of two groups' rows differ at any stream.

    The statistic is d′ of rows along the mean difference of the other folds, so that no direction scores rows that it
    was fitted on. p is the share of ``draws`` permutations of the labels whose largest statistic over all streams
    reaches it (`familywise_p_values`). If labels mean nothing, a difference is found in at most a share ``level`` of
    cases, exactly and for any distribution of exchangeable rows. The rate of misses has no such bound; ``threshold``
    says what would have been found.

    standardize: divide each dimension by its standard deviation first, which does not depend on labels; otherwise the
    few massive dimensions of a real stream hide the rest. Time: draws × folds × streams × prompts².
    """
    return certify_sample(
        Sample(target, control), level=level, draws=draws, folds=folds, standardize=standardize, seed=seed
    )


def certify_sample(
    sample: Sample, *, level: float, draws: int, folds: int, standardize: bool, seed: int
) -> Certificate:
    """Run `certify` on a sample."""
    n, m = sample.n, len(sample) - sample.n
    plan, order = split_folds(n, m, folds, seed), draw_permutations(len(sample), draws, seed + 1)
    null = torch.stack([permute_d_prime(gram, plan, order) for gram in sample.grams(standardize)], 1)
    return Certificate(null[0], compute_thresholds(null, level), familywise_p_values(null), level, draws, (n, m))


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
    """Test whether target and control differ at any stream, with at most a share ``level`` of false positives.

    See `certify`, which takes any two sets of rows; on an edited model it certifies what is left of the difference.
    Needs rows.
    """
    sample = read_sample(context.activations, "certificate", least=4)  # 2 folds of 2: a variance needs two
    return certify_sample(sample, level=level, draws=draws, folds=folds, standardize=standardize, seed=seed)
