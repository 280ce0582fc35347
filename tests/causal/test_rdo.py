"""RDO's losses are their definitions, gradients reach the direction, and the search stops where nothing falls."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.tiny import tiny_subject
from torch.nn import functional as F

from obliteratus.causal.early_stopping import EarlyStopping
from obliteratus.causal.interventions import (
    FitContext,
    ablate,
    add_to_stream,
    compute_answer_logits,
    compute_head_logits,
)
from obliteratus.causal.rdo import DirectionLosses, LossInputs
from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.inference.chat_template import encode_texts
from obliteratus.inference.hooks import decoder_blocks
from obliteratus.probe.probe import collect_activations

MODULE = importlib.import_module("obliteratus.causal.rdo")  # the package has a step of that name
LOSSES = importlib.import_module("obliteratus.causal.losses")
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
    torch.testing.assert_close(compute_answer_logits(subject, PAIRS), plain(subject), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "olmo2"])
def test_ablating_leaves_nothing_along_the_direction(name: str) -> None:
    """In the stream after each block, gains of norms behind writers included; without it there is something."""
    subject, d = tiny_subject(name), unit()
    found: list[torch.Tensor] = []

    def keep(module: Any, args: Any, y: Any) -> None:
        found.append((y[0] if isinstance(y, tuple) else y) @ d)

    handles = [b.register_forward_hook(keep) for b in decoder_blocks(subject)]
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad(), ablate(subject, d):
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
        i: decoder_blocks(subject)[i].register_forward_pre_hook(
            lambda m, args, kwargs, i=i: seen[i].append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for i in seen
    }
    with torch.no_grad():
        subject.model(ids)
        with add_to_stream(subject, 2, v):
            subject.model(ids)
    for handle in entering.values():
        handle.remove()
    assert torch.equal(*seen[1])
    torch.testing.assert_close(seen[2][1] - seen[2][0], v.expand(1, 3, -1), rtol=1e-4, atol=1e-5)


def definition(subject: Subject, d: torch.Tensor) -> float:
    """As in the authors' code: means over pairs of the cross-entropy a token, and of KL(ablated ‖ base) summed."""
    loss = 0.0
    for prompt, answer in PAIRS:
        rows, ids = torch.arange(len(answer)), torch.tensor([prompt + answer])

        def read(ids: torch.Tensor = ids, first: int = len(prompt) - 1) -> torch.Tensor:
            return subject.model(ids).logits[0, first:-1].double().log_softmax(-1)

        base = read()
        with ablate(subject, d):
            ablated = read()
        with add_to_stream(subject, 2, 3.0 * d):
            added = read()
        loss += float(-ablated[rows, answer].mean() - 0.2 * added[rows, answer].mean()) / len(PAIRS)
        loss += float((ablated.exp() * (ablated - base)).sum()) / len(PAIRS)
    return loss


def test_kl_is_that_of_the_ablated_model_from_the_base(subject: Subject) -> None:
    """Without the other terms; the other way round it is another number."""
    d = unit()
    base = plain(subject).double().log_softmax(-1)
    with ablate(subject, d):
        ablated = plain(subject).double().log_softmax(-1)
    found = DirectionLosses(subject, 2, 3.0).total(d, LossInputs([], [], PAIRS)).item()
    ours = float((ablated.exp() * (ablated - base)).sum()) / len(PAIRS)
    reverse = float((base.exp() * (base - ablated)).sum()) / len(PAIRS)
    assert found == pytest.approx(ours, rel=1e-4)
    assert found != pytest.approx(reverse, rel=1e-2)


def test_refusals_end_at_the_first_full_stop(subject: Subject) -> None:
    answers = ["I cannot. Sorry.", "No", ".", "A. B"]
    encoded = encode_texts(subject, answers)
    pairs = [([i], ids) for i, ids in enumerate(encoded)]
    found = MODULE.cut_sentences(subject, pairs)
    assert found == [
        ([i], ids) for i, ids in zip((0, 1, 3), encode_texts(subject, ["I cannot", "No", "A"]), strict=True)
    ]
    assert MODULE.cut_sentences(subject, pairs[2:3]) == pairs[2:3]  # nothing would be left to learn from


