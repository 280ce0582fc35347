"""Whether a direction of one model is one of another's, of any width: by a map fitted on the same prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze.samples import (
    FOLDS,
    LEVEL,
    FoldPlan,
    Rows,
    Sample,
    draw_permutations,
    read_sample,
    split_folds,
)
from obliteratus.core.errors import UserError
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations
from obliteratus.report.curves import BLUE, GREY, ORANGE, Figure, add_legend

PERMUTATIONS = 39  # p = 0.025 at best; each costs five products of prompts² × width
# λ in units of the map's mean eigenvalue, among which generalized cross-validation chooses: from almost no shrinkage to
# a map that says little more than the mean.
RIDGES = tuple(10.0**power for power in range(-4, 4))
BINS = 30  # of the histogram, over all that is drawn, so that a narrow distribution stays visible
MIN_FREEDOM = 1e-9  # a map that fits everything has no freedom left; its error then becomes very large
MIN_EIGENVALUE = 1e-30  # avoids a division by zero where all prompts are equal at a stream


@dataclass(frozen=True)
class Transfer:
    """A linear map from a stream of one model to one of another, scored on prompts that it was not fitted on."""

    r2: float
    """1 − squared error over that of the mean, over all dimensions of the second stream; below 0 is worse than the
    mean."""
    r2_by_chance: tuple[float, ...]
    """R² of each random pairing of prompts."""
    r2_within: float
    """Mean R² of random pairings within each group: what knowing the group alone gives."""
    p: float
    """The share of pairings that do as well."""
    cosine: float
    """Mean over folds of the cosine between the first model's mean difference, mapped, and the second's own on the
    prompts of the fold."""
    ceiling: float
    """Mean cosine of the second model's own mean differences between the same folds: what a perfect map reaches."""
    cosine_by_chance: tuple[float, ...]
    """The same cosine for each random pairing."""
    streams: tuple[int, int]
    widths: tuple[int, int]
    level: float
    n: int
    """Prompts."""

    @property
    def significant(self) -> bool:
        """Whether the map predicts prompts that it has not seen better than chance."""
        return self.p <= self.level

    def to_dict(self) -> dict[str, Any]:
        """Return every score beside chance."""
        return {
            "streams": list(self.streams),
            "widths": list(self.widths),
            "prompts": self.n,
            "shuffles": len(self.r2_by_chance),
            "level": self.level,
            "found": self.significant,
            "p": self.p,
            "r2": self.r2,
            "r2_by_chance": [min(self.r2_by_chance), max(self.r2_by_chance)],
            "r2_group_alone": self.r2_within,
            "cosine": self.cosine,
            "cosine_ceiling": self.ceiling,
            "cosine_by_chance": [min(self.cosine_by_chance), max(self.cosine_by_chance)],
        }

    def summary(self) -> str:
        """Return the map's held-out R², and the mapped direction's cosine beside its ceiling."""
        where = f"stream {self.streams[0]} (width {self.widths[0]}) to {self.streams[1]} (width {self.widths[1]})"
        if not self.significant:
            return f"no map found from {where}: held-out R² {self.r2:.2f}, p = {self.p:.2g} ({self._tested})"
        return (
            f"{where}: held-out R² {self.r2:.2f} (group alone {self.r2_within:.2f}), the mapped direction's cosine "
            f"{self.cosine:.2f} of at most {self.ceiling:.2f} ({self._tested})"
        )

    @property
    def _tested(self) -> str:
        return f"{self.n} prompts, level {self.level:g}"

    def draw(self, figure: Figure) -> None:
        """Draw R² and cosine, each beside chance."""
        left, right = figure.subplots(1, 2)
        for axes, chance, value in ((left, self.r2_by_chance, self.r2), (right, self.cosine_by_chance, self.cosine)):
            axes.hist(chance, bins=BINS, range=(min(*chance, value), max(*chance, value)), color=GREY, label="shuffled")
            axes.set_ylabel("shuffles of the pairs")
        left.axvline(self.r2, color=BLUE, label="measured")
        left.axvline(self.r2_within, color=ORANGE, ls="--", label="shuffled within groups, mean")
        right.axvline(self.cosine, color=BLUE, label="measured")
        right.axvline(self.ceiling, color=ORANGE, ls="--", label="at most")
        left.set_xlabel("held-out R²")
        right.set_xlabel("cosine of the mapped direction")
        for axes in (left, right):
            add_legend(axes)


def measure_transfer(
    one: Activations,
    two: Activations,
    streams: tuple[int, int],
    *,
    folds: int = FOLDS,
    draws: int = PERMUTATIONS,
    level: float = LEVEL,
    seed: int = 0,
) -> Transfer:
    """Fit a ridge map from a stream of the first model to one of the second, and see where it takes the direction.

    one, two: activations of the same prompts in the same order; widths may differ. The map is fitted on the other
    folds, with λ chosen there from `RIDGES` by generalized cross-validation (Golub, Heath and Wahba 1979), and the
    fold's prompts give R². The mapped direction is the mean difference of the other folds. It is compared with the
    second model's own mean difference of the fold, so no prompt is on both sides. p is the share of ``draws`` random
    pairings of prompts with as high an R². A high R² needs shared content, not shared behavior: compare it with what
    the group alone gives. Where the pairing means nothing, a map is found in at most a share ``level`` of cases. Raises
    UserError where the numbers of prompts differ or rows were not kept.
    """
    first, x, y = pair_streams(one, two, streams)
    plan = split_folds(first.n, len(first) - first.n, folds, seed)
    maps = [FoldMap(x, plan, fold) for fold in range(len(plan.weights))]
    r2, cosine = zip(*(score_maps(maps, y[order]) for order in draw_permutations(len(x), draws, seed + 1)), strict=True)
    within = [score_maps(maps, y[order])[0] for order in permute_within_groups(first, draws, seed + 2)]
    return Transfer(
        r2=r2[0],
        r2_by_chance=r2[1:],
        r2_within=sum(within) / len(within),
        p=sum(value >= r2[0] for value in r2) / len(r2),
        cosine=cosine[0],
        ceiling=sum(_compute_ceiling(y, plan, fold) for fold in range(len(maps))) / len(maps),
        cosine_by_chance=cosine[1:],
        streams=streams,
        widths=(x.shape[1], y.shape[1]),
        level=level,
        n=len(x),
    )


