"""Losses of tokens are what whole logits of one text at a time give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.support.one_at_a_time import BUDGETS, expected_logits, rows_of, shared_subject
from tests.support.pairwise import pairwise
from tests.support.tiny import KINDS, tiny_subject

from obliteratus.inference import token_losses as losses
from obliteratus.inference.token_losses import token_losses


@pytest.mark.parametrize(("name", "budget", "words"), pairwise(KINDS, BUDGETS, [100, 10_000]))
def test_losses_are_one_at_a_time(name: str, budget: int, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "VOCABULARY_CHUNK", words)  # the vocabulary in three parts, and in one
    ids = rows_of()
    found = token_losses(shared_subject(name), ids, budget=budget)
    for row, logits, loss in zip(ids, expected_logits(name), found, strict=True):
        logp = logits[:-1].double().log_softmax(-1)
        expected = -logp.gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_does_more_to_its_logits_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """gemma2 caps its logits: by its head alone they would be others."""
    ran: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        run = getattr(losses, name)
        return lambda *given: [ran.append(name), run(*given)][1]

    for name in ("_full_losses", "negative_log_likelihood"):
        monkeypatch.setattr(losses, name, watched(name))
    token_losses(tiny_subject("gemma2"), rows_of(), budget=30)
    assert set(ran) == {"_full_losses"}
    ran.clear()
    token_losses(tiny_subject("llama"), rows_of(), budget=30)
    assert set(ran) == {"negative_log_likelihood"}


@pytest.mark.parametrize("bias", [True, False])
def test_losses_in_parts_against_float64(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "VOCABULARY_CHUNK", 7)
    torch.manual_seed(0)
    head, states, targets = torch.nn.Linear(8, 30, bias=bias), 9 * torch.randn(11, 8), torch.randint(30, (11,))
    with torch.no_grad():
        found = losses.negative_log_likelihood(states, targets, head)
        logp = head.double()(states.double()).log_softmax(-1)
    torch.testing.assert_close(found.double(), -logp[torch.arange(11), targets], rtol=1e-5, atol=1e-5)
