"""A shared prefix is reused only where that changes no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.one_at_a_time import (
    CLOSE,
    gathered,
    plain_answer,
    plain_stream,
    rows_of,
)
from tests.support.tiny import KINDS, tiny_subject
from torch import Tensor

from obliteratus.core.types import Subject
from obliteratus.inference import shared_prefix
from obliteratus.inference.generate import generate
from obliteratus.inference.shared_prefix import common_prefix_length, is_recurrent, prepare_prompts

SLIDING = ["gemma2", "gemma3_text"]


def test_a_window_in_every_layer() -> None:
    subject = tiny_subject("mistral")
    ids = rows_of(tails=(1, 6, 20))
    whole = gathered(subject, ids)[0]
    subject.model.config.sliding_window = 8
    found = gathered(subject, ids)[0]
    torch.testing.assert_close(found, torch.stack([plain_stream(subject, row) for row in ids]), **CLOSE)
    assert generate(subject, ids, 8) == [plain_answer(subject, row, 8) for row in ids]
    assert not torch.allclose(found, whole, **CLOSE)  # the window does cut something


@pytest.mark.parametrize("name", KINDS)
def test_the_prefix_is_reused_or_refused(name: str) -> None:
    subject = tiny_subject(name)
    with torch.inference_mode():
        prompts = prepare_prompts(subject, rows_of(prefix=12, tails=(1, 6, 20)))
    assert prompts.prefix_length in (0, 12)
    assert prompts.prefix_length == 12 or name in SLIDING or is_recurrent(subject)  # full attention is always reused
    assert prompts.prefix_length == 0 or not is_recurrent(subject)


@pytest.mark.parametrize("name", SLIDING)
def test_a_cut_window_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: states that lost what lies outside the window, as a sliding cache keeps them."""
    subject = tiny_subject(name)
    ids = rows_of(prefix=12, tails=(1, 6, 20))
    states = shared_prefix.prefix_states

    def cut(subject: Subject, prefix: list[int]) -> Any:
        def zeroed(x: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(x[:, :, :8]), x[:, :, 8:]], 2)

        return [(zeroed(k), zeroed(v)) for k, v in states(subject, prefix)]

    monkeypatch.setattr(shared_prefix, "prefix_states", cut)
    with torch.inference_mode():
        assert prepare_prompts(subject, ids).prefix_length == 0
        monkeypatch.setattr(shared_prefix, "_matches_without_prefix", lambda *args: True)
        assert prepare_prompts(subject, ids).prefix_length == 12
    forced, _ = gathered(subject, ids)
    expected = torch.stack([plain_stream(subject, row) for row in ids])
    assert not torch.allclose(forced, expected, **CLOSE)


def test_common_prefix_leaves_the_tokens_that_are_read() -> None:
    assert common_prefix_length([[1, 2, 3, 4], [1, 2, 3, 5]]) == 3
    assert common_prefix_length([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix_length([[1, 2, 3], [1, 2, 3, 4]], leave=3) == 0
    assert common_prefix_length([[2], [1, 2]]) == 0
