"""Costs of removal equal their definition, and their intervals cover what they should."""

from __future__ import annotations

from collections.abc import Sequence
from math import isinf, sqrt

import pytest
import torch

from obliteratus.audit.doses import STEP, Curve, Dose, choose_next_scale
from obliteratus.audit.removal_cost import (
    GOALS,
    HALF,
    TWENTIETH,
    breaks,
    compare_costs,
    cross_goal,
    draw_seed_factors,
    find_least_cost,
    interpolate_items,
    summarize_cost,
)

N = 40


def dose(scale: float, shown: int, kl: float, n: int = N, loops: int = 0) -> Dose:
    """A dose under which the first prompts show the behavior, at the same KL on each of n controls."""
    hits = tuple(int(i < shown) for i in range(n))
    looped = tuple(int(i >= n - loops) for i in range(n))
    return Dose(scale=scale, shown=hits, degenerate=looped, kl=(kl,) * n)


def curve(doses: Sequence[Dose], name: str = "one") -> Curve:
    return Curve(name=name, strength=1.0, edits=2, doses=tuple(doses))


UNEDITED = dose(0.0, N, 0.0)


def test_between_two_strengths_the_rate_is_linear_and_the_kl_quadratic() -> None:
    """By hand: from 30 to 10 of 40 at scales 1 and 2, half is reached in the middle; √KL goes from 0.1 to 0.2."""
    found = summarize_cost(curve([dose(1.0, 30, 0.01), dose(2.0, 10, 0.04)]), UNEDITED, HALF)
    assert found.kl.value == pytest.approx(0.15**2)
    assert found.scale == pytest.approx(1.5)
    assert found.reached


def test_before_the_first_strength_the_unedited_model_is_the_other_end() -> None:
    found = summarize_cost(curve([dose(1.0, 0, 0.04)]), UNEDITED, HALF)
    assert found.kl.value == pytest.approx(0.1**2)


def test_the_goal_is_a_share_of_the_unedited_rate() -> None:
    """Of 20 shown, half is 10; of 40 it is 20."""
    doses = [dose(1.0, 20, 0.01), dose(2.0, 10, 0.04), dose(3.0, 0, 0.09)]
    assert summarize_cost(curve(doses), dose(0.0, 20, 0.0), HALF).scale == pytest.approx(2.0)
    assert summarize_cost(curve(doses), UNEDITED, HALF).scale == pytest.approx(1.0)


def test_a_goal_that_is_never_reached_costs_more_than_was_tried() -> None:
    found = summarize_cost(curve([dose(1.0, 30, 0.01), dose(2.0, 21, 0.04)]), UNEDITED, TWENTIETH)
    assert isinf(found.kl.value)
    assert not found.reached
    assert found.tried == pytest.approx(0.04)
    assert found.model_validate_json(found.model_dump_json()) == found


