"""Every kind of architecture runs from end to end: probed, edited, measured, saved, loaded again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.plans import PlanMaker
from tests.support.tiny import EOS, MODELS, PAD, tiny_subject

from obliteratus.core.errors import NothingMatchedError, UserError
from obliteratus.core.settings import expand_part
from obliteratus.core.types import Plan, Prompt, PromptSet
from obliteratus.excise.bake.tensors import bake
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.live.hooks_per_row import applied_per_row
from obliteratus.inference.generate import generate
from obliteratus.inference.logits import first_token_log_probs
from obliteratus.inference.shared_prefix import is_recurrent
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.rebirth.save import save
from obliteratus.summon.architectures import ARCHITECTURES
from obliteratus.weights.matrices import expand_experts

KINDS = [
    "mixtral",
    "deepseek_v2",
    "gpt_oss",
    "qwen3_next",
    "granitemoehybrid",
    "lfm2_moe",
    "jamba",
    "falcon_h1",
    "nemotron_h",
    "gemma4_text",
    "gemma3",
    "qwen3_vl",
]
EXPERTS = [
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "granitemoehybrid",
    "jamba",
    "lfm2_moe",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
]
IDS = [[256, *range(10, 10 + n)] for n in (9, 14, 9, 6)]


def test_every_family_has_a_tiny_model() -> None:
    assert {model_type for model_type, _ in MODELS.values()} == set(ARCHITECTURES)


def test_every_stack_of_experts_is_tried() -> None:
    assert [name for name in sorted(MODELS) if any(site.stacked for site in tiny_subject(name).sites)] == EXPERTS


@pytest.fixture(scope="module")
def groups() -> PromptSet:
    target = [
        f"Tell me about {x}."
        for x in [
            "stars",
            "moons",
            "comets",
            "suns",
            "planets",
            "dust",
            "rings",
            "orbits",
            "mars",
            "venus",
            "io",
            "pluto",
            "titan",
            "novae",
        ]
    ]
    control = [
        f"How do I cook {x}?"
        for x in [
            "rice",
            "soup",
            "eggs",
            "peas",
            "bread",
            "fish",
            "beans",
            "corn",
            "leeks",
            "oats",
            "plums",
            "figs",
            "kale",
            "dates",
        ]
    ]
    return PromptSet({"target": tuple(map(Prompt, target)), "control": tuple(map(Prompt, control))})


@pytest.mark.parametrize("name", KINDS)
def test_a_run_ends_in_a_model_that_answers_as_measured(name: str, groups: PromptSet, tmp_path: Path) -> None:
    subject = tiny_subject(name)
    made = load_recipe(
        "basic",
        {"excise": {"norm": "columns"}, "verify": [{"use": "behavior", "tokens": 4}, {"use": "first_token_kl"}]},
    )
    plan, found, *_ = run(made, subject, groups, force=True)
    saved = save(subject, plan, found, tmp_path / "out", prompts=groups)
    assert saved.saved["rescore"]["max_kl"] < 1e-5
    assert found.coverage["warning"] == ""
    parts = {site.part for site in subject.sites if site.role == "writes"} - {"embed"}
    assert {part for part, told in found.coverage["parts"].items() if told["edited"]} == parts


@pytest.mark.parametrize("name", [n for n in KINDS if ARCHITECTURES[MODELS[n][0]].recurrent])
def test_answers_with_recurrent_states_are_the_librarys_own(name: str) -> None:
    subject = tiny_subject(name)
    assert is_recurrent(subject)
    with torch.inference_mode():
        alone = [
            subject.model.generate(torch.tensor([row]), max_new_tokens=6, do_sample=False, pad_token_id=PAD)
            for row in IDS
        ]
    ends = [row[0, len(ids) :].tolist() for row, ids in zip(alone, IDS, strict=True)]
    assert generate(subject, IDS, 6) == [row[: row.index(EOS)] if EOS in row else row for row in ends]


@pytest.mark.parametrize("name", EXPERTS)
def test_each_expert_can_lose_something_else(name: str, make_plan: PlanMaker) -> None:
    """Live without a copy of the stack, and baked: the same; and no other expert is touched."""
    subject = tiny_subject(name)
    whole = [e for e in make_plan(subject, ("expert.out",)).edits if e.site.stacked][:1]
    own = [replace(e, site=one) for e in whole for one in expand_experts(subject.module(e.site.path), e.site)[1:3]]
    other = make_plan(subject, ("expert.out",), seed=1).edits[0]
    plan = Plan((own[0], replace(own[1], basis=other.basis)), subject.source.digest)
    with applied(subject, plan):
        live = first_token_log_probs(subject, IDS)
    before = first_token_log_probs(subject, IDS)
    for key, value in bake(subject, plan).items():
        old, new = subject.model.get_parameter(key), value()
        assert [torch.equal(a, b) for a, b in zip(old, new, strict=True)] == [True, False, False, True]
        old.data = new
    torch.testing.assert_close(first_token_log_probs(subject, IDS), live, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(live, before, atol=1e-4)


@pytest.mark.parametrize("norm", ["none", "columns"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_rows_under_different_plans_of_experts(name: str, norm: str, make_plan: PlanMaker) -> None:
    subject = tiny_subject(name)
    plans = [make_plan(subject, norm=norm, seed=seed) for seed in (0, 1)]
    of_row = [0, 1, 1, 0]
    with applied_per_row(subject, plans, of_row):
        together = first_token_log_probs(subject, IDS)
    for row, i in enumerate(of_row):
        with applied(subject, plans[i]):
            torch.testing.assert_close(together[row], first_token_log_probs(subject, IDS)[row], rtol=1e-4, atol=1e-4)


def test_a_part_that_is_not_there_is_an_error(groups: PromptSet) -> None:
    quick = {"verify": [{"use": "first_token_kl"}]}
    with pytest.raises(NothingMatchedError, match=r"'expert\.out' names no part"):
        run(
            load_recipe("basic", {**quick, "excise": {"parts": ["expert.out"]}}),
            tiny_subject("llama"),
            groups,
            force=True,
        )
    assert expand_part("mlp.out") == ("mlp.out", "expert.out", "shared.out")


def test_experts_whose_weights_do_not_sum_to_one_bake_no_anchor(make_plan: PlanMaker) -> None:
    subject = tiny_subject("gpt_oss")
    plan = make_plan(subject, ("expert.out",), anchored=True)
    bake(subject, plan)
    subject = tiny_subject("mixtral")
    with pytest.raises(UserError, match=r"needs a bias and .*experts has none"):
        bake(subject, make_plan(subject, ("expert.out",), anchored=True))


def test_reading_experts_cannot_be_edited_apart(make_plan: PlanMaker) -> None:
    subject = tiny_subject("mixtral")
    edit = next(e for e in make_plan(subject, ("mlp.in",)).edits if e.site.stacked)
    one = replace(edit, site=replace(edit.site, expert=1))
    with (
        pytest.raises(UserError, match=r"experts is a reader; .*single experts apply only to writers"),
        applied(subject, Plan((one,), subject.source.digest)),
    ):
        pass
