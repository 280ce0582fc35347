"""How often the intervals of scores cover the truth, by simulation: 95 % is what they say.

    python -m bench.coverage [--draws 2000] [--smoke] [--json]

Samples of 24, 48, 96 and 200 items are drawn from distributions whose truth is known. A column is the share of drawn
samples whose interval covers it, of those that have an interval; a dash where fewer than half have one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import exp
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from bench.common import format_rows, make_parser, print_report
from obliteratus.core.results import Score
from obliteratus.verify.agreement import measure_agreement
from obliteratus.verify.intervals import (
    group_ratio,
    mean_score,
    paired_ratio,
    paired_share_change,
    quantile_score,
    share_difference,
    wilson_rate,
)

SIZES = (24, 48, 96, 200)
DRAWS, FEW = 2000, 40
EFFECT = 0.3  # nats by which a text's loss changes: a tenth of what texts differ by
Draw = Callable[[Generator, int], Tensor]
"""(random numbers, items) → a sample, fp64 [items]."""


class Case(NamedTuple):
    """A kind of interval."""

    score: Callable[[Generator, int], Score]
    """(random numbers, items) → the score of a sample that was drawn."""
    truth: float


class Coverage(NamedTuple):
    """What became of the drawn samples."""

    covered: float
    """Share (0–1) of the intervals that cover the truth."""
    given: float
    """Share (0–1) of the samples that have an interval."""


# ---------------------------------------------------------------------------------------------- distributions
def normal(rng: Generator, n: int) -> Tensor:
    return torch.tensor(rng.normal(size=n))


def lognormal(rng: Generator, n: int) -> Tensor:
    return torch.tensor(rng.lognormal(size=n))


def half_zero(rng: Generator, n: int) -> Tensor:
    """Return exponential values, half of which are zero instead."""
    return torch.tensor(rng.exponential(size=n) * (rng.random(n) < 0.5))


MEANS = {normal: 0.0, lognormal: exp(0.5), half_zero: 0.5}
QUANTILES = {  # standard normal z; exp(z); and −ln(2 (1 − q))
    normal: {0.95: 1.6448536, 0.99: 2.3263479},
    lognormal: {0.95: exp(1.6448536), 0.99: exp(2.3263479)},
    half_zero: {0.95: 2.3025851, 0.99: 3.9120230},
}
SHARES = (0.05, 0.2, 0.5)
CHANGES = {
    "of a quarter": (0.27, 0.03, 0.23, 0.47),
    "of nearly all": (0.05, 0.0, 0.9, 0.05),
    "of few": (0.5, 0.06, 0.02, 0.42),
}
"""Shares of items that show the behavior both times, only after, only before, and never."""
AGREEMENTS = {"0.6": (0.4, 0.1, 0.1, 0.4), "0.9": (0.279, 0.021, 0.021, 0.679)}
"""Shares of answers that both call shown, only the judge, only the labels, and neither, by their kappa."""


def list_cases() -> dict[str, Case]:
    """Return every kind of interval by name."""
    cases: dict[str, Case] = {}
    for draw, mean in MEANS.items():
        name = draw.__name__.replace("_", " ")
        cases[f"mean, {name}"] = Case(partial(score_mean, draw), mean)
        cases[f"paired ratio, {name}"] = Case(partial(score_pairs, draw), exp(EFFECT * mean))
        cases[f"ratio of groups, {name}"] = Case(partial(score_groups, draw), 1.0)
        for q, truth in QUANTILES[draw].items():
            cases[f"p{100 * q:.0f}, {name}"] = Case(partial(score_quantile, draw, q), truth)
    cases |= {f"share, {p:.0%}": Case(partial(score_share, p), p) for p in SHARES}
    for name, cells in CHANGES.items():
        cases[f"change of shares, {name}"] = Case(partial(score_change, cells), cells[1] - cells[2])
    cases |= {f"difference of shares, {p:.0%}": Case(partial(score_difference, p), p - 0.2) for p in SHARES}
    return cases | {f"kappa, {name}": Case(partial(score_kappa, c), float(name)) for name, c in AGREEMENTS.items()}


# ------------------------------------------------------------------------------------------ scores of samples
def score_mean(draw: Draw, rng: Generator, n: int) -> Score:
    return mean_score(draw(rng, n), "x")


def score_pairs(draw: Draw, rng: Generator, n: int) -> Score:
    before = torch.tensor(3 * rng.normal(size=n))
    return paired_ratio(before + EFFECT * draw(rng, n), before)


def score_groups(draw: Draw, rng: Generator, n: int) -> Score:
    return group_ratio(draw(rng, n), draw(rng, n))


def score_quantile(draw: Draw, q: float, rng: Generator, n: int) -> Score:
    return quantile_score(draw(rng, n), q, "x")


def score_share(p: float, rng: Generator, n: int) -> Score:
    return wilson_rate(int(rng.binomial(n, p)), n)


def score_difference(p: float, rng: Generator, n: int) -> Score:
    return share_difference(score_share(p, rng, n), score_share(0.2, rng, n))


def score_change(cells: Sequence[float], rng: Generator, n: int) -> Score:
    kinds = torch.tensor(rng.choice(4, size=n, p=cells))
    return paired_share_change((kinds <= 1).double(), ((kinds == 0) | (kinds == 2)).double())


def score_kappa(cells: Sequence[float], rng: Generator, n: int) -> Score:
    kinds = rng.choice(4, size=n, p=cells)
    said, labels = kinds <= 1, (kinds == 0) | (kinds == 2)
    return measure_agreement(said.tolist(), labels.tolist())["kappa"]


# ------------------------------------------------------------------------------------------------ measuring
def measure_coverage(case: Case, n: int, draws: int, seed: int = 0) -> Coverage:
    """Return how often the intervals of samples of n items cover the truth, and how many samples have one."""
    rng = np.random.default_rng(seed)
    found = [score for score in (case.score(rng, n) for _ in range(draws)) if score.has_interval]
    covered = sum(score.low - 1e-9 <= case.truth <= score.high + 1e-9 for score in found)
    return Coverage(covered / max(len(found), 1), len(found) / draws)


def format_table(found: Mapping[str, Mapping[str, Coverage]]) -> str:
    """Return a row for each kind of interval as a Markdown table."""
    columns = ["interval", *(f"n = {n}" for n in SIZES)]
    return format_rows(columns, [[name, *map(_format_cell, row.values())] for name, row in found.items()])


def _format_cell(found: Coverage) -> str:
    return f"{found.covered:.1%}" if found.given >= 0.5 else "–"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = make_parser(__doc__)
    parser.add_argument("--draws", type=int, default=DRAWS, help="samples drawn of each kind and size")
    options = parser.parse_args(argv)
    draws = FEW if options.smoke else options.draws
    found = {name: {str(n): measure_coverage(case, n, draws) for n in SIZES} for name, case in list_cases().items()}
    if options.json:
        print_report({name: {n: c._asdict() for n, c in row.items()} for name, row in found.items()}, as_json=True)
    else:
        print(format_table(found))


if __name__ == "__main__":
    main()
