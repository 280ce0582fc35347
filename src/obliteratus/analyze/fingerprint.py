"""Descriptive numbers of the activations. They predict nothing: no labeled set of models says what they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.analyze.base import AnalysisContext, analyses
from obliteratus.analyze.samples import (
    LEVEL,
    Level,
    chance_interval,
    draw_permutations,
    familywise_p_values,
    read_sample,
)
from obliteratus.core.shapes import Float
from obliteratus.report.curves import Figure, plot_curve, plot_range

PERMUTATIONS = 59  # p = 0.017 at best; each copies a matrix of prompts × prompts at every stream
FEATURES = {
    "norm_ratio": "mean length, target over control",
    "kurtosis": "excess kurtosis along the difference",
    "width": "effective dimensions of the target",
}


@dataclass(frozen=True)
class Fingerprint:
    """Descriptive numbers at each stream, beside those of permuted labels."""

    norm_ratio: Float[Tensor, " streams"]
    """Mean length of the target's rows over that of the control's."""
    kurtosis: Float[Tensor, " streams"]
    """Excess kurtosis of the target along the unit mean difference: 0 Gaussian, −2 two equal clusters, large if a few
    outliers carry it."""
    width: Float[Tensor, " streams"]
    """(Σλ)²/Σλ² of the target rows' covariance about the control mean: 1 if all lie along one line."""
    chance: Float[Tensor, "features ends streams"]
    """2.5 % and 97.5 % quantiles of the three numbers, in this order, under permuted labels."""
    p: Float[Tensor, "features streams"]
    """The probability that a permutation is as far from the permutations' mean, two-sided; corrected for all streams
    and all three numbers."""
    level: float
    n: tuple[int, int]
    """Target and control prompts."""

    @property
    def unusual(self) -> dict[str, tuple[int, ...]]:
        """For each number, the streams at which it depends on the labels."""
        significant = (self.p <= self.level).tolist()
        return {name: tuple(i for i, x in enumerate(row) if x) for name, row in zip(FEATURES, significant, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """Return the three numbers by stream, beside chance."""
        numbers: dict[str, Any] = {"prompts": {"target": self.n[0], "control": self.n[1]}, "level": self.level}
        numbers["unusual"] = {name: list(streams) for name, streams in self.unusual.items()}
        for i, (name, values) in enumerate(self._features()):
            numbers[name] = values.tolist()
            numbers[f"{name}_by_chance_low"], numbers[f"{name}_by_chance_high"] = self.chance[i].tolist()
        return numbers

    def summary(self) -> str:
        """Return at how many streams each number differs from permuted labels."""
        parts = [f"{name.replace('_', ' ')} at {len(s)}" for name, s in self.unusual.items() if s]
        tested = f"{self.n[0]} and {self.n[1]} prompts, level {self.level:g} over all"
        size = f"of {len(self.width)} streams ({tested}); predicts nothing"
        return f"descriptive: differs from permuted labels in {', '.join(parts) or 'nothing, at none'} {size}"

    def draw(self, figure: Figure) -> None:
        """Draw the three numbers side by side."""
        for i, ((name, values), axes) in enumerate(zip(self._features(), figure.subplots(1, 3), strict=True)):
            plot_curve(axes, values, "measured")
            plot_range(axes, self.chance[i, 0], self.chance[i, 1], "permuted, 95 %")
            axes.set(xlabel="stream index", ylabel=FEATURES[name])
        lines, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside upper center", ncols=2)

    def _features(self) -> list[tuple[str, Tensor]]:
        return list(zip(FEATURES, (self.norm_ratio, self.kurtosis, self.width), strict=True))


@analyses.register("fingerprint", needs=("rows",))
def measure_fingerprint(
    context: AnalysisContext,
    *,
    draws: Annotated[int, Field(ge=19, le=10_000)] = PERMUTATIONS,
    level: Level = LEVEL,
    seed: int = 0,
) -> Fingerprint:
    """Measure length, kurtosis and width of the target's activations, for comparing models by eye.

    The numbers predict nothing. The audited program took them as signs of how a model was trained; no labeled set of
    models backs that, so no verdict is drawn from them here, and no decision should be. The kurtosis' direction is
    fitted on the same prompts. Permuted labels are treated alike, so only what lies outside their range says anything:
    where labels mean nothing, any number at any stream does in at most a share ``level`` of cases.
    Needs rows, and four prompts of each group.
    """
    sample = read_sample(context.activations, "fingerprint", least=4)
    order, n, m = draw_permutations(len(sample), draws, seed), sample.n, len(sample) - sample.n
    lengths = torch.cat([sample.target, sample.control]).double().norm(dim=2)
    by_stream = []
    for stream, gram in enumerate(sample.grams()):
        permuted = [compute_features(gram[rows][:, rows], lengths[rows, stream], n) for rows in order]
        by_stream.append(torch.stack(permuted))
    values = torch.stack(by_stream, 2).transpose(0, 1)
    distance = (values - values.mean(1, keepdim=True)).abs()
    p = familywise_p_values(distance.transpose(0, 1).flatten(1)).unflatten(0, (len(FEATURES), -1))
    ratio, kurtosis, width = values[:, 0]
    chance = torch.stack([chance_interval(feature) for feature in values])
    return Fingerprint(ratio, kurtosis, width, chance, p, level, (n, m))


def compute_features(
    gram: Float[Tensor, "rows rows"], lengths: Float[Tensor, " rows"], n: int
) -> Float[Tensor, " features"]:
    """Return the three numbers from inner products of rows, the first n being the target's; 0 where undefined."""
    weights = torch.cat([gram.new_full((n,), 1 / n), gram.new_full((len(gram) - n,), -1 / (len(gram) - n))])
    along = gram[:n] @ weights
    along = along - along.mean()
    control = torch.zeros_like(weights).index_fill(0, torch.arange(n, len(gram)), 1 / (len(gram) - n))
    cross = gram[:n] @ control
    inner = gram[:n, :n] - cross[:, None] - cross[None] + control @ gram @ control
    return torch.stack(
        [
            _divide(lengths[:n].mean(), lengths[n:].mean()),
            _divide((along**4).mean(), along.square().mean() ** 2) - 3 * (along.square().mean() > 0),
            _divide(inner.diagonal().sum() ** 2, inner.square().sum()),
        ]
    )


def _divide(one: Tensor, two: Tensor) -> Tensor:
    return torch.where(two > 0, one / torch.where(two > 0, two, 1.0), 0.0)
