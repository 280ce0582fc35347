"""What the model reasons with goes out of the directions: of real reasoning tokens, whatever the batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.tiny import TEMPLATE, tiny_subject
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.causal import FitContext
from obliteratus.causal.reasoning import collect_reasoning_rows, compute_reasoning_subspace, find_reasoning_span
from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Directions, PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.distill.steps import extractors
from obliteratus.inference import batching as forward
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.generate import generate
from obliteratus.probe.probe import collect_activations

OPTIONS: dict[str, Any] = {"tokens": 12, "places": 3, "k": 2}
THINKING = TEMPLATE + "{% if enable_thinking %}{{ '<think>' }}{% else %}{{ '<think></think>' }}{% endif %}"


@pytest.fixture
def subject() -> Subject:
    return tiny_subject("llama")


def kept(subject: Subject, asked: PromptSet, start: Directions, **options: Any) -> Directions:
    entry = extractors["keep_reasoning"]
    given = extractors.check("keep_reasoning", {**OPTIONS, **options})
    found = entry.function(collect_activations(subject, asked), start, FitContext(subject, asked), **given)
    assert isinstance(found, Directions)
    return found


def mean_diff(subject: Subject, prompts: PromptSet) -> Directions:
    return find_directions(collect_activations(subject, prompts), [Step(use="svd", k=2)])


def alone(subject: Subject, rows: list[list[int]]) -> Tensor:
    """Streams of the rows' last tokens, one row at a time, transformers' own hidden states (not the normed last)."""
    states = [subject.model(torch.tensor([r]), output_hidden_states=True).hidden_states[:-1] for r in rows]
    return torch.stack([torch.stack(s)[:, 0, -1] for s in states]).double()


def test_nothing_is_left_along_the_reasoning(subject: Subject, prompts: PromptSet) -> None:
    """Against a subspace found one row at a time in double precision; before, there was much."""
    start = mean_diff(subject, prompts)
    found = kept(subject, prompts, start)
    ids = render_prompts(subject, prompts["control"])
    rows = []
    for prompt, answer in zip(ids, generate(subject, ids, 12), strict=True):
        n = len(answer)
        rows += [prompt + answer[: i * n // min(3, n) + 1] for i in range(min(3, n))]
    stream = alone(subject, rows)
    _, _, v = torch.linalg.svd((stream - stream.mean(0)).transpose(0, 1), full_matrices=False)
    before, after = (torch.einsum("lkw,ljw->lkj", d.basis[:-1].double(), v[:, :2]).abs() for d in (start, found))
    assert after.max() < 1e-3
    assert before[1:].amax((1, 2)).min() > 0.05
    assert found.raw is start.raw


def counting(subject: Subject, plant: float) -> None:
    """The model answers with one byte after the other; tokens differ along axis 5 by ``plant``, elsewhere by 1."""
    for layer in subject.model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    table, generator = subject.model.get_input_embeddings().weight, torch.Generator().manual_seed(2)
    table.copy_(normalize(torch.randn(table.shape, generator=generator), dim=1))
    table[:, 5] = 0
    subject.model.model.norm.weight.fill_(1)
    subject.model.lm_head.weight.copy_(table.roll(1, 0))
    table[:, 5] = plant * torch.randn(len(table), generator=generator)


def test_a_planted_axis_goes_and_what_is_beside_it_stays(subject: Subject, prompts: PromptSet) -> None:
    """Tokens differ along one axis far more than along any other, so answers do too. Without the plant it stays."""
    axis, beside = torch.eye(32)[5], torch.eye(32)[9]
    both = normalize(axis + beside, dim=0).expand(4, 1, 32).contiguous()
    start = Directions(both, torch.ones(4), torch.ones(4), "")
    counting(subject, plant=0.0)
    assert ((kept(subject, prompts, start, k=1).basis[:, 0] @ axis).abs() > 0.5).all()
    counting(subject, plant=20.0)
    planted = kept(subject, prompts, start, k=1)
    assert ((planted.basis[:, 0] @ axis).abs() < 0.1).all()
    assert ((planted.basis[:, 0] @ beside).abs() > 0.95).all()


def test_a_direction_that_is_all_reasoning_becomes_zeros(subject: Subject, prompts: PromptSet) -> None:
    rows = collect_reasoning_rows(FitContext(subject, prompts), 32, 12, 3)
    start = Directions(compute_reasoning_subspace(subject, rows, 2), torch.ones(4), torch.ones(4), "")
    found = kept(subject, prompts, start)
    assert (found.basis == 0).all()
    assert (found.score == 0).all()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_batches_are_invisible(name: str, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row at a time, or all together: the same rows are read, and the same comes out."""
    subject = tiny_subject(name)
    start = mean_diff(subject, prompts)
    together = kept(subject, prompts, start)
    monkeypatch.setattr(forward, "CPU_TOKENS", 1)
    torch.testing.assert_close(kept(subject, prompts, start).basis, together.basis, rtol=1e-3, atol=1e-4)