def test_it_starts_where_the_step_before_chose(subject: Subject, prompts: PromptSet) -> None:
    """The stream and length that `select` gives; without them those of the best row."""
    acts = collect_activations(subject, prompts)
    mean = find_directions(acts, [MEAN])
    seen: list[tuple[int, float]] = []

    class Losses(DirectionLosses):
        def __init__(self, subject: Subject, stream: int, size: float) -> None:
            seen.append((stream, size))
            super().__init__(subject, stream, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "DirectionLosses", Losses)
        for origin in ((2, 1.5), None):
            MODULE.rdo(acts, replace(mean, origin=origin), FitContext(subject, prompts), steps=1, tokens=4)
    best = max(1, int(mean.score.argmax()))
    assert seen[0] == (2, 1.5)
    assert seen[1] == (best, pytest.approx(float(mean.raw[best]), rel=1e-4))


@pytest.mark.parametrize("rows", [8, 2, 1])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_loss_is_its_definition(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pairs a part has, and on a second call, which takes kept states; gemma2 caps its logits."""
    subject, d = tiny_subject(name), unit(tiny_subject(name).width)
    monkeypatch.setattr(LOSSES, "ROWS_PER_PASS", rows)
    losses, material = DirectionLosses(subject, 2, 3.0), LossInputs(PAIRS, PAIRS, PAIRS)
    expected = definition(subject, d)
    for _ in range(2):
        assert losses.total(d, material).item() == pytest.approx(expected, rel=1e-4)
    assert losses.total(unit(len(d), 3), material).item() != pytest.approx(expected, rel=1e-3)


def test_states_of_own_answers_are_those_of_the_untouched_model(subject: Subject) -> None:
    """Each pair passes once, and what is kept gives the model's own logits."""
    losses, runs = DirectionLosses(subject, 2, 3.0), []
    handle = decoder_blocks(subject)[0].register_forward_pre_hook(
        lambda m, args, kwargs: runs.append((args[0] if args else kwargs["hidden_states"]).shape[1]), with_kwargs=True
    )
    first = losses.reference.logp(PAIRS)
    passes = len(runs)
    again = losses.reference.logp(PAIRS)
    handle.remove()
    torch.testing.assert_close(first, plain(subject).log_softmax(-1), rtol=1e-4, atol=1e-4)
    assert torch.equal(first, again)
    assert runs[passes:] == [1]  # one token, whose state is thrown away


def test_head_logits_are_those_of_the_states_given() -> None:
    subject, seen = tiny_subject("gemma2"), []
    whole = compute_answer_logits(subject, PAIRS, seen.append)
    torch.testing.assert_close(compute_head_logits(subject, seen[-1]), whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(compute_head_logits(subject, seen[-1].flip(0)), whole, atol=1e-2)


LONG = [([9, 8, 7, 6, 5, *p], a) for p, a in PAIRS]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_gradients_are_the_slopes(name: str) -> None:
    """Against central differences along two drawn vectors; the pairs share a beginning, which runs once."""
    subject = tiny_subject(name)
    losses, material = DirectionLosses(subject, 2, 3.0), LossInputs(LONG, LONG, LONG)
    d = unit(subject.width).requires_grad_()
    for part in losses.parts(d, material):
        part.backward()
    assert d.grad is not None
    for seed in (5, 6):
        along, h = unit(subject.width, seed), 1e-2
        with torch.no_grad():
            slope = (losses.total(d + h * along, material) - losses.total(d - h * along, material)) / (2 * h)
        assert float(d.grad @ along) == pytest.approx(float(slope), rel=0.05, abs=2e-3)


def test_a_shared_beginning_runs_once(subject: Subject) -> None:
    """Five tokens: more would leave nothing that predicts the longest answer. Without it, whole rows."""
    shapes: list[tuple[int, ...]] = []
    handle = decoder_blocks(subject)[0].register_forward_pre_hook(
        lambda m, args, kwargs: shapes.append((args[0] if args else kwargs["hidden_states"]).shape[:2]),
        with_kwargs=True,
    )
    compute_answer_logits(subject, LONG)
    compute_answer_logits(subject, [([3, *p], a) if i else ([4, *p], a) for i, (p, a) in enumerate(PAIRS)])
    handle.remove()
    assert [tuple(s) for s in shapes] == [(1, 5), (3, 8), (3, 9)]


def fitted(subject: Subject, prompts: PromptSet, **options: Any) -> tuple[Any, list[float], list[float]]:
    """Directions, the held loss at each look, and the rate of each step."""
    acts, looks, rates = collect_activations(subject, prompts), [], []
    value, step = MODULE._total_loss, MODULE._step

    def seen(*args: Any) -> float:
        looks.append(value(*args))
        return looks[-1]

    def stepped(losses: Any, d: Any, optimizer: Any, material: Any) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        step(losses, d, optimizer, material)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "_total_loss", seen)
        patch.setattr(MODULE, "_step", stepped)
        steps = [MEAN, Step(use="rdo", batch=64, tokens=4, **options)]
        return find_directions(acts, steps, FitContext(subject, prompts)), looks, rates


def test_the_loss_falls_and_the_direction_moves(subject: Subject, prompts: PromptSet) -> None:
    found, looks, rates = fitted(subject, prompts, steps=40, lr=0.05)
    start = find_directions(collect_activations(subject, prompts), [MEAN, Step(use="single")])
    assert float(found.raw[0]) == pytest.approx(min(looks))
    assert min(looks) < looks[0] - 0.02
    assert float(found.basis[1, 0] @ start.basis[1, 0]) < 0.999
    assert torch.equal(found.basis[0], found.basis[-1])  # one direction for the whole model
    assert found.trace == ("mean_diff", "rdo")
    assert len(rates) <= 40


def test_it_stops_where_nothing_falls(subject: Subject, prompts: PromptSet) -> None:
    """A rate of next to nothing: every look sees the same loss; the rate falls twice, then patience ends it."""
    _, looks, rates = fitted(subject, prompts, steps=60, lr=1e-12)
    assert len(rates) == 20
    assert rates[::5] == pytest.approx([1e-12, 1e-13, 1e-14, 1e-14])
    assert max(looks) - min(looks) < 1e-4
    _, _, rates = fitted(subject, prompts, steps=25, lr=1e-12, patience=1000)
    assert len(rates) == 25


def test_a_gain_resets_the_patience_and_the_best_is_kept() -> None:
    fitted, looks = EarlyStopping(unit(), 1.0, 1e-4, 5), [0.9, 0.95, 0.89995, 0.89, 0.9]
    gains = [fitted.update(unit(seed=i), loss) for i, loss in enumerate(looks)]
    assert gains == [True, False, False, True, False]  # 0.00005 is no gain, yet it is kept
    assert fitted.stalled_steps == 5
    assert fitted.loss == 0.89
    assert torch.equal(fitted.best, unit(seed=3))


def test_no_step_sees_what_is_held(subject: Subject) -> None:
    many = [([i], [i + 1]) for i in range(40)]
    held, seen = MODULE._split_held_out(LossInputs(many, many, PAIRS))
    assert len(held.answers) == 10
    assert sorted([*held.answers, *seen.answers]) == many
    assert list(held.answers) != many[:10]  # prompts come sorted by kind
    assert len(held.own_answers) == len(seen.own_answers) == 3  # too few to part


def test_it_needs_a_start_and_a_model(subject: Subject, prompts: PromptSet) -> None:
    acts = collect_activations(subject, prompts)
    with pytest.raises(Exception, match=r"put e\.g\. mean_diff first"):
        find_directions(acts, [Step(use="rdo")], FitContext(subject, prompts))
    with pytest.raises(UserError, match="FitContext"):
        find_directions(acts, [MEAN, Step(use="rdo")])
