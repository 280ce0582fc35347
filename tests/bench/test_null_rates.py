"""Draws of meaningless labels: nothing is shared between groups, claims are read off findings, and a level holds."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from bench.null_rates import GROUPS, Sizes, Source, claims_something, make_random_model, measure_rate, run_draw
from tests.support.tiny import tiny_tokenizer

from obliteratus.analyze import analyses
from obliteratus.core.types import Prompt

SIZES = Sizes(pool=96, fit=26, held_out=16, models=1)
LONG = {
    "cones",
    "entanglement",
    "reach",
    "repair",
    "transfer",
}  # 200 draws take up to minutes; docs/experiments/null-rates.md has their rates


@cache
def source() -> Source:
    """A random model, and prompts of random letters."""
    letters = torch.randint(97, 123, (SIZES.pool, 12), generator=torch.Generator().manual_seed(0)).tolist()
    return Source(make_random_model(0, tiny_tokenizer()), tuple(Prompt(bytes(row).decode()) for row in letters))


def test_a_draw_shares_no_prompt_between_groups_and_parts() -> None:
    context = source().draw(SIZES, 3)
    texts = [p.text for prompts in (context.prompts, context.held_out) for g in GROUPS for p in prompts[g]]
    assert len(texts) == len(set(texts)) == 2 * (26 + 16)
    rows = context.activations["control"].rows
    assert rows is not None
    index = [p.text for p in source().prompts].index(context.prompts["control"][5].text)
    assert torch.equal(rows[5], source().rows[index])
    other = source().draw(SIZES, 4)
    assert {p.text for p in other.prompts["target"]} != {p.text for p in context.prompts["target"]}


@pytest.mark.parametrize(
    ("numbers", "claims"),
    [
        ({"found": [], "found_heads": []}, False),
        ({"found": [], "found_heads": ["block 0 head 1"]}, True),
        ({"found": False}, False),
        ({"found": True}, True),
        ({"unusual": {"width": [], "kurtosis": []}}, False),
        ({"unusual": {"width": [3], "kurtosis": []}}, True),
        ({"found": [], "sparse": ["w"]}, True),
    ],
)
def test_claims_are_read_off_findings(numbers: dict[str, object], claims: bool) -> None:
    assert claims_something(numbers) is claims


@pytest.mark.parametrize("name", [*analyses, "transfer"])
def test_every_analysis_has_a_draw(name: str) -> None:
    assert run_draw(name, source(), SIZES, 0) in (True, False)


@pytest.mark.parametrize("name", [name for name in (*analyses, "transfer") if name not in LONG])
def test_meaningless_labels_are_found_no_more_often_than_the_level(name: str) -> None:
    rate = measure_rate(name, [source], SIZES, 200)
    assert round(rate.value * rate.n) <= 21  # the binomial's 99.9 % point
