"""Log-probabilities of the first token are what one prompt at a time gives."""

from __future__ import annotations

import pytest
import torch
from tests.support.one_at_a_time import BUDGETS, expected_logits, rows_of, shared_subject
from tests.support.pairwise import pairwise
from tests.support.tiny import KINDS

from obliteratus.inference.logits import first_token_log_probs


@pytest.mark.parametrize(("name", "budget", "reuse"), pairwise(KINDS, BUDGETS, (True, False)))
def test_first_token_is_one_at_a_time(name: str, budget: int, reuse: bool) -> None:
    subject = shared_subject(name)
    expected = torch.stack([logits[-1].log_softmax(-1) for logits in expected_logits(name)])
    found = first_token_log_probs(subject, rows_of(), budget=budget, reuse=reuse)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not subject.model.get_output_embeddings()._forward_pre_hooks
