"""A study's claims over all parts: none in 19 of 20 studies without any effect, and planted parts are found."""

from __future__ import annotations

import pytest
import torch
from tests.support.studies import make_measured, make_refusal_results
from torch import Tensor

from obliteratus.study.significance import find_changed_parts

PARTS, DRAWS = 40, 200
MOST = 21  # of 200 at a level of 0.05: the binomial's 99.9 % point


def idle_parts(kind: str, seed: int) -> Tensor:
    """Sixteen items that no part changes one way more often than the other; parts have items in common."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(16, PARTS, generator=generator) + 2 * torch.randn(16, 1, generator=generator)
    return rows.double() if kind == "losses" else rows.div(2).round().clamp(-1, 1).double()


@pytest.mark.parametrize(("kind", "metric"), [("losses", "perplexity"), ("shares", "refusal.target")])
def test_studies_without_any_effect_claim_nothing(kind: str, metric: str) -> None:
    claims = alone = 0
    for seed in range(DRAWS):
        rows = idle_parts(kind, seed)
        changed = find_changed_parts(make_measured(rows, metric), metric)
        assert changed is not None
        claims += bool(changed.worse or changed.better)
        t = rows.mean(0) / (rows.std(0) / 4).clamp(min=1e-9)
        alone += bool((t.abs() > 2.13).any())  # Student's 95 % interval of a part by itself
    assert claims <= MOST
    assert alone > 2 * MOST  # what counting intervals would claim


def test_planted_parts_are_found_and_only_they() -> None:
    rows = idle_parts("losses", 0)
    rows[:, 3] += 6
    rows[:, 7] += 9
    rows[:, 11] -= 8
    changed = find_changed_parts(make_measured(rows), "perplexity")
    assert changed is not None
    assert [r.component for r in changed.worse] == ["part 7", "part 3"]
    assert [r.component for r in changed.better] == ["part 11"]
    assert (changed.parts, changed.items) == (PARTS, 16)


def test_a_fall_of_refusals_is_damage() -> None:
    rows = torch.zeros(16, 3).double()
    rows[:12, 1] = -1  # twelve of sixteen prompts are no longer refused
    changed = find_changed_parts(make_measured(rows, "refusal.target"), "refusal.target")
    assert changed is not None
    assert [r.component for r in changed.worse] == ["part 1"]


def test_what_cannot_be_tested_is_not() -> None:
    assert find_changed_parts(make_refusal_results(), "refusal.target") is None  # results of earlier versions
    rows = torch.ones(16, 3).double()
    assert find_changed_parts(make_measured(rows, "kl.first_token"), "kl.first_token") is None