def pair_streams(
    one: Activations, two: Activations, streams: tuple[int, int]
) -> tuple[Sample, Rows, Float[Tensor, "r w"]]:
    """Return the first model's sample and a stream of each model. Raises UserError where numbers of prompts differ."""
    first, second = (read_sample(acts, "transfer", least=4) for acts in (one, two))
    if (first.n, len(first)) != (second.n, len(second)):
        raise UserError(
            f"analysis 'transfer' needs the same prompts of both models; got {first.n} + {len(first) - first.n} and "
            f"{second.n} + {len(second) - second.n}"
        )
    return first, first.at(streams[0]), second.at(streams[1])


class FoldMap:
    """The ridge map of all rows outside one fold, to any second stream. Its eigenvalues are computed once."""

    def __init__(self, x: Rows, plan: FoldPlan, fold: int) -> None:
        self.fitted, self.plan, self.fold = plan.outside(fold), plan, fold
        inner = x[self.fitted]
        self.x = inner - inner.mean(0)
        values, self.vectors = torch.linalg.eigh(self.x @ self.x.T)
        self.values = values.clamp(min=0)
        self.ridges = self.values.mean().clamp(min=MIN_EIGENVALUE) * torch.tensor(RIDGES, dtype=x.dtype)
        self.rest = x[~self.fitted] - inner.mean(0)
        self.delta = plan.weights[fold] @ x

    def fit(self, y: Rows) -> Float[Tensor, "fitted width"]:
        """Return dual weights A: the map takes v to v Xᵀ A, a difference from y's mean over the fitted rows."""
        inner = y[self.fitted]
        along = self.vectors.T @ (inner - inner.mean(0))
        best = choose_ridge(self.values, along.square().sum(1), self.ridges)
        dual: Tensor = self.vectors @ (along / (self.values + best).clamp(min=torch.finfo(y.dtype).tiny)[:, None])
        return dual

    def score(self, y: Rows) -> tuple[float, float, float]:
        """Return the squared error on the fold's rows, that of the mean, and the mapped direction's cosine with y's."""
        dual = self.fit(y)
        truth = y[~self.fitted] - y[self.fitted].mean(0)
        error = truth - self.rest @ self.x.T @ dual
        mapped = self.delta @ self.x.T @ dual
        cosine = normalize(mapped, dim=0) @ normalize(compute_fold_difference(y, self.plan, self.fold), dim=0)
        return float(error.square().sum()), float(truth.square().sum()), float(cosine)


def choose_ridge(
    values: Float[Tensor, " rows"], squares: Float[Tensor, " rows"], ridges: Float[Tensor, " ridges"]
) -> Float[Tensor, ""]:
    """Return the λ with the least generalized cross-validation error, n ‖(I − H) y‖² / tr(I − H)².

    values, squares: eigenvalues, and y's squares along their eigenvectors. The mean takes one degree of freedom.
    """
    left = ridges[:, None] / (values + ridges[:, None]).clamp(min=torch.finfo(values.dtype).tiny)
    errors = (left.square() * squares).sum(1) / (left.sum(1) - 1).clamp(min=MIN_FREEDOM).square()
    return ridges[errors.argmin()]


def score_maps(maps: list[FoldMap], y: Rows) -> tuple[float, float]:
    """Return the held-out R² over all folds together, and the mean cosine of the mapped direction."""
    scores = [fold.score(y) for fold in maps]
    errors, whole = sum(s[0] for s in scores), sum(s[1] for s in scores)
    return 1 - errors / whole if whole else 0.0, sum(s[2] for s in scores) / len(scores)


def compute_fold_difference(y: Rows, plan: FoldPlan, fold: int) -> Float[Tensor, " width"]:
    """Return the mean difference of the rows of one fold."""
    rows, target = ~plan.outside(fold), torch.arange(len(y)) < plan.n
    return y[rows & target].mean(0) - y[rows & ~target].mean(0)


def permute_within_groups(sample: Sample, draws: int, seed: int) -> list[Tensor]:
    """Return random orders that keep every row in its group."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (sample.n, len(sample) - sample.n)
    pairs = [[torch.randperm(size, generator=generator) for size in sizes] for _ in range(draws)]
    return [torch.cat([one, sample.n + two]) for one, two in pairs]


def _compute_ceiling(y: Rows, plan: FoldPlan, fold: int) -> float:
    """Return the cosine between y's mean differences outside and inside the fold."""
    return float(normalize(plan.weights[fold] @ y, dim=0) @ normalize(compute_fold_difference(y, plan, fold), dim=0))
