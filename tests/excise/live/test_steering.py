"""Steering adds what it says, behind the blocks that it says, and is gone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.tiny import tiny_subject

import obliteratus as ob
from obliteratus.excise.live.hooks import without_edits
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.inference.logits import first_token_log_probs

NAMES = ("llama", "gpt2", "gemma2", "qwen3_next", "gpt_neox")
PROMPTS = [ob.Prompt("Tell me about stars."), ob.Prompt("Why?")]


def read(subject: ob.Subject) -> torch.Tensor:
    """The streams at the last token of each prompt, [prompts, streams, width]."""
    ids = render_prompts(subject, PROMPTS)
    rows: dict[int, torch.Tensor] = {}
    for batch in read_hidden_states(subject, ids):
        rows |= dict(zip(batch.rows, batch.stream, strict=True))
    return torch.stack([rows[i] for i in range(len(PROMPTS))])


@pytest.mark.parametrize("name", NAMES)
def test_the_vector_is_added_behind_its_block(name: str) -> None:
    subject = tiny_subject(name)
    vector = torch.randn(subject.width, generator=torch.Generator().manual_seed(0))
    plain = read(subject)
    with ob.steer(subject, vector, 0.5, layers=1):
        steered = read(subject)
        with without_edits():
            torch.testing.assert_close(read(subject), plain)
    torch.testing.assert_close(steered[:, 2] - plain[:, 2], 0.5 * vector.expand(2, -1), atol=1e-4, rtol=1e-4)
    assert torch.equal(steered[:, :2], plain[:, :2])
    assert torch.equal(read(subject), plain)


def test_the_same_as_a_shift_where_one_is_possible() -> None:
    """A shift of the MLP's output adds the same vector, since no norm stands behind it."""
    subject = tiny_subject("llama")
    vector = torch.randn(subject.width, generator=torch.Generator().manual_seed(1))
    site = next(site for site in subject.sites if site.part == "mlp.out" and site.layer == 1)
    ids = render_prompts(subject, PROMPTS)
    with ob.applied(subject, ob.Plan((ob.Shift(site, 2 * vector),), subject.source.digest)):
        shifted = first_token_log_probs(subject, ids)
    with ob.steer(subject, vector, 2.0, layers=-2):
        torch.testing.assert_close(first_token_log_probs(subject, ids), shifted, atol=1e-5, rtol=1e-4)


def test_all_blocks_or_those_that_have_a_vector() -> None:
    subject = tiny_subject("llama")
    vector = torch.ones(subject.width)
    plain = read(subject)
    with ob.steer(subject, {0: vector, -1: 2 * vector}):
        by_block = read(subject)
    torch.testing.assert_close(by_block[:, 1] - plain[:, 1], vector.expand(2, -1))
    with ob.steer(subject, ob.Directions.from_vectors({0: vector, 2: 2 * vector}, subject)):
        torch.testing.assert_close(read(subject), by_block)  # directions keep their length
    with ob.steer(subject, vector), ob.steer(subject, vector, -1.0):
        torch.testing.assert_close(read(subject), plain, atol=1e-4, rtol=1e-4)


def test_an_error_inside_leaves_nothing() -> None:
    subject = tiny_subject("llama")
    with pytest.raises(ZeroDivisionError), ob.steer(subject, torch.ones(subject.width)):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in subject.model.modules())


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "width": (torch.ones(3), {}, r"has the shape \[3\]; it must be \[32\]"),
    "rows": (torch.ones(4, 32), {}, r"shape \[4, 32\]"),
    "NaN": (torch.full((32,), torch.nan), {}, "holds NaN or Inf"),
    "block": (torch.ones(32), {"layers": 3}, "there is no block 3; the blocks are 0 to 2"),
    "none": (torch.ones(32), {"layers": []}, "no block is chosen"),
    "no vector": ({0: torch.ones(32)}, {"layers": [0, 1]}, r"block 1 has no vector; those that have one are \[0\]"),
    "no such vector": ({5: torch.ones(32)}, {}, "there is no block 5"),
    "strength": (torch.ones(32), {"strength": float("inf")}, "strength is inf; give a finite number"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_added_is_said(kind: str) -> None:
    subject = tiny_subject("llama")
    vector, options, message = BAD[kind]
    with pytest.raises(ob.UserError, match=message), ob.steer(subject, vector, **options):
        pass
    assert not any(module._forward_hooks for module in subject.model.modules())


def test_directions_without_a_length_are_refused() -> None:
    subject = tiny_subject("llama")
    found = ob.Directions(torch.eye(32)[None, :1].expand(4, 1, 32).clone(), torch.ones(4), torch.ones(4), "share")
    with pytest.raises(ob.UserError, match="is in share, no length"), ob.steer(subject, found):
        pass
