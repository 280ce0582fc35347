"""The model's own way from its last stream to its vocabulary, for directions and for streams."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from obliteratus.causal.interventions import compute_head_logits
from obliteratus.core.shapes import Float
from obliteratus.core.types import Site, Subject
from obliteratus.summon.sites import read_gain
from obliteratus.weights.matrices import fetch_parameter

# Values in fp32 of one product with the unembedding: 64 MB.
VALUES = 16_000_000


def find_unembedding(subject: Subject) -> Site:
    """The matrix that reads the last stream."""
    return next(site for site in subject.sites if site.part == "unembed")


def find_final_norm(subject: Subject) -> nn.Module:
    """The norm between the last stream and the unembedding."""
    path = find_unembedding(subject).gain
    assert path is not None, "every family declares its final norm"
    return subject.module(path)


def compute_next_token_log_probs(
    subject: Subject, streams: Float[Tensor, "rows width"]
) -> Float[Tensor, "rows vocabulary"]:
    """Next-token log-probabilities of last streams, natural, fp32, on the CPU: norm, head, soft caps and scales."""
    norm, dtype = find_final_norm(subject), subject.model.dtype
    parts = []
    with torch.inference_mode():
        for some in streams.split(_rows(subject)):
            states = norm(some.to(subject.device, dtype))
            parts.append(compute_head_logits(subject, states).log_softmax(-1).cpu())
    return torch.cat(parts)


def compute_logit_effects(
    subject: Subject, directions: Float[Tensor, "n width"]
) -> Iterator[Float[Tensor, "some vocabulary"]]:
    """W_U(γ⊙d): by how much each direction, added to a stream of fixed length, moves each logit; in batches, fp32.

    A LayerNorm also centres, and its bias is no part of a direction. In units of the logits' standard deviation over
    the vocabulary, after their mean, which softmax does not see, is taken off. Soft caps and scales keep the order.
    """
    site = find_unembedding(subject)
    weight, gain = (
        fetch_parameter(subject.model.get_output_embeddings(), "weight").detach(),
        read_gain(subject.model, site),
    )
    for some in directions.split(_rows(subject)):
        rows = some.to(weight.device, torch.float32)
        rows = rows - rows.mean(1, keepdim=True) if site.norm == "layer" else rows
        rows = rows if gain is None else rows * gain.to(rows)
        logits = (rows.to(weight.dtype) @ weight.T).float()
        logits = logits - logits.mean(1, keepdim=True)
        yield (logits / logits.std(1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)).cpu()


def _rows(subject: Subject) -> int:
    return max(1, VALUES // len(subject.model.get_output_embeddings().weight))
