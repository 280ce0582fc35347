"""The losses of a direction that is fitted by gradients through the model, as the step `rdo` does.

As in the authors' code, each is a mean over prompts: of a prompt's cross-entropy in nats a token, and of its KL summed
over the answer's tokens, which therefore weighs about 30 times as much. KL is KL(ablated ‖ unedited).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from obliteratus.causal.interventions import (
    Pair,
    ablate,
    add_to_stream,
    compute_answer_logits,
    compute_head_logits,
    concatenate_answers,
)
from obliteratus.core.shapes import Float
from obliteratus.core.types import Subject

ABLATION_WEIGHT, ADDITION_WEIGHT, RETAIN_WEIGHT = 1.0, 0.2, 1.0  # weights of the three losses, arXiv:2502.17420
ROWS_PER_PASS = 8  # prompts of one pass with gradients, which take about 1 MB a token on SmolLM2-135M


@dataclass(frozen=True)
class LossInputs:
    """Prompts with answers that the losses are computed on. The model wrote all of them, under the start direction."""

    answers: Sequence[Pair]
    """Target prompts with the answers under ablation of the direction."""
    refusals: Sequence[Pair]
    """Control prompts with the first sentence of the answer under addition of the direction."""
    own_answers: Sequence[Pair]
    """Control prompts with the unedited model's own answers."""


class ReferenceLogits:
    """The unedited model's predictions. Each pair runs once: the input of the head is cached, as it never changes."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.states: dict[str, Tensor] = {}

    @torch.no_grad()
    def logp(self, pairs: Sequence[Pair]) -> Float[Tensor, "tokens vocabulary"]:
        """Return the log-probabilities that predict the answers' tokens, one answer after the other."""
        new = [pair for pair in pairs if str(pair) not in self.states]
        if new:
            states: list[Tensor] = []
            compute_answer_logits(self.subject, new, states.append)
            parts = states[-1].split([len(answer) for _, answer in new])
            self.states |= {str(pair): part for pair, part in zip(new, parts, strict=True)}
        return compute_head_logits(self.subject, torch.cat([self.states[str(pair)] for pair in pairs])).log_softmax(-1)


class DirectionLosses:
    """The three losses of a direction, computed part by part so that memory holds the graph of one part only.

    stream, size: the stream that the direction is added to, and the length of what is added.
    """

    def __init__(self, subject: Subject, stream: int, size: float, retain: float = RETAIN_WEIGHT) -> None:
        self.subject, self.stream, self.size, self.retain = subject, stream, size, retain
        self.reference = ReferenceLogits(subject)

    def total(self, unit: Float[Tensor, " width"], inputs: LossInputs) -> Float[Tensor, ""]:
        """Return ablation + 0.2 × addition in nats a token, + retain × KL in nats an answer."""
        return torch.stack(list(self.parts(unit, inputs))).sum()

    def parts(self, unit: Float[Tensor, " width"], inputs: LossInputs) -> Iterator[Float[Tensor, ""]]:
        """Yield losses that sum to `total`, of `ROWS_PER_PASS` prompts at a time."""
        for pairs, weight in _split_passes(inputs.answers, ABLATION_WEIGHT):
            with ablate(self.subject, unit):
                yield weight * self._cross_entropy(pairs)
        for pairs, weight in _split_passes(inputs.refusals, ADDITION_WEIGHT):
            with add_to_stream(self.subject, self.stream, self.size * unit):
                yield weight * self._cross_entropy(pairs)
        for pairs, weight in _split_passes(inputs.own_answers, self.retain):
            base = self.reference.logp(pairs)
            with ablate(self.subject, unit):
                edited = compute_answer_logits(self.subject, pairs).log_softmax(-1)
                yield weight * F.kl_div(base, edited, reduction="sum", log_target=True)

    def _cross_entropy(self, pairs: Sequence[Pair]) -> Float[Tensor, ""]:
        """Return the sum over prompts of the mean over each answer's tokens."""
        logits = compute_answer_logits(self.subject, pairs)
        each = F.cross_entropy(logits, concatenate_answers(pairs, self.subject.device), reduction="none")
        return torch.stack([part.mean() for part in each.split([len(answer) for _, answer in pairs])]).sum()


def _split_passes(pairs: Sequence[Pair], weight: float) -> Iterator[tuple[Sequence[Pair], float]]:
    """Yield `ROWS_PER_PASS` pairs at a time, with the weight of each pair's loss."""
    for first in range(0, len(pairs), ROWS_PER_PASS):
        yield pairs[first : first + ROWS_PER_PASS], weight / len(pairs)
