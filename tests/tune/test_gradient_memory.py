"""Passes with gradients: the same gradients whatever fits, and no trace left in the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.tiny import MODELS, tiny_subject
from tests.support.tuning import ANSWER, prompt_pairs, random_upper_plan

from obliteratus.core.settings import Tune
from obliteratus.core.types import Plan, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.hooks import decoder_blocks
from obliteratus.tune.fit import TuningData
from obliteratus.tune.gradient_memory import GradientMemory, estimate_row_bytes, plan_gradient_memory, recompute_blocks
from obliteratus.tune.parameters import EditParameters
from obliteratus.tune.targets import TrainingPairs

SETTINGS = Tune(steps=5, tokens=6, batch=4, prompts=8)


def graded(subject: Subject, plan: Plan, memory: GradientMemory) -> tuple[list[torch.Tensor], int]:
    """Gradients of one batch, and how often the last block's attention ran again."""
    some = prompt_pairs(subject)
    data = TuningData(subject, TrainingPairs(some, some), TrainingPairs(some, some), SETTINGS, memory)
    parameters, runs = EditParameters(plan, subject.device, "both"), []
    handle = decoder_blocks(subject)[-1].register_forward_hook(lambda *_: runs.append(1))
    site = next(s for s in subject.sites if s.part == "attn.out" and s.layer == subject.n_layers - 1)
    inner = subject.module(site.path).register_forward_hook(lambda *_: runs.append(0))
    for part in data.iterate_losses(parameters.to_live_plan(), data.train, 0.1):
        part.total(SETTINGS.weight, SETTINGS.coherence).backward(retain_graph=True)
    handle.remove()
    inner.remove()
    return [x.grad for x in parameters.trainable if x.grad is not None], runs.count(0) - runs.count(1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("anchored", [False, True])
def test_gradients_do_not_depend_on_memory(name: str, anchored: bool, make_plan: Any) -> None:
    """All rows in one pass, one at a time, or recomputed on the way back; another margin is another gradient."""
    subject = tiny_subject(name)
    plan = random_upper_plan(subject, make_plan, anchored=anchored)
    whole, again = graded(subject, plan, GradientMemory(8, 1, False))
    assert again == 0
    assert len(whole) == 2 * len(plan.edits)
    one, _ = graded(subject, plan, GradientMemory(1, 1, False))
    twice, again = graded(subject, plan, GradientMemory(8, 1, True))
    assert again > 0
    for a, b, c in zip(whole, one, twice, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(c, a, rtol=1e-3, atol=1e-5)
    other, _ = graded(
        subject, random_upper_plan(subject, make_plan, anchored=anchored, seed=1), GradientMemory(8, 1, False)
    )
    assert not torch.allclose(other[1], whole[1], rtol=1e-2, atol=1e-4)


def test_recomputing_leaves_no_trace() -> None:
    subject = tiny_subject("llama")
    with recompute_blocks(subject, GradientMemory(1, 1, True)):
        assert ["forward" in vars(b) for b in decoder_blocks(subject)] == [False, True, True]
    assert not any("forward" in vars(b) for b in decoder_blocks(subject))


def test_room_follows_memory() -> None:
    """Golden: half of what is free over a row's bytes; never more than asked, never none."""
    subject = tiny_subject("llama")
    some = prompt_pairs(subject)
    longest = max(len(p) + len(a) for p, a in some)
    each = estimate_row_bytes(subject, longest, len(ANSWER), subject.n_layers - 1)
    vocabulary = MODELS["llama"][1]["vocab_size"]
    assert each == longest * 2 * 4 * (8 * 32 + 4 * 56) + 4 * 4 * len(ANSWER) * vocabulary
    assert plan_gradient_memory(subject, some, 1, 8, free=int(7 * each)) == GradientMemory(3, 1, False)
    assert plan_gradient_memory(subject, some, 1, 8, free=int(700 * each)) == GradientMemory(8, 1, False)
    assert plan_gradient_memory(subject, some, 1, 8, free=int(1.5 * each)) == GradientMemory(1, 1, True)


def test_nothing_below_the_first_edit_keeps_a_graph(make_plan: Any) -> None:
    """What enters the first edited block needs no gradient; what leaves it does."""
    subject = tiny_subject("llama")
    parameters, needs = EditParameters(random_upper_plan(subject, make_plan), subject.device, "both"), {}
    handles = [
        block.register_forward_hook(lambda m, a, y, i=i: needs.update({i: y.requires_grad}))
        for i, block in enumerate(decoder_blocks(subject))
    ]
    with applied(subject, parameters.to_live_plan()):
        subject.model(torch.tensor([[1, 2, 3]]))
    for handle in handles:
        handle.remove()
    assert needs == {0: False, 1: True, 2: True}
