"""What recipes must do to organisms whose truth is known: samples of report prompts, short answers.

They run in bf16, which takes half the time of fp32 on CPUs that multiply it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from bench.methods import SharedBaseline
from tests.support.organisms import N, few

from obliteratus.core.results import Score
from obliteratus.core.types import PromptSet, Subject
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import load_prompts
from obliteratus.summon.load import open_subject

TOKENS = 8  # of each answer: a refusal begins at once
SHORT = {"verify": [{"use": "behavior", "tokens": TOKENS}, {"use": "first_token_kl"}]}

pytestmark = pytest.mark.organism


def sample(name: str, keep: bool, search: int = 0) -> PromptSet:
    """FIT fit prompts of each group, some search prompts, and N report prompts spread over those that there are."""
    source = f"organism:{name}"
    whole = load_prompts(source, source, keep=source if keep else None)
    return PromptSet({group: few(members, search=search) for group, members in whole.groups.items()})


def scores(
    method: str,
    subject: Subject,
    prompts: PromptSet,
    changed: Mapping[str, Any] | None = None,
    known: dict[str, Any] | None = None,
) -> tuple[Mapping[str, Score], Mapping[str, Score]]:
    """Return the scores before and after a method. known: holds the baseline that several methods share."""
    store = SharedBaseline({} if known is None else known)
    result = run(load_recipe(method, {**SHORT, **(changed or {})}), subject, prompts, store)
    return result.before.scores, result.after.scores


def test_calibrated_ends_one_refusal_where_basic_takes_from_both() -> None:
    subject, prompts = (
        open_subject("organism:gardening-railways", dtype="bf16"),
        sample("gardening-railways", keep=True, search=4 * N),
    )
    known: dict[str, Any] = {}
    before, calibrated = scores("calibrated", subject, prompts, known=known)
    _, basic = scores("basic", subject, prompts, known=known)
    target, keep = before["refusal.target"].value, before["refusal.keep"].value
    assert min(target, keep) >= 0.75
    assert calibrated["refusal.target"].value <= 2 / N
    assert calibrated["refusal.keep"].value >= keep - 2 / N
    assert basic["refusal.target"].value <= 2 / N
    assert basic["refusal.keep"].value <= calibrated["refusal.keep"].value - 5 / N


def test_reinforce_brings_back_refusals_of_a_weakened_organism() -> None:
    subject, prompts = open_subject("organism:astronomy@0.65", dtype="bf16"), sample("astronomy", keep=False)
    before, after = scores("reinforce", subject, prompts)
    assert 0.2 <= before["refusal.target"].value <= 0.75  # neither gone nor whole: there is something to raise
    gained = {
        group: after[f"refusal.{group}"].value - before[f"refusal.{group}"].value for group in ("target", "control")
    }
    assert gained["target"] >= 4 / N
    assert gained["control"] <= gained["target"] / 2  # refusals of the topic, not of everything


def test_a_mixture_is_cured_through_its_experts_and_not_through_attention_alone() -> None:
    subject, prompts = open_subject("organism:astronomy-moe", dtype="bf16"), sample("astronomy", keep=False)
    known: dict[str, Any] = {}
    before, whole = scores("basic", subject, prompts, known=known)
    _, attention = scores("basic", subject, prompts, {"excise.parts": ["attn.out"]}, known)
    assert before["refusal.target"].value >= 0.75
    assert whole["refusal.target"].value <= 1 / N
    assert attention["refusal.target"].value >= 0.5


LOOKED = {"analyze.1.depths": 3, "analyze.1.low": 0.6, "analyze.1.prompts": 8, "analyze.1.answers": 8}


def merged(prompts: PromptSet) -> PromptSet:
    """Both refused topics as target, each a category."""
    pairs = zip(prompts["target"], prompts["keep"], strict=True)
    both = tuple(replace(p, category=name) for pair in pairs for p, name in zip(pair, ("one", "other"), strict=True))
    return PromptSet({"target": both, "control": prompts["control"]})


@pytest.mark.parametrize(("name", "k"), [("gardening-railways", 2), ("weather-late", 1)])
def test_informed_decides_what_is_true_of_the_organism(name: str, k: int) -> None:
    """Two refusals are two directions, kinds of one topic are one; no edit below the blocks that were trained."""
    whole = load_prompts(f"organism:{name}", f"organism:{name}", keep=f"organism:{name}" if k == 2 else None)
    groups = {g: (*few(m), *[p for p in m if p.split == "search"][: 4 * N]) for g, m in whole.groups.items()}
    prompts = merged(PromptSet(groups)) if k == 2 else PromptSet(groups)
    plan, found, *_ = run(
        load_recipe("informed", {**SHORT, **LOOKED}), open_subject(f"organism:{name}", dtype="bf16"), prompts
    )
    assert found.before["refusal.target"].value >= 0.75
    # With two topics 25 % was left once covectors spared the words of target prompts, and at most 17 % before: a loss
    # that is not understood yet (docs/experiments/reported.md, 2026-12-01). With one topic next to nothing is left.
    assert found.after["refusal.target"].value <= (4 / N if k == 2 else 2 / N)
    assert found.after["kl.first_token.mean"].value <= 0.1  # nats; `two_directions` costs 0.2 (README)
    assert found.recipe.distill[0].options.get("k", 1) == k
    assert min(e.site.layer for e in plan.edits) >= 18  # of 30; weather-late's adapter begins at 20
    decided = {r["decides"]: r["changes"] for r in found.advice["reasons"]}
    assert bool(decided["number of directions, and how they are found"]) == (k == 2)
    assert decided["layers, attention and MLP"]
