"""RDO's losses are their definitions, gradients reach the direction, and the search stops where nothing falls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_subject
from torch.nn import functional as F

from obliteratus.distill import distill
from obliteratus.probe import probe
from obliteratus.summon.capture import blocks
from obliteratus.tune import rdo
from obliteratus.tune.lab import Lab, ablating, adding, answer_logits
from obliteratus.tune.rdo import Material, rdo_loss
from obliteratus.types import PromptSet, Step, Subject

PAIRS = [([1, 2, 3, 4], [5, 6, 7]), ([1, 2, 9], [8]), ([1, 2, 3, 9, 4, 7], [3, 3])]
MEAN = Step(use="mean_diff")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject("llama")


def unit(width: int = 32, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)


def plain(subject: Subject) -> torch.Tensor:
    """One pair at a time, whole logits, then the positions before each answer token."""
    parts = []
    for prompt, answer in PAIRS:
        parts.append(subject.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1])
    return torch.cat(parts)


def test_answer_logits_are_the_plain_ones(subject: Subject) -> None:
    torch.testing.assert_close(answer_logits(subject, PAIRS), plain(subject), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2"])
def test_ablating_leaves_nothing_along_the_direction(name: str) -> None:
    """In the stream after each block, gains of norms behind writers included; without it there is something."""
    subject, d = tiny_subject(name), unit()
    found: list[torch.Tensor] = []

    def keep(module: Any, args: Any, y: Any) -> None:
        found.append((y[0] if isinstance(y, tuple) else y) @ d)

    handles = [b.register_forward_hook(keep) for b in blocks(subject)]
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad(), ablating(subject, d):
        subject.model(ids)
    free = torch.stack(found).abs().max()
    found.clear()
    with torch.no_grad():
        subject.model(ids)
    for handle in handles:
        handle.remove()
    assert free < 1e-4 < 0.05 < torch.stack(found).abs().max()


def test_adding_adds_at_one_stream_only(subject: Subject) -> None:
    v, seen = 3 * unit(seed=1), {1: [], 2: []}
    ids = torch.tensor([[1, 2, 3]])
    entering = {
        i: blocks(subject)[i].register_forward_pre_hook(
            lambda m, args, kwargs, i=i: seen[i].append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for i in seen
    }
    with torch.no_grad():
        subject.model(ids)
        with adding(subject, 2, v):
            subject.model(ids)
    for handle in entering.values():
        handle.remove()
    assert torch.equal(*seen[1])
    torch.testing.assert_close(seen[2][1] - seen[2][0], v.expand(1, 3, -1), rtol=1e-4, atol=1e-5)


def test_the_loss_is_its_definition(subject: Subject) -> None:
    lab, d = Lab(subject, PromptSet({})), unit()
    found = rdo_loss(lab, d, (2, 3.0), Material(PAIRS, PAIRS, PAIRS))
    wanted = torch.tensor([t for _, a in PAIRS for t in a])
    base = plain(subject).double().log_softmax(-1)
    with ablating(subject, d):
        ablated = plain(subject).double().log_softmax(-1)
    with adding(subject, 2, 3.0 * d):
        added = plain(subject).double().log_softmax(-1)
    rows = torch.arange(len(wanted))
    expected = -ablated[rows, wanted].mean() - 0.2 * added[rows, wanted].mean()
    expected = expected + (base.exp() * (base - ablated)).sum(-1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradients_are_the_slopes(name: str) -> None:
    """Against central differences along two drawn vectors."""
    subject = tiny_subject(name)
    lab, material = Lab(subject, PromptSet({})), Material(PAIRS, PAIRS, PAIRS)

    def loss(d: torch.Tensor) -> torch.Tensor:
        return rdo_loss(lab, d / d.norm(), (2, 3.0), material)

    d = unit().requires_grad_(True)
    loss(d).backward()
    assert d.grad is not None
    for seed in (5, 6):
        along, h = unit(seed=seed), 1e-2
        with torch.no_grad():
            slope = (loss(d + h * along) - loss(d - h * along)) / (2 * h)
        assert float(d.grad @ along) == pytest.approx(float(slope), rel=0.05, abs=2e-3)


def fitted(subject: Subject, prompts: PromptSet, **options: Any) -> tuple[Any, list[float]]:
    """Directions, and the loss of each step."""
    acts, losses = probe(subject, prompts), []
    real = rdo.rdo_loss

    def seen(*args: Any) -> Any:
        losses.append(real(*args))
        return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rdo, "rdo_loss", seen)
        steps = [MEAN, Step(use="rdo", batch=64, tokens=4, **options)]
        return distill(acts, steps, Lab(subject, prompts)), [float(x) for x in losses]


def test_the_loss_falls_and_the_direction_moves(subject: Subject, prompts: PromptSet) -> None:
    found, losses = fitted(subject, prompts, steps=40, lr=0.05)
    start = distill(probe(subject, prompts), [MEAN, Step(use="single")])
    assert losses[-1] < losses[0] - 0.05
    assert float(found.basis[1, 0] @ start.basis[1, 0]) < 0.999
    assert torch.equal(found.basis[0], found.basis[-1])  # one direction for the whole model
    assert found.trace == ("mean_diff", "rdo")


def test_it_stops_where_nothing_falls(subject: Subject, prompts: PromptSet) -> None:
    """A rate of next to nothing: every step sees the same loss, and patience ends it. With patience it goes on."""
    _, losses = fitted(subject, prompts, steps=60, lr=1e-12, patience=5)
    assert len(losses) == 6
    _, losses = fitted(subject, prompts, steps=20, lr=0.05, patience=19)
    assert len(losses) == 20


def test_it_needs_a_start_and_a_model(subject: Subject, prompts: PromptSet) -> None:
    acts = probe(subject, prompts)
    with pytest.raises(Exception, match=r"put e\.g\. mean_diff first"):
        distill(acts, [Step(use="rdo")], Lab(subject, prompts))
    with pytest.raises(ValueError, match="must be given a lab"):
        distill(acts, [MEAN, Step(use="rdo")])
