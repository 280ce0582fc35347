"""The losses of a direction that is fitted by gradients through the model (`rdo`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from obliteratus.causal.interventions import Pair, ablate, add_to_stream, compute_answer_logits, concatenate_answers, compute_head_logits
from obliteratus.core.shapes import Float
from obliteratus.core.types import Subject

ABLATION_WEIGHT, ADDITION_WEIGHT, RETAIN_WEIGHT = 1.0, 0.2, 1.0  # weights of the three losses, arXiv:2502.17420
ROWS_PER_PASS = 8  # prompts of one pass with gradients, about 1 MB a token of SmolLM2-135M


@dataclass(frozen=True)
class LossInputs:
    """What the losses are taken on. All answers come from the model itself, under the direction it starts from."""

    answers: Sequence[Pair]
    """Target prompts with what the model says when the direction is ablated."""
    refusals: Sequence[Pair]
    """Control prompts with what it says when the direction is added."""
    kept: Sequence[Pair]
    """Control prompts with its own answers."""


class ReferenceLogits:
    """What the untouched model says. Each pair passes once: what enters the head is kept, since it never changes."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.states: dict[str, Tensor] = {}

    @torch.no_grad()
    def logp(self, pairs: Sequence[Pair]) -> Float[Tensor, "tokens vocabulary"]:
        """Log-probabilities that predict the answers' tokens, all answers one after the other."""
        new = [pair for pair in pairs if str(pair) not in self.states]
        if new:
            seen: list[Tensor] = []
            compute_answer_logits(self.subject, new, seen.append)
            parts = seen[-1].split([len(answer) for _, answer in new])
            self.states |= {str(pair): part for pair, part in zip(new, parts, strict=True)}
        return compute_head_logits(self.subject, torch.cat([self.states[str(pair)] for pair in pairs])).log_softmax(-1)


class DirectionLosses:
    """The three losses of a direction, part by part, so that the graph of one part is all that is ever held.

    stream, size: where and how long a vector is added.
    """

    def __init__(self, subject: Subject, stream: int, size: float, retain: float = RETAIN_WEIGHT) -> None:
        self.subject, self.stream, self.size, self.retain = subject, stream, size, retain
        self.own = ReferenceLogits(subject)

    def total(self, unit: Float[Tensor, " width"], material: LossInputs) -> Float[Tensor, ""]:
        """Ablation + 0.2 × addition + retain × KL, in nats a token."""
        return torch.stack(list(self.parts(unit, material))).sum()

    def parts(self, unit: Float[Tensor, " width"], material: LossInputs) -> Iterator[Float[Tensor, ""]]:
        """What adds up to `total`, `ROWS_PER_PASS` prompts at a time."""
        for pairs, weight in _shares(material.answers, ABLATION_WEIGHT):
            with ablate(self.subject, unit):
                yield weight * self._surprise(pairs)
        for pairs, weight in _shares(material.refusals, ADDITION_WEIGHT):
            with add_to_stream(self.subject, self.stream, self.size * unit):
                yield weight * self._surprise(pairs)
        for pairs, weight in _shares(material.kept, self.retain):
            base = self.own.logp(pairs)
            with ablate(self.subject, unit):
                found = compute_answer_logits(self.subject, pairs).log_softmax(-1)
                yield weight * F.kl_div(found, base, reduction="sum", log_target=True)

    def _surprise(self, pairs: Sequence[Pair]) -> Float[Tensor, ""]:
        logits = compute_answer_logits(self.subject, pairs)
        return F.cross_entropy(logits, concatenate_answers(pairs, self.subject.device), reduction="sum")


def _shares(pairs: Sequence[Pair], weight: float) -> Iterator[tuple[Sequence[Pair], float]]:
    """`ROWS_PER_PASS` pairs at a time, and the weight of each of their tokens' losses."""
    tokens = sum(len(answer) for _, answer in pairs)
    for first in range(0, len(pairs), ROWS_PER_PASS):
        yield pairs[first : first + ROWS_PER_PASS], weight / tokens
