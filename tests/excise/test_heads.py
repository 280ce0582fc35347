"""Head surgery: the right heads are chosen, only their columns change, and every executor does the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.executors import CLOSE, EXACT, EXECUTORS, RULES, directed, live, logits, opened, planned, unedited
from tests.support.pairwise import pairwise
from tests.support.plans import PlanMaker, random_basis
from tests.support.tiny import tiny_subject
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.norms import NormRule
from obliteratus.core.types import Edit, Plan, Site, Subject
from obliteratus.excise.bake.adapter import save_adapter
from obliteratus.excise.bake.tensors import bake
from obliteratus.excise.heads import attribute_to_heads
from obliteratus.excise.linear import UNIT_ROWS, edit_weight
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import load_plan, save_plan
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.summon.coverage import summarize_plan_coverage
from obliteratus.weights.matrices import read_weight

# square; 4 heads of 16 on a width of 48; Conv1D; biased and tied; behind a norm
CASES = ["llama", "mistral", "gpt2", "llama_biased", "gemma2"]
HEADS = 4


def on_heads(subject: Subject, share: float = 0.5, **options: Any) -> Plan:
    return planned(subject, directed(subject), heads=share, **options)


def attention(subject: Subject) -> list[Site]:
    return [s for s in subject.sites if s.part == "attn.out"]


def matrix(subject: Subject, site: Site) -> Tensor:
    return read_weight(subject.module(site.path), site)


def baked_matrix(subject: Subject, plan: Plan, site: Site) -> Tensor:
    stored: Tensor = bake(subject, plan)[f"{site.path}.weight"]()
    return stored.T if site.layout == "conv1d" else stored


# ------------------------------------------------------------------------------------ the mathematics
@pytest.mark.parametrize(("out", "size"), [(12, 3), (12, 7)])
def test_attribution_is_what_each_head_writes_along_the_directions(out: int, size: int) -> None:
    weight = torch.randn(out, HEADS * size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = random_basis(out, 2, 1, torch.float64)
    expected = []
    for head in range(HEADS):
        columns = [weight[:, head * size + j] for j in range(size)]
        expected.append(sum(float(row @ column) ** 2 for row in q for column in columns) ** 0.5)
    torch.testing.assert_close(attribute_to_heads(weight, q, HEADS), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("strength", [-0.5, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("rule", RULES)
def test_a_span_is_the_edit_of_its_columns_alone(rule: NormRule, strength: float) -> None:
    weight = torch.randn(10, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, before = random_basis(10, 2, 1, torch.float64), weight.clone()
    found = edit_weight(weight, q, strength, rule, (4, 9))
    part = before[:, 4:9]
    expected = part - strength * q.T @ (q @ part)
    if rule in ("columns", "rows"):
        dim = 0 if rule == "columns" else 1
        expected = expected * part.norm(dim=dim, keepdim=True) / expected.norm(dim=dim, keepdim=True)
    elif rule == "whole":
        expected = expected * part.norm() / expected.norm()
    elif rule in UNIT_ROWS:
        expected = edit_weight(part, q, strength, rule)  # test_linear.py has its definition
    torch.testing.assert_close(found[:, 4:9], expected)
    assert torch.equal(found[:, :4], before[:, :4])
    assert torch.equal(found[:, 9:], before[:, 9:])
    assert torch.equal(weight, before)


# ----------------------------------------------------------------------------------- which heads
@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
@pytest.mark.parametrize("name", CASES)
def test_the_heads_that_write_most_are_kept(name: str, share: float, count: int) -> None:
    subject = opened(name)
    whole, plan = planned(subject, directed(subject)), on_heads(subject, share)
    for site in attention(subject):
        weight, q = matrix(subject, site), next(e.basis for e in whole.edits if e.site == site)
        size = weight.shape[1] // HEADS
        taken = [float((q @ weight[:, h * size : (h + 1) * size]).norm()) for h in range(HEADS)]
        best = sorted(range(HEADS), key=lambda h: -taken[h])[:count]
        spans = [e.site.span for e in plan.edits if e.site.path == site.path]
        assert spans == [(h * size, (h + 1) * size) for h in sorted(best)]
    others = [e for e in plan.edits if e.site.part != "attn.out"]
    assert [e.site for e in others] == [e.site for e in whole.edits if e.site.part != "attn.out"]


def test_a_planted_head_is_found() -> None:
    subject = tiny_subject("gpt2")
    found = directed(subject)
    for site in attention(subject):
        weight = subject.module(site.path).weight.data  # [in, out]
        weight[16:24] += 5 * found.basis[site.stream][0]
    plan = planned(subject, found, heads=0.25, parts=("attn.out",))
    assert [e.site.span for e in plan.edits] == [(16, 24)] * subject.n_layers


# ------------------------------------------------------------------------------------ what changes
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CASES)
def test_other_heads_and_the_bias_keep_every_bit(name: str, rule: str) -> None:
    subject = opened(name)
    plan = on_heads(subject, 0.25, norm=rule, parts=("attn.out",))
    for edit in plan.edits:
        before, after = matrix(subject, edit.site), baked_matrix(subject, plan, edit.site)
        assert edit.site.span is not None
        inside = torch.zeros(before.shape[1], dtype=torch.bool)
        inside[slice(*edit.site.span)] = True
        assert torch.equal(after[:, ~inside], before[:, ~inside])
        assert (edit.basis @ before[:, inside]).norm() > 0.1
        if rule in EXACT:  # the others put some back
            assert (edit.basis @ after[:, inside]).norm() < 1e-5
        new = bake(subject, plan)
        if f"{edit.site.path}.bias" in new:
            assert torch.equal(new[f"{edit.site.path}.bias"](), subject.module(edit.site.path).bias)


@pytest.mark.parametrize("rule", ["none", "columns"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_all_heads_one_by_one_are_the_whole(name: str, rule: str) -> None:
    """Without a bias. The rules `rows` and `whole` look at more than a column, so there it makes a difference."""
    subject = opened(name)
    whole = live(subject, planned(subject, directed(subject), norm=rule))
    torch.testing.assert_close(live(subject, on_heads(subject, 1.0, norm=rule)), whole, **CLOSE)
    assert not torch.allclose(live(subject, on_heads(subject, 0.75, norm=rule)), whole, **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama_biased"])
def test_all_heads_leave_the_bias_that_the_whole_edit_takes(name: str) -> None:
    subject = opened(name)
    whole = planned(subject, directed(subject), parts=("attn.out",))
    heads = on_heads(subject, 1.0, parts=("attn.out",))
    assert not torch.allclose(live(subject, heads), live(subject, whole), **CLOSE)
    for site in attention(subject):
        torch.testing.assert_close(baked_matrix(subject, heads, site), baked_matrix(subject, whole, site), **CLOSE)


# ------------------------------------------------------------------------------- the executors agree
@pytest.mark.parametrize(("name", "rule", "executor"), pairwise(CASES, RULES, EXECUTORS))
def test_agrees_with_live(name: str, rule: str, executor: str, tmp_path: Path) -> None:
    subject = opened(name)
    plan, before = on_heads(subject, 0.5, norm=rule, strength=0.8), unedited(name)
    expected = live(subject, plan)
    torch.testing.assert_close(EXECUTORS[executor](subject, plan, tmp_path), expected, **CLOSE)
    assert not torch.allclose(expected, before, **CLOSE)
    whole = live(subject, planned(subject, directed(subject), norm=rule, strength=0.8))
    assert not torch.allclose(expected, whole, **CLOSE)
    assert torch.equal(logits(subject.model), before)


Parts = list[tuple[NormRule, tuple[int, int] | None]]
MIXED: dict[str, Parts] = {
    "whole, then a head": [("columns", None), ("none", (8, 16))],
    "a head, then whole": [("none", (8, 16)), ("columns", None)],
    "rules on both": [("columns", None), ("columns", (8, 16)), ("rows", (0, 8)), ("columns", None)],
    "rows between": [("whole", (0, 8)), ("rows", None), ("none", (0, 8)), ("columns", None)],
    "one head twice": [("rows", (8, 16)), ("columns", (8, 16))],
    "unit rows on both": [("columns", None), ("unit_rows", (8, 16)), ("unit_rows", None), ("columns", None)],
    "low rank on both": [("columns", None), ("unit_rows_rank_3", (8, 16)), ("unit_rows_rank_3", None)],
    "plain whole, then heads": [("none", None), ("rows", (0, 8)), ("none", (4, 12))],
}


def mixed(subject: Subject, parts: Parts, anchored: bool = False) -> Plan:
    edits = []
    for i, site in enumerate(attention(subject)):
        for j, (rule, span) in enumerate(parts):
            seed = 10 * i + j
            noise = torch.randn(subject.width, generator=torch.Generator().manual_seed(seed))
            anchor = noise if anchored and span is None else None
            basis = random_basis(subject.width, 2, seed)
            edits.append(Edit(replace(site, span=span), basis, 0.7 + 0.1 * j, rule, anchor))
    return Plan(tuple(edits), subject.source.digest)


@pytest.mark.parametrize(("name", "order", "executor"), pairwise(["mistral", "gpt2", "llama_biased"], MIXED, EXECUTORS))
def test_heads_and_whole_edits_mix(name: str, order: str, executor: str, tmp_path: Path) -> None:
    subject = opened(name)
    plan = mixed(subject, MIXED[order], anchored=name != "mistral")
    expected = live(subject, plan)
    torch.testing.assert_close(EXECUTORS[executor](subject, plan, tmp_path), expected, **CLOSE)
    for j in range(len(MIXED[order])):  # each of the edits counts
        rest = tuple(e for i, e in enumerate(plan.edits) if i % len(MIXED[order]) != j)
        assert not torch.allclose(live(subject, replace(plan, edits=rest)), expected, **CLOSE)


def test_a_saved_plan_keeps_its_heads(tmp_path: Path) -> None:
    subject = opened("gpt2")
    plan = on_heads(subject)
    save_plan(plan, tmp_path)
    found = load_plan(tmp_path)
    assert [e.site for e in found.edits] == [e.site for e in plan.edits]
    assert all(torch.equal(a.basis, b.basis) for a, b in zip(found.edits, plan.edits, strict=True))
    # the last bit follows where a tensor lies in memory, on some processors
    torch.testing.assert_close(live(subject, found), live(subject, plan), **CLOSE)


def test_an_adapter_has_a_rank_for_each_head(tmp_path: Path) -> None:
    subject = opened("llama")
    plan = on_heads(subject, 0.75, parts=("attn.out",))  # 3 heads of k = 2
    assert save_adapter(subject, plan, tmp_path) == {"rank": 6.0, "error": 0.0}


def test_coverage_counts_only_the_columns_of_edited_heads() -> None:
    subject = opened("mistral")
    shares = [
        summarize_plan_coverage(subject, on_heads(subject, s, parts=("attn.out",)))["edited_share"]
        for s in (0.25, 0.5, 1.0)
    ]
    whole = summarize_plan_coverage(subject, planned(subject, directed(subject), parts=("attn.out",)))["edited_share"]
    assert shares == pytest.approx([whole / 4, whole / 2, whole])
    assert 0 < whole < 1


# ----------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads: input should be greater than 0"),
        ({"heads": 1.5}, "heads: input should be less than or equal to 1"),
        ({"heads": 0.5, "anchored": True}, "excise: heads and anchored exclude each other"),
        ({"heads": 0.5, "parts": ["mlp.out"]}, r"excise: heads needs the part attn\.out"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("basic", {f"excise.{key}": value for key, value in options.items()})
    assert load_recipe("basic", {"excise.heads": 0.5}).excise.heads == 0.5


@pytest.mark.parametrize("span", [(-8, 8), (8, 8), (24, 33)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_span_that_does_not_exist(name: str, span: Any, make_plan: PlanMaker) -> None:
    subject = opened(name)
    plan = make_plan(subject, ("attn.out",))
    broken = replace(plan.edits[0], site=replace(plan.edits[0].site, span=span))
    with pytest.raises(UserError, match=r"the plan edits inputs .* which has 32; run the method again"):
        live(subject, replace(plan, edits=(broken,)))


def test_a_table_has_no_heads(make_plan: PlanMaker) -> None:
    subject = opened("llama")
    plan = make_plan(subject, ("embed",))
    broken = replace(plan.edits[0], site=replace(plan.edits[0].site, span=(0, 8)))
    with pytest.raises(UserError, match="which has 0"), applied(subject, replace(plan, edits=(broken,))):
        pass


def test_a_head_has_no_anchor(make_plan: PlanMaker) -> None:
    subject = opened("llama_biased")
    plan = make_plan(subject, ("attn.out",), anchored=True)
    broken = replace(plan.edits[0], site=replace(plan.edits[0].site, span=(0, 8)))
    with pytest.raises(UserError, match="an anchor needs the whole"):
        bake(subject, replace(plan, edits=(broken,)))
