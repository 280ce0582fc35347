"""The way from the last stream to the vocabulary is the model's own."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.support.contexts import (
    context_of_model,
    token_ids,
)
from tests.support.plans import random_basis
from tests.support.refuser import asked
from tests.support.tiny import tiny_subject

from obliteratus.analyze.readout import compute_logit_effects, compute_next_token_log_probs
from obliteratus.inference.logits import first_token_log_probs

KINDS = ("llama", "gemma2", "gpt2", "opt", "granitemoe", "lfm2")


@pytest.mark.parametrize("name", KINDS)
def test_the_last_stream_reads_out_as_the_model_does(name: str) -> None:
    context = context_of_model(tiny_subject(name), asked())
    rows = context.activations["target"].rows
    assert rows is not None
    truth = first_token_log_probs(context.subject, token_ids(context, "target"))
    assert torch.allclose(compute_next_token_log_probs(context.subject, rows[:, -1]), truth, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_logits_move_as_the_gradient_says(name: str) -> None:
    """The norm divides by the stream's length, which a small step at right angles to it does not change."""
    subject = tiny_subject(name)
    model = copy.deepcopy(subject.model).double()
    site = next(s for s in subject.sites if s.part == "unembed")
    stream, d = random_basis(subject.width, 2, 0, torch.float64) * subject.width**0.5
    if site.norm == "layer":  # and centers
        stream = stream - stream.mean()
        d = d - d.mean()
        d = d - stream * (stream @ d) / (stream @ stream)
    norm, head = model.get_submodule(site.gain), model.get_output_embeddings()
    step = 1e-2  # norms are computed in single precision, whatever the model's
    with torch.no_grad():
        moved = (head(norm(stream + step * d)) - head(norm(stream - step * d))) / (2 * step)
    expected = (moved - moved.mean()) / moved.std()
    found = torch.cat(list(compute_logit_effects(subject, d[None].float())))[0]
    assert torch.allclose(found.double(), expected, atol=1e-3)