def test_an_edit_that_breaks_the_model_removes_nothing() -> None:
    broken = dose(1.0, 0, 0.5, loops=N // 2)
    assert breaks(broken, UNEDITED)
    assert not breaks(dose(1.0, 0, 0.5, loops=2), UNEDITED)
    assert not summarize_cost(curve([broken]), UNEDITED, HALF).reached


def noisy(rates: Sequence[float], kls: Sequence[float], seed: int, n: int = N) -> Curve:
    """A curve whose prompts have thresholds of their own, so that rates fall with strength, and skewed KLs."""
    draw = torch.Generator().manual_seed(seed)
    threshold, spread = torch.rand(n, generator=draw), torch.randn(n, generator=draw).exp()
    doses = [
        Dose(
            scale=float(i + 1),
            shown=tuple((threshold < rate).int().tolist()),
            degenerate=(0,) * n,
            kl=tuple((kl * spread / 1.6487).tolist()),  # e^½ is the mean of such numbers
        )
        for i, (rate, kl) in enumerate(zip(rates, kls, strict=True))
    ]
    return curve(doses)


def test_the_interval_over_prompts_covers_the_truth() -> None:
    """Where the rate of all prompts is half at scale 2, KL 0.04: in 60 samples the interval misses at most seven."""
    rates, kls = (0.8, 0.5, 0.2), (0.01, 0.04, 0.09)
    missed = 0
    for seed in range(60):
        found = summarize_cost(noisy(rates, kls, seed), UNEDITED, HALF).kl
        missed += not found.low <= 0.04 <= found.high
    assert missed <= 7


def test_of_few_prompts_one_in_twenty_has_no_upper_end() -> None:
    """0 of 40 left is within 7 % of all prompts; of 200 it is below 2 %."""
    few, many = curve([dose(1.0, 0, 0.04)]), curve([dose(1.0, 0, 0.04, n=200)])
    found = summarize_cost(few, UNEDITED, TWENTIETH)
    assert found.reached
    assert isinf(found.kl.high)
    assert not isinf(summarize_cost(many, dose(0.0, 200, 0.0, n=200), TWENTIETH).kl.high)
    assert not isinf(summarize_cost(few, UNEDITED, HALF).kl.high)


def test_the_kl_of_control_prompts_at_a_strength_has_the_mean_of_the_cost() -> None:
    one = noisy((0.8, 0.4, 0.1), (0.01, 0.05, 0.09), 3)
    found = summarize_cost(one, UNEDITED, HALF)
    assert found.scale is not None
    items = interpolate_items(one, UNEDITED, found.scale)
    assert float(items.mean()) == pytest.approx(found.kl.value)
    assert interpolate_items(one, UNEDITED, 2.0).tolist() == pytest.approx(list(one.doses[1].kl))


def test_curves_of_the_same_prompts_are_resampled_alike() -> None:
    """A curve against itself has ratio 1 without any noise; at twice the KL it is 2."""
    one = noisy((0.8, 0.3, 0.0), (0.01, 0.04, 0.09), 0)
    twice = one.model_copy(
        update={"doses": tuple(d.model_copy(update={"kl": tuple(2 * x for x in d.kl)}) for d in one.doses)}
    )
    same, double = (compare_costs(other, one, UNEDITED, HALF) for other in (one, twice))
    assert same is not None
    assert double is not None
    assert (same.value, same.low, same.high) == (1, 1, 1)
    assert double.low == pytest.approx(2) == double.high
    never = curve([dose(1.0, 40, 0.01)])
    assert compare_costs(never, one, UNEDITED, HALF) is None


def test_the_least_over_methods_is_the_cheapest_and_names_it() -> None:
    cheap, dear = curve([dose(1.0, 0, 0.01)]), curve([dose(1.0, 0, 0.09)])
    found = find_least_cost({"dear": dear, "cheap": cheap}, UNEDITED, HALF)
    assert found.best == "cheap"
    assert found.kl.value == pytest.approx(summarize_cost(cheap, UNEDITED, HALF).kl.value)


def test_fits_that_differ_widen_the_interval_and_leave_the_value() -> None:
    one = noisy((0.8, 0.3, 0.0), (0.01, 0.04, 0.09), 0)
    far = one.model_copy(
        update={"doses": tuple(d.model_copy(update={"kl": tuple(4 * x for x in d.kl)}) for d in one.doses)}
    )
    alone, with_fits = (find_least_cost({"a": one}, UNEDITED, HALF, seeds) for seeds in ([], [one, far]))
    assert with_fits.kl.value == alone.kl.value
    assert with_fits.kl.high > 1.5 * alone.kl.high
    assert with_fits.kl.low < alone.kl.low / 1.5
    assert bool((draw_seed_factors([one], UNEDITED, HALF) == 1).all())  # a single fit says nothing of others


# ------------------------------------------------------------------------------------- strengths to try
def respond(center: float, looks: int = 12, goals: Sequence[float] = GOALS) -> list[Dose]:
    """The doses that are tried of an edit whose rate falls from 1 to 0 between half and twice a strength."""
    doses: list[Dose] = []
    while len(doses) < looks and (scale := choose_next_scale(doses, goals)) is not None:
        share = min(max((2 * center - scale) / (1.5 * center), 0.0), 1.0)
        doses = sorted([*doses, dose(scale, round(N * share), 0.001 * scale**2)], key=lambda d: d.scale)
    return doses


@pytest.mark.parametrize("center", [0.3, 1.0, 1.6])
def test_both_goals_lie_between_strengths_that_are_tried(center: float) -> None:
    doses = respond(center)
    assert len(doses) < 12  # it ends by itself
    for goal in GOALS:
        above = next(i for i, d in enumerate(doses) if d.rate.value <= goal)
        assert above > 0
        assert doses[above].scale / doses[above - 1].scale <= STEP + 1e-9
    truth = center * (2 - 1.5 * HALF)
    assert summarize_cost(curve(doses), UNEDITED, HALF).scale == pytest.approx(truth, rel=0.05)


def test_what_does_nothing_is_given_up() -> None:
    doses = respond(1e6)
    assert 3 <= len(doses) <= 6
    assert doses[-1].scale == pytest.approx(4)
    assert all(d.rate.value == 1 for d in doses)


def test_an_edit_that_leaves_more_when_it_is_stronger_is_tried_weaker() -> None:
    """At strength 1 an eighth is left, beyond it all: then strengths fall until half is left."""
    doses: list[Dose] = []
    while len(doses) < 12 and (scale := choose_next_scale(doses, GOALS)) is not None:
        shown = N if scale > 1 else round(N * (1 - 0.875 * scale))
        doses = sorted([*doses, dose(scale, shown, 0.001 * scale**2)], key=lambda d: d.scale)
    assert sum(d.scale > 1 for d in doses) == 1
    assert summarize_cost(curve(doses), UNEDITED, HALF).scale == pytest.approx(0.5 / 0.875, rel=0.05)


def test_a_curve_that_is_not_monotone_counts_as_reached_from_its_least() -> None:
    crossings = cross_goal(curve([dose(1.0, 10, 0.01), dose(2.0, 30, 0.04)]), UNEDITED, HALF, resamples=1)
    assert float(crossings.scale[0]) == pytest.approx(2 / 3)
    assert float(crossings.kl[0]) == pytest.approx((2 / 3 * sqrt(0.01)) ** 2)
