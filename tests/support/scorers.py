"""Builders for tests of scorers."""

from __future__ import annotations

import torch
from torch import Tensor

from obliteratus.core.types import Subject
from obliteratus.verify import Measurement


def plain_log_probs(subject: Subject, row: list[int]) -> Tensor:
    """Return what plain transformers predicts after each token of the row, [tokens, vocabulary] in fp64."""
    return subject.model(torch.tensor([row])).logits[0].double().log_softmax(-1)


def refusal_records(records: list[tuple[str, str, str]]) -> Measurement:
    """Return what the refusal scorer leaves for others, from (group, answer, verdict)."""
    return Measurement(records=[{"scorer": "behavior", "group": g, "answer": a, "verdict": v} for g, a, v in records])
