"""Parts that do nothing: a writer's outputs at zero, in whole or in part, alike in every executor."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.executors import CLOSE, EXECUTORS, NAMES, live, logits, opened, unedited
from tests.support.pairwise import pairwise
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.types import Change, Mask, Plan, Site, Subject, ZeroOutput
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import load_plan, save_plan
from obliteratus.summon.coverage import summarize_plan_coverage

CASES = ["llama", "gpt2", "gemma2", "llama_biased", "qwen2"]


def sites(subject: Subject, part: str) -> list[Site]:
    return [s for s in subject.sites if s.part == part]


def plan_of(subject: Subject, *changes: Change) -> Plan:
    return Plan(changes, subject.source.digest)


@pytest.mark.parametrize(
    ("name", "executor", "part", "outputs"),
    pairwise(CASES, EXECUTORS, ["attn.out", "mlp.out"], [None, torch.tensor([0, 7, 30])]),
)
def test_executors_agree(name: str, executor: str, part: str, outputs: Tensor | None, tmp_path: Path) -> None:
    subject = opened(name)
    plan = plan_of(subject, ZeroOutput(sites(subject, part)[1], outputs))
    expected = live(subject, plan)
    torch.testing.assert_close(EXECUTORS[executor](subject, plan, tmp_path), expected, **CLOSE)
    assert not torch.allclose(unedited(name), expected, **CLOSE)


@pytest.mark.parametrize("executor", [e for e in EXECUTORS if e != "adapter"])
@pytest.mark.parametrize("expert", [None, 1])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_fall_silent_one_or_all(name: str, expert: int | None, executor: str, tmp_path: Path) -> None:
    subject = opened(name)
    site = replace(next(s for s in subject.sites if s.part == "expert.out"), expert=expert)
    plan = plan_of(subject, ZeroOutput(site))
    expected = live(subject, plan)
    torch.testing.assert_close(EXECUTORS[executor](subject, plan, tmp_path), expected, **CLOSE)
    assert not torch.allclose(unedited(name), expected, **CLOSE)


def test_what_is_silent_puts_out_nothing_not_even_its_bias() -> None:
    subject = opened("llama_biased")
    site = sites(subject, "mlp.out")[0]
    seen: list[Tensor] = []
    with applied(subject, plan_of(subject, ZeroOutput(site))):
        handle = subject.module(site.path).register_forward_hook(lambda m, a, y: seen.append(y))
        logits(subject.model)
        handle.remove()
    assert not seen[0].any()


def test_coordinates_of_the_embeddings_are_zero_where_the_stream_begins() -> None:
    """OPT adds positions: both tables lose the coordinates."""
    subject = opened("opt")
    dims = torch.tensor([1, 2])
    plan = plan_of(subject, *(ZeroOutput(s, dims) for s in sites(subject, "embed")))
    streams: list[Tensor] = []
    handle = subject.module(f"{subject.layers}.0").register_forward_pre_hook(
        lambda m, a, k: streams.append(a[0] if a else k["hidden_states"]), with_kwargs=True
    )
    live(subject, plan)
    logits(subject.model)
    handle.remove()
    assert not streams[0][..., dims].any()
    assert streams[1][..., dims].any()
    rest = torch.ones(subject.width).index_fill(0, dims, 0).bool()
    assert torch.equal(streams[0][..., rest], streams[1][..., rest])


@pytest.mark.parametrize("name", NAMES)
def test_a_block_whose_writers_are_silent_passes_the_stream_on(name: str) -> None:
    subject = opened(name)
    mine = [s for s in subject.sites if s.layer == 1 and s.role == "writes"]
    plan = plan_of(subject, *map(ZeroOutput, mine))
    found: list[Tensor] = []
    block = subject.module(f"{subject.layers}.1")
    handles = [
        block.register_forward_pre_hook(
            lambda m, a, k: found.append((a[0] if a else k["hidden_states"]).clone()), with_kwargs=True
        ),
        block.register_forward_hook(lambda m, a, y: found.append(y[0] if isinstance(y, tuple) else y)),
    ]
    live(subject, plan)
    logits(subject.model)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found[1], found[0])
    assert not torch.allclose(found[3], found[2])


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_heads_are_silenced_by_what_they_give_to_the_output_matrix(name: str, executor: str, tmp_path: Path) -> None:
    subject = opened(name)
    site = sites(subject, "attn.out")[0]
    size = 16 if name == "mistral" else 8  # mistral's heads are wider than width / heads
    plan = plan_of(subject, Mask(site, torch.arange(size, 2 * size)))
    expected = live(subject, plan)
    torch.testing.assert_close(EXECUTORS[executor](subject, plan, tmp_path), expected, **CLOSE)
    model = copy.deepcopy(subject.model)
    own = model.get_submodule(site.path)
    columns = own.weight if name == "gpt2" else own.weight.T
    with torch.no_grad():
        columns[size : 2 * size] = 0
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert not torch.allclose(unedited(name), expected, **CLOSE)


def test_plans_are_kept_and_checked(tmp_path: Path) -> None:
    subject = opened("llama")
    attn, mlp = sites(subject, "attn.out")[0], sites(subject, "mlp.out")[1]
    plan = plan_of(subject, ZeroOutput(attn), ZeroOutput(mlp, torch.tensor([3])), Mask(attn, torch.tensor([5])))
    save_plan(plan, tmp_path)
    torch.testing.assert_close(live(subject, load_plan(tmp_path)), live(subject, plan))
    assert (
        0
        < summarize_plan_coverage(subject, plan_of(subject, ZeroOutput(mlp, torch.tensor([3]))))["edited_share"]
        < 0.01
    )
    for wrong in (ZeroOutput(mlp, torch.tensor([32])), Mask(attn, torch.tensor([32])), Mask(attn, torch.tensor([-1]))):
        with pytest.raises(UserError, match="does not have"):
            live(subject, plan_of(subject, wrong))