def test_rows_end_in_the_answer(subject: Subject, prompts: PromptSet) -> None:
    ids = render_prompts(subject, prompts["control"])
    answers = generate(subject, ids, 12)
    rows = collect_reasoning_rows(FitContext(subject, prompts), 32, 12, 3)
    for row in rows:
        (at,) = [i for i, p in enumerate(ids) if row[: len(p)] == p]
        assert len(row) > len(ids[at])
        assert row[len(ids[at]) :] == answers[at][: len(row) - len(ids[at])]
    assert len(rows) == sum(min(3, len(a)) for a in answers)


@pytest.mark.parametrize(
    ("prompt", "answer", "reasoning"),
    [
        ("assistant:", "plain answer", "plain answer"),
        ("assistant:", "<think>so it is</think>yes", "so it is"),
        ("assistant:", "well <think>cut off", "cut off"),
        ("assistant:<think>", "so it is</think>yes", "so it is"),
        ("assistant:<think>", "cut off", "cut off"),
        ("assistant:<think></think>", "answer", "answer"),
        ("<think>old</think>assistant:", "<reasoning>new</reasoning> x", "new"),
    ],
)
def test_the_span_is_what_stands_in_the_block(subject: Subject, prompt: str, answer: str, reasoning: str) -> None:
    encode = subject.tokenizer
    row = encode(answer, add_special_tokens=False)["input_ids"]
    start, stop = find_reasoning_span(subject, encode(prompt, add_special_tokens=False)["input_ids"], row)
    assert encode.decode(row[start:stop]) == reasoning


def test_a_template_with_thinking_is_rendered_so(subject: Subject, prompts: PromptSet) -> None:
    """Also where the subject's own mode is not to think."""
    subject.tokenizer.chat_template = THINKING
    (row, *_) = collect_reasoning_rows(FitContext(subject, prompts), 1, 4, 1)
    text = subject.tokenizer.decode(row)
    assert "<think>" in text
    assert "</think>" not in text
    assert "</think>" in subject.tokenizer.decode(render_prompts(subject, prompts["control"])[0])


def test_too_few_places_and_no_directions_say_so(subject: Subject, prompts: PromptSet) -> None:
    start = mean_diff(subject, prompts)
    with pytest.raises(UserError, match="k=4 needs more than 4 places; got 3; raise prompts"):
        kept(subject, prompts, start, prompts=1, k=4)
    with pytest.raises(UserError, match=r"put e\.g\. mean_diff first"):
        find_directions(
            collect_activations(subject, prompts), [Step(use="keep_reasoning")], FitContext(subject, prompts)
        )


def test_shuffled_rows_would_take_out_something_else(subject: Subject, prompts: PromptSet) -> None:
    """Negative control: read at the prompts' ends, which is no reasoning, another subspace is found."""
    rows = collect_reasoning_rows(FitContext(subject, prompts), 32, 12, 3)
    ends = [row for group in ("target", "control") for row in render_prompts(subject, prompts[group])]
    one, other = (compute_reasoning_subspace(subject, r, 2)[1:] for r in (rows, ends))
    overlap = torch.linalg.svdvals(torch.einsum("lkw,ljw->lkj", one, other))
    assert overlap[:, -1].max() < 0.95
