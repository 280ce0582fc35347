"""Continuations are as likely as plain calls of the model say, whatever shares a context, a batch or a prefix."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tests.support.one_at_a_time import BUDGETS, CLOSE, rows_of, shared_subject
from tests.support.pairwise import pairwise
from tests.support.tiny import KINDS, tiny_subject

from obliteratus.core.types import Subject
from obliteratus.inference import batching
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.continuations import score_continuations, split_by_prefix
from obliteratus.inference.hooks import decoder_blocks

LENGTHS = {"one token": (1, 1, 1), "several": (1, 4, 2), "alone": (3,)}
"""Lengths of the continuations of each context."""


def pairs(kind: str, seed: int = 1) -> tuple[Ids, Ids]:
    """Contexts, each so many times over, and their continuations."""
    generator = torch.Generator().manual_seed(seed)
    contexts = [context for context in rows_of() for _ in LENGTHS[kind]]
    lengths = [n for _ in rows_of() for n in LENGTHS[kind]]
    return contexts, [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


@cache
def expected(name: str, kind: str) -> tuple[list[float], list[bool]]:
    """By plain calls: each row alone, with all its logits."""
    model, sums, greedy = shared_subject(name).model, [], []
    for context, continuation in zip(*pairs(kind), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + continuation])).logits[0]
        logp = logits.float().log_softmax(-1)[len(context) - 1 : -1]
        sums.append(float(logp[range(len(continuation)), continuation].sum()))
        greedy.append(logp.argmax(-1).tolist() == continuation)
    return sums, greedy


@pytest.mark.parametrize(("name", "kind", "budget"), pairwise(KINDS, list(LENGTHS), BUDGETS))
def test_scores_are_one_at_a_time(name: str, kind: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "CPU_TOKENS", budget)
    scores = score_continuations(shared_subject(name), *pairs(kind))
    sums, greedy = expected(name, kind)
    torch.testing.assert_close(torch.tensor([s.log_likelihood for s in scores]), torch.tensor(sums), **CLOSE)
    assert [s.greedy for s in scores] == greedy


def test_another_continuation_has_another_score() -> None:
    """The negative control: rows in each other's places would be seen."""
    sums, _ = expected("llama", "several")
    assert len({round(value, 3) for value in sums}) == len(sums)


def test_greedy_continuations_are_told_from_others() -> None:
    subject = shared_subject("llama")
    context = rows_of()[0]
    with torch.no_grad():
        best = int(subject.model(input_ids=torch.tensor([context])).logits[0, -1].argmax())
    scores = score_continuations(subject, [context, context], [[best], [(best + 1) % 256]])
    assert [s.greedy for s in scores] == [True, False]


def test_a_context_runs_once_for_all_its_continuations() -> None:
    subject = tiny_subject("llama")
    context, seen = rows_of()[4], list[int]()
    hook = decoder_blocks(subject)[0].register_forward_hook(lambda m, args, y: seen.append(args[0].shape[:2].numel()))
    score_continuations(subject, [context] * 4, [[1, 2], [3, 4], [5, 6], [7, 8]])
    hook.remove()
    assert sum(seen) == len(context) + 4


def test_questions_on_one_text_run_together() -> None:
    texts = [[i] * 40 for i in (1, 2)]
    contexts = sorted([[0] * 8 + text + [9, n] for text in texts for n in range(3)] + [[0] * 8 + [5, 6, 7]])
    runs = split_by_prefix(contexts)
    assert sorted(map(len, runs)) == [1, 3, 3]
    assert sorted(row for run in runs for row in run) == contexts


def test_one_text_alone_is_no_run() -> None:
    contexts = sorted([n, *[7] * 50] for n in range(5))
    assert split_by_prefix(contexts) == [contexts]


class Memory:
    """A hook that runs out of memory for more than so many rows."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > self.rows:
            raise torch.OutOfMemoryError("no more")


@pytest.fixture
def subject() -> Subject:
    return tiny_subject("llama")


def test_a_batch_that_does_not_fit_is_halved(subject: Subject) -> None:
    whole = score_continuations(subject, *pairs("one token"))
    hook = decoder_blocks(subject)[0].register_forward_pre_hook(Memory(2))
    halved = score_continuations(subject, *pairs("one token"))
    hook.remove()
    for one, two in zip(whole, halved, strict=True):
        assert one.log_likelihood == pytest.approx(two.log_likelihood, abs=1e-4)


def test_a_row_that_does_not_fit_is_an_error(subject: Subject) -> None:
    hook = decoder_blocks(subject)[0].register_forward_pre_hook(Memory(0))
    with pytest.raises(torch.OutOfMemoryError):
        score_continuations(subject, *pairs("one token"))
    hook.remove()
