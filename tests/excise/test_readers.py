"""Edits of what a matrix reads: equal to removing the direction from the stream before the norm, on every side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.executors import CLOSE, EXECUTORS, NAMES, directed, live, logits, opened, planned, unedited
from tests.support.pairwise import pairwise
from tests.support.plans import random_basis
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.types import Directions, Edit, Plan, Site, Subject
from obliteratus.excise.bake.tensors import bake
from obliteratus.excise.linear import center_rows, edit_reader, fold_gain_reader
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import load_plan, save_plan
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.summon.coverage import summarize_plan_coverage

READERS = ("attn.in", "mlp.in")
CASES = ["llama", "llama_biased", "gemma2", "olmo2", "phi3", "gpt2", "gpt_neox", "opt"]


def readers(subject: Subject, found: Directions, **options: Any) -> Plan:
    return planned(subject, found, **({"parts": READERS} | options))


# ---------------------------------------------------------------------------------------- the mathematics
@pytest.mark.parametrize("strength", [-0.5, 0.7, 1.0, 2.0])
def test_a_reader_is_its_definition(strength: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 10, generator=generator, dtype=torch.float64)
    q, gain = random_basis(10, 2, 1, torch.float64), 0.2 + torch.rand(10, generator=generator, dtype=torch.float64)
    along, basis = fold_gain_reader(q, q, gain)
    torch.testing.assert_close(along @ basis.T, torch.eye(2).double())
    x = torch.randn(5, 10, generator=generator, dtype=torch.float64)
    expected = (gain * (x - strength * x @ q.T @ q)) @ weight.T
    torch.testing.assert_close((gain * x) @ edit_reader(weight, basis, strength, along).T, expected)
    naive = (gain * x) @ edit_reader(weight, q, strength).T  # negative control: the gain forgotten
    assert (naive - expected).norm() > 0.05 * expected.norm()
    swapped = (gain * x) @ edit_reader(weight, along, strength, basis).T
    assert (swapped - expected).norm() > 0.05 * expected.norm()


def test_a_gain_of_zero_hides_its_coordinate() -> None:
    gain = torch.tensor([0.0, 1.0, 2.0])
    along, basis = fold_gain_reader(torch.ones(1, 3) / 3**0.5, torch.ones(1, 3) / 3**0.5, gain)
    assert torch.isfinite(along).all()
    assert along[0, 0] == basis[0, 0] == 0


def test_centered_rows_have_no_mean_and_span_the_same_centered_space() -> None:
    rows = random_basis(12, 3, 0, torch.float64)
    found = center_rows(rows)
    assert found.mean(1).abs().max() < 1e-12
    torch.testing.assert_close(found @ found.T, torch.eye(3).double())
    rest = rows - rows.mean(1, keepdim=True)
    torch.testing.assert_close(rest @ found.T @ found, rest)
    assert len(center_rows(torch.ones(1, 12).double() / 12**0.5)) == 0


# ------------------------------------------------------------------------------------------ on tiny models
@pytest.mark.parametrize(("name", "executor", "strength"), pairwise(CASES, EXECUTORS, [-0.5, 1.0]))
def test_executors_agree(name: str, executor: str, strength: float, tmp_path: Path) -> None:
    subject = opened(name)
    plan = readers(subject, directed(subject), strength=strength)
    expected = live(subject, plan)
    torch.testing.assert_close(EXECUTORS[executor](subject, plan, tmp_path), expected, **CLOSE)
    assert not torch.allclose(unedited(name), expected, **CLOSE)


@pytest.mark.parametrize("executor", ["baked", "reloaded"])
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "nemotron_h", "deepseek_v2", "qwen3_next"])
def test_what_experts_and_routers_read(name: str, executor: str, tmp_path: Path) -> None:
    subject = opened(name)
    plan = readers(subject, directed(subject), parts=("mlp.in", "router"), strength=0.8)
    assert {e.site.part for e in plan.edits} == {"mlp.in", "router"}
    expected = live(subject, plan)
    torch.testing.assert_close(EXECUTORS[executor](subject, plan, tmp_path), expected, **CLOSE)
    assert not torch.allclose(unedited(name), expected, **CLOSE)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("name", ["llama", "llama_biased", "gpt2", "gemma2"])
def test_two_edits_and_both_sides(name: str, executor: str, tmp_path: Path) -> None:
    """In order: the second plan is of the model as the first left it."""
    subject = opened(name)
    first = readers(subject, directed(subject), strength=0.8)
    second = readers(subject, directed(subject, seed=7), parts=(*READERS, "attn.out", "unembed"), strength=0.7)
    expected = live(subject, first + second)
    torch.testing.assert_close(EXECUTORS[executor](subject, first + second, tmp_path), expected, **CLOSE)
    assert not torch.allclose(live(subject, second + first), expected, **CLOSE)


def response(subject: Subject, plan: Plan, site: Site, row: Tensor) -> tuple[float, float]:
    """How far moving the stream along the row, before the norm, moves what a reader puts out: edited, unedited.

    The stream is moved in steps small beside it, so that the norm's own length hardly changes.
    """
    stream = torch.randn(6, subject.width, generator=torch.Generator().manual_seed(3)).double()
    norm, reader = subject.module(str(site.gain)), subject.module(site.path)

    def out(x: Tensor) -> Tensor:
        normed = norm(x.float())
        return reader(normed)

    def moved() -> float:
        fixed = stream - (stream @ row.double())[:, None] * row.double()  # nothing along the row to begin with
        return float((out(fixed + 1e-2 * row) - out(fixed - 1e-2 * row)).norm())

    with applied(subject, plan):
        found = moved()
    return found, moved()


@pytest.mark.parametrize("name", [n for n in NAMES if n != "olmo2"])  # it reads the bare stream
def test_a_reader_no_longer_answers_to_the_direction(name: str) -> None:
    subject = opened(name)
    found = directed(subject, k=1)
    plan = readers(subject, found)
    edit = next(e for e in plan.edits if e.site.layer == 1 and not e.site.stacked)
    after, before = response(subject, plan, edit.site, found.basis[edit.site.stream][0])
    assert after < 2e-2 * before  # LayerNorm's and RMSNorm's length change a little, in second order
    bare = replace(plan, edits=(replace(edit, basis=found.basis[edit.site.stream], covectors=None, anchor=None),))
    naive, _ = response(subject, bare, edit.site, found.basis[edit.site.stream][0])
    assert naive > 0.1 * before  # negative control: the gain forgotten


def test_the_tied_head_parts_from_the_table(tmp_path: Path) -> None:
    subject = opened("qwen2")
    plan = readers(subject, directed(subject), parts=("unembed",))
    before = logits(subject.model)
    expected = live(subject, plan)
    torch.testing.assert_close(EXECUTORS["reloaded"](subject, plan, tmp_path), expected, **CLOSE)
    assert not torch.allclose(expected, before, **CLOSE)
    new = bake(subject, plan)
    assert "lm_head.weight" in new
    assert "model.embed_tokens.weight" not in new


def test_readers_are_reported_and_writers_keep_their_share() -> None:
    subject = opened("llama")
    told = summarize_plan_coverage(subject, readers(subject, directed(subject), parts=("attn.in", "mlp.out")))
    assert told["parts"]["attn.in"] == {"found": 9, "edited": 9, "skipped_layers": [], "why_skipped": ""}
    assert "mlp.in" not in told["parts"]
    assert (
        told["edited_share"]
        == summarize_plan_coverage(subject, planned(subject, directed(subject), parts=("mlp.out",)))["edited_share"]
    )


def test_norm_rules_are_not_for_readers(tmp_path: Path) -> None:
    subject = opened("llama")
    plan = readers(subject, directed(subject), norm="columns", parts=("attn.in", "mlp.out"))
    rules = {e.site.role: e.norm for e in plan.edits if isinstance(e, Edit)}
    assert rules == {"reads": "none", "writes": "columns"}
    first = next(e for e in plan.edits if e.site.role == "reads")
    with (
        pytest.raises(UserError, match="is a reader"),
        applied(subject, replace(plan, edits=(replace(first, norm="columns"),))),
    ):
        pass
    save_plan(plan, tmp_path)
    torch.testing.assert_close(live(subject, load_plan(tmp_path)), live(subject, plan))


def test_reflecting_both_sides_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match="a change of basis that undoes itself"):
        load_recipe("reflected", {"excise.parts": ["attn.out", "mlp.out", "attn.in"]})
    assert load_recipe("reflected", {"excise.parts": ["mlp.out"]}).excise.strength == 2


def test_reflecting_both_sides_does_undo_itself() -> None:
    """Why: with one direction everywhere and no norm in between, reflected writers and readers cancel."""
    generator = torch.Generator().manual_seed(0)
    write, read = torch.randn(8, 5, generator=generator).double(), torch.randn(6, 8, generator=generator).double()
    q = random_basis(8, 1, 0, torch.float64)
    reflected = write - 2 * q.T @ q @ write
    torch.testing.assert_close(edit_reader(read, q, 2.0) @ reflected, read @ write)
    assert not torch.allclose(read @ reflected, read @ write)
