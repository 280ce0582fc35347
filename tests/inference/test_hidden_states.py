"""Hidden states are what one prompt at a time gives, whatever the batches, the order and the prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.one_at_a_time import (
    BUDGETS,
    CLOSE,
    expected_streams,
    gathered,
    plain_logits,
    plain_stream,
    recorded,
    rows_of,
    shared_subject,
)
from tests.support.pairwise import pairwise
from tests.support.tiny import KINDS
from torch import Tensor

from obliteratus.core.probing import ProbeRequest
from obliteratus.core.types import Subject
from obliteratus.inference.hooks import decoder_blocks


@pytest.fixture(params=KINDS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return shared_subject(request.param)


@pytest.mark.parametrize(("name", "budget", "reuse"), pairwise(KINDS, BUDGETS, (True, False)))
def test_read_is_one_at_a_time(name: str, budget: int, reuse: bool) -> None:
    found, _ = gathered(shared_subject(name), rows_of(), budget=budget, reuse=reuse)
    torch.testing.assert_close(found, expected_streams(name), **CLOSE)


def test_order_does_not_matter(subject: Subject) -> None:
    ids = rows_of()
    shuffled = [3, 0, 5, 1, 4, 2]
    found, _ = gathered(subject, [ids[i] for i in shuffled], budget=60)
    straight, _ = gathered(subject, ids, budget=60)
    torch.testing.assert_close(found, straight[shuffled], **CLOSE)
    assert not torch.allclose(found, straight, **CLOSE)  # the rows do differ


@pytest.mark.parametrize("reuse", [True, False])
def test_position(subject: Subject, reuse: bool) -> None:
    ids = rows_of(tails=(1, 2, 9))
    expected = torch.stack([plain_stream(subject, row, -3) for row in ids])
    found, _ = gathered(subject, ids, position=-3, reuse=reuse)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_rows_shorter_than_the_position_give_their_first_token(subject: Subject) -> None:
    ids = [[65], [65, 66], [65, 66, 67, 68]]
    expected = torch.stack([plain_stream(subject, row, -3) for row in ids])
    torch.testing.assert_close(gathered(subject, ids, position=-3)[0], expected, **CLOSE)


def test_stream_zero_enters_the_first_block(subject: Subject) -> None:
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = decoder_blocks(subject)[0].register_forward_pre_hook(keep, with_kwargs=True)
    row = rows_of()[1]
    plain_logits(subject, row)
    handle.remove()
    found, _ = gathered(subject, [row])
    torch.testing.assert_close(found[0, 0], seen[0][0, -1], **CLOSE)


def test_last_stops_early(subject: Subject) -> None:
    ids = rows_of()
    whole, _ = gathered(subject, ids, reuse=False)
    calls: list[int] = []
    handles = [b.register_forward_pre_hook(lambda m, a: calls.append(1)) for b in decoder_blocks(subject)]
    for last in (0, 1, 2):
        calls.clear()
        found, _ = gathered(subject, ids, last=last, budget=10_000, reuse=False)
        torch.testing.assert_close(found, whole[:, : last + 1], **CLOSE)
        assert len(calls) <= max(last, 1)  # one batch: no block above the wanted stream ran
    for handle in handles:
        handle.remove()


def test_output_modules_are_read(subject: Subject) -> None:
    ids = rows_of(tails=(1, 9, 4))
    paths = [s.path for s in subject.sites if s.part == "attn.out"]
    _, found = gathered(subject, ids, request=ProbeRequest(paths), budget=60)
    for j, path in enumerate(paths):
        for i, row in enumerate(ids):
            with recorded(subject.module(path)) as seen:
                plain_logits(subject, row)
            torch.testing.assert_close(found[i, j], seen[0].reshape(len(row), -1)[-1], **CLOSE)
