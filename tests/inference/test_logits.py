"""Log-probabilities of the first token are what one prompt at a time gives, and the KL is its definition."""

from __future__ import annotations

from math import log

import pytest
import torch
from tests.support.one_at_a_time import BUDGETS, expected_logits, rows_of, shared_subject
from tests.support.pairwise import pairwise
from tests.support.tiny import KINDS

from obliteratus.inference.logits import first_token_log_probs, kl_divergence


@pytest.mark.parametrize(("name", "budget", "reuse"), pairwise(KINDS, BUDGETS, (True, False)))
def test_first_token_is_one_at_a_time(name: str, budget: int, reuse: bool) -> None:
    subject = shared_subject(name)
    expected = torch.stack([logits[-1].log_softmax(-1) for logits in expected_logits(name)])
    found = first_token_log_probs(subject, rows_of(), budget=budget, reuse=reuse)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not subject.model.get_output_embeddings()._forward_pre_hooks


def test_kl_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    base, edited = (torch.randn(6, 50, generator=generator).mul(3).log_softmax(-1) for _ in range(2))
    expected = []
    for p, q in zip(base.double().tolist(), edited.double().tolist(), strict=True):
        expected.append(sum(torch.tensor(a).double().exp().item() * (a - b) for a, b in zip(p, q, strict=True)))
    torch.testing.assert_close(kl_divergence(base, edited), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert (kl_divergence(base, edited) > 0).all()
    assert (kl_divergence(base, base) == 0).all()
    assert not torch.allclose(kl_divergence(base, edited), kl_divergence(edited, base), rtol=1e-2)


def test_kl_where_the_base_gives_nothing() -> None:
    base = torch.tensor([[0.5, 0.5, 0.0]]).log()
    edited = torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert kl_divergence(base, edited).item() == pytest.approx(log(2))
    assert kl_divergence(edited, base).item() == torch.inf  # what the edited model has lost altogether
