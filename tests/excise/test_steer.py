"""Permanent steering: one vector at one place, the same live, baked and reloaded, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.executors import (
    CLOSE,
    EXECUTORS,
    SWITCHED,
    SWITCHLESS,
    directed,
    executors,
    has_adapter,
    live,
    logits,
    opened,
    streams,
)
from tests.support.tiny import run_of
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Excise
from obliteratus.core.types import Activations, Directions, Edit, Moments, Plan, Shift, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import load_plan, plan_edits, save_plan
from obliteratus.rebirth.save import save
from obliteratus.summon.sites import find_architecture

BIASED = ["gpt2", "gpt_neox", "gpt_oss", "llama_biased", "opt"]
MLP_SWITCH = [n for n in SWITCHED if "mlp" in find_architecture(opened(n).model.config).bias_switch]
NONE = [n for n in SWITCHLESS if n not in ("gemma2", "gemma3", "gemma3_text", "gemma4_text", "olmo2")]


def acts_of(subject: Subject) -> Activations:
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(2, subject.n_layers + 1, subject.width, generator=generator)
    return Activations({"target": Moments(1, mean[0]), "control": Moments(1, mean[1])}, -1)


def steered(subject: Subject, amount: float = 0.7, strength: float = 0.5) -> tuple[Plan, Directions]:
    found = directed(subject)
    options = Excise(steer=amount, strength=strength)
    return plan_edits(subject, found, torch.ones(len(subject.sites)), acts_of(subject), options), found


def shift_of(plan: Plan) -> Shift:
    return next(c for c in plan.edits if isinstance(c, Shift))


def test_the_vector_is_the_difference_along_the_directions() -> None:
    subject = opened("llama")
    plan, found = steered(subject)
    shift = shift_of(plan)
    acts = acts_of(subject)
    at = shift.site.stream
    delta = (acts["target"].mean - acts["control"].mean)[at].double()
    q = found.basis[at].double()
    torch.testing.assert_close(shift.vector.double(), -0.7 * q.T @ (q @ delta), rtol=1e-4, atol=1e-5)
    assert sum(isinstance(c, Shift) for c in plan.edits) == 1


@pytest.mark.parametrize(("name", "executor"), executors([*BIASED, *MLP_SWITCH]))
def test_executors_agree(name: str, executor: str, tmp_path: Path) -> None:
    subject = opened(name)
    plan, _ = steered(subject)
    expected = live(subject, plan)
    torch.testing.assert_close(EXECUTORS[executor](subject, plan, tmp_path), expected, **CLOSE)
    bare = Plan(tuple(c for c in plan.edits if isinstance(c, Edit)), plan.model)
    assert not torch.allclose(live(subject, bare), expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_token_of_the_stream_moves_by_the_vector(name: str) -> None:
    subject = opened(name)
    plan, _ = steered(subject)
    shift = shift_of(plan)
    moved, plain = (streams(subject, p)[:, shift.site.stream] for p in (Plan((shift,), plan.model), Plan()))
    torch.testing.assert_close(moved - plain, shift.vector.expand_as(plain), rtol=1e-3, atol=1e-4)


def test_a_later_removal_takes_the_vector_away() -> None:
    """Changes of one site apply in order: what was added along a direction goes with the direction."""
    subject = opened("llama")
    plan, _ = steered(subject, strength=1.0)
    shift = shift_of(plan)
    removal = next(c for c in plan.edits if isinstance(c, Edit) and c.site == shift.site)
    after = live(subject, Plan((shift, removal), plan.model))
    torch.testing.assert_close(after, live(subject, Plan((removal,), plan.model)), **CLOSE)
    assert not torch.allclose(after, live(subject, Plan((removal, shift), plan.model)), **CLOSE)


@pytest.mark.parametrize("name", NONE)
def test_without_a_bias_it_is_no_merged_model(name: str, tmp_path: Path) -> None:
    subject = opened(name)
    plan, _ = steered(subject)
    with pytest.raises(UserError, match=r"steering needs a bias and .* has none.*excise\.steer=0"):
        save(subject, plan, run_of(subject), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if has_adapter(name):
        torch.testing.assert_close(EXECUTORS["adapter"](subject, plan, tmp_path), live(subject, plan), **CLOSE)


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_behind_a_norm_it_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"a norm stands between .* so no constant shift"):
        steered(opened(name))


def test_it_round_trips_and_leaves_no_trace(tmp_path: Path) -> None:
    subject = opened("llama")
    before: Tensor = logits(subject.model)
    plan, _ = steered(subject)
    save_plan(plan, tmp_path)
    assert torch.equal(shift_of(load_plan(tmp_path)).vector, shift_of(plan).vector)
    with applied(subject, plan):
        pass
    assert torch.equal(logits(subject.model), before)
