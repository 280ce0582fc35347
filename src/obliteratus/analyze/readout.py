"""From the model's last stream to its vocabulary: next-token log-probabilities, and the logits of directions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from obliteratus.causal.interventions import compute_head_logits
from obliteratus.core.shapes import Float
from obliteratus.core.types import Site, Subject
from obliteratus.summon.sites import read_gain
from obliteratus.weights.matrices import fetch_parameter

MOST_VALUES = 16_000_000  # of one product with the unembedding: 64 MB in fp32


def find_unembedding(subject: Subject) -> Site:
    """Return the matrix that reads the last stream."""
    return next(site for site in subject.sites if site.part == "unembed")


def find_final_norm(subject: Subject) -> nn.Module:
    """Return the norm between the last stream and the unembedding."""
    path = find_unembedding(subject).gain
    assert path is not None, "every architecture declares its final norm"
    return subject.module(path)


def compute_next_token_log_probs(
    subject: Subject, streams: Float[Tensor, "rows width"]
) -> Float[Tensor, "rows vocabulary"]:
    """Return the next token's log-probabilities (natural, fp32, on the CPU) of rows of the last stream.

    The rows pass the final norm, the head, soft caps and scales.
    """
    norm, dtype = find_final_norm(subject), subject.model.dtype
    parts = []
    with torch.inference_mode():
        for rows in streams.split(_rows_per_product(subject)):
            states = norm(rows.to(subject.device, dtype))
            parts.append(compute_head_logits(subject, states).log_softmax(-1).cpu())
    return torch.cat(parts)


def compute_logit_effects(
    subject: Subject, directions: Float[Tensor, "n width"]
) -> Iterator[Float[Tensor, "rows vocabulary"]]:
    """Yield W_U(γ⊙d) in batches: by how much each direction moves each logit when added to a stream of fixed length.

    A LayerNorm also centers; its bias is not part of a direction. The logits' mean over the vocabulary, which softmax
    ignores, is removed, and the unit is their standard deviation over the vocabulary. Soft caps and scales, which do
    not change the order, are left out. fp32.
    """
    site = find_unembedding(subject)
    weight = fetch_parameter(subject.model.get_output_embeddings(), "weight").detach()
    gain = read_gain(subject.model, site)
    for batch in directions.split(_rows_per_product(subject)):
        rows = batch.to(weight.device, torch.float32)
        rows = rows - rows.mean(1, keepdim=True) if site.norm == "layer" else rows
        rows = rows if gain is None else rows * gain.to(rows)
        logits = (rows.to(weight.dtype) @ weight.T).float()
        logits = logits - logits.mean(1, keepdim=True)
        yield (logits / logits.std(1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)).cpu()


def _rows_per_product(subject: Subject) -> int:
    return max(1, MOST_VALUES // len(subject.model.get_output_embeddings().weight))
