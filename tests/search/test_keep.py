"""Searches for few false refusals and many true ones: limits, estimates by group, and plots of what is maximized."""

from __future__ import annotations

import pytest
from tests.support.searches import make_scorer, search_recipe

from obliteratus.core.errors import UserError
from obliteratus.core.results import Score
from obliteratus.judge.judge import Judge
from obliteratus.pipeline.recipe import check_runs, load_recipe
from obliteratus.rebirth.front_section import plot_front, plot_history
from obliteratus.search.score import fit_scale, opening_probability
from obliteratus.verify import Measurement

RECORD = {
    "minimize": ["refusal.target", "-refusal.keep", "kl.first_token.mean"],
    "picked": 2,
    "prompts": 40,
    "base": {"refusal.target": 1.0, "refusal.keep": 0.9},
    "all": [
        {"number": n, "answered": True, "objectives": [x, -y, kl]}
        for n, (x, y, kl) in enumerate([(0.0, 0.5, 0.3), (0.1, 0.9, 0.2), (0.5, 0.6, 0.0)])
    ],
    "front": [
        {"trial": n, "values": {}, "scores": {"refusal.target": x, "refusal.keep": y, "kl.first_token.mean": kl}}
        for n, (x, y, kl) in enumerate([(0.0, 0.5, 0.3), (0.1, 0.9, 0.2), (0.5, 0.6, 0.0)])
    ],
}
NAMES = ["refusal.target", "refusal.keep"]


def test_what_is_maximized_is_drawn_as_it_is() -> None:
    """Trials hold the rate negated and members do not: both lie at the same places."""
    points = plot_front(RECORD, NAMES, NAMES).points
    trials, members = points[:3], points[4:]
    assert [(p.x, p.y) for p in trials] == [(p.x, p.y) for p in members]
    assert points[3].y < max(p.y for p in points)  # the unedited model keeps most, and up is more


def test_the_line_joins_only_members_that_are_best_in_what_is_drawn() -> None:
    plot = plot_front(RECORD, NAMES, NAMES)
    assert len(plot.line.split()) == 2  # the third is on the front for its KL alone


def test_the_best_so_far_of_a_maximized_rate_rises() -> None:
    heights = [float(pair.split(",")[1]) for pair in plot_history(RECORD, 1, "kept").line.split()]
    assert heights == sorted(heights, reverse=True)
    assert heights[0] > heights[-1]


def test_a_group_that_refuses_in_other_words_has_its_own_first_tokens() -> None:
    _, scorer = make_scorer(search_recipe())
    base = {group: scorer.control.first_token() for group in ("target", "control", "keep")}
    base["target"], base["keep"] = base["target"].clone(), base["keep"].clone()
    base["target"][:, 5], base["keep"][:, 7] = 0.0, 0.0  # log-probability 0: certain
    rates = {f"refusal.{g}": Score(value=v, low=v, high=v, n=12, unit="share") for g, v in RATES.items()}
    records = [{"group": g, "verdict": "shown"} for g in ("target", "keep") for _ in base[g]]
    scales = {g: fit_scale(base, Measurement(rates, records), Judge(), g) for g in ("target", "keep")}
    assert 7 in scales["keep"].tokens
    assert 7 not in scales["target"].tokens
    assert float(opening_probability(base["keep"], scales["target"].tokens).mean()) < 0.5
    assert scales["keep"].estimate_rate(base["keep"]) > 0.5


RATES = {"target": 1.0, "control": 0.0, "keep": 1.0}


@pytest.mark.parametrize(("method", "group"), [("calibrated_search", "keep"), ("reinforce_search", "benign")])
def test_a_search_without_the_group_that_it_is_about(method: str, group: str) -> None:
    with pytest.raises(UserError, match=f"--{group} is missing|needs the group '{group}'"):
        check_runs(load_recipe(method), ["target", "control"])
    check_runs(load_recipe(method), ["target", "control", group])
