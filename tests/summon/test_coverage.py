"""The table knows every matrix of every tiny model, and a plan's coverage says what it reaches."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.support.plans import PlanMaker
from tests.support.tiny import MODELS, tiny, tiny_subject

from obliteratus.summon.architectures import ARCHITECTURES
from obliteratus.summon.coverage import count_coverage, coverage_warning, summarize_plan_coverage
from obliteratus.summon.sites import find_architecture, find_sites

NAMES = sorted(MODELS)


@pytest.mark.parametrize("name", NAMES)
def test_coverage_is_whole(name: str) -> None:
    model = tiny(name)
    family = find_architecture(model.config)
    sites = find_sites(model, family)
    found = count_coverage(model, sites, family)
    assert found.writers == sum(model.get_parameter(s.parameter).numel() for s in sites if s.role == "writes")
    assert (found.share, found.paths, found.unclaimed) == (1.0, (), 0)
    eyes = ("lm_head", "model.vision", "model.visual", "model.multi_modal")
    backbone = [p for n, p in model.named_parameters() if p.ndim > 1 and not n.startswith(eyes) and "bias" not in n]
    assert found.writers + found.readers + found.inner == sum(p.numel() for p in backbone)
    assert found.to_dict()["share"] == 1.0


def test_unclaimed_matrices_are_named() -> None:
    model = tiny("llama")
    family = replace(ARCHITECTURES["llama"], writers={"mlp.out": ("mlp.down_proj", "linear")})
    found = count_coverage(model, find_sites(model, family), family)
    assert found.paths == tuple(f"model.layers.{i}.self_attn.o_proj.weight" for i in range(3))
    assert found.share < 1.0


def test_what_is_missed_is_a_warning() -> None:
    assert coverage_warning(1.0, 0) == ""
    assert coverage_warning(0.98, 3).startswith("the architecture table does not know 3 matrices, so only 98.0%")


def test_skipped_experts_are_told_with_a_reason(make_plan: PlanMaker) -> None:
    subject = tiny_subject("qwen2_moe")
    told = summarize_plan_coverage(subject, make_plan(subject, ("attn.out",)))["parts"]["expert.out"]
    assert (told["edited"], told["skipped_layers"]) == (0, [1])
    assert "not asked for" in told["why_skipped"]
    plan = make_plan(subject, ("expert.out",))
    assert summarize_plan_coverage(subject, plan)["parts"]["expert.out"] == {
        "found": 1,
        "edited": 1,
        "skipped_layers": [],
        "why_skipped": "",
    }
