"""What a tuned plan is pulled by, on prompts with their answers: KL of controls, a hinge and the drift of targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from obliteratus.shapes import Float
from obliteratus.tune.answers import OPENING
from obliteratus.tune.lab import Pair, answer_logits, answer_tokens
from obliteratus.types import Subject

Base = Float[Tensor, "tokens vocabulary"]
"""Log-probabilities of the untouched model at the answers' tokens, all answers one after the other."""


@dataclass(frozen=True)
class Pull:
    """How far a plan is off, nats a token."""

    kl: Float[Tensor, ""]
    """KL(base ‖ edited): of controls' first tokens, plus of all tokens of their answers."""
    hinge: Float[Tensor, ""]
    """Mean over target prompts of what their answers' opening costs above the level: 0 once none refuses."""
    drift: Float[Tensor, ""]
    """KL(base ‖ edited) of target prompts' answers behind their opening: degenerate answers show here."""
    nll: Float[Tensor, ""]
    """What an answer's opening costs, mean over target prompts."""

    def total(self, weight: float) -> Float[Tensor, ""]:
        """What is made small."""
        return self.kl + weight * self.hinge + self.drift

    def __add__(self, other: Pull) -> Pull:
        return Pull(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


NO_PULL = Pull(*(torch.zeros(()) for _ in range(4)))


def pull_control(subject: Subject, base: Base, pairs: Sequence[Pair], share: float = 1.0) -> Pull:
    """The pull of some controls on the model as it is inside `applied`, times ``share``."""
    found = answer_logits(subject, pairs).log_softmax(-1)
    each = F.kl_div(found, base, reduction="none", log_target=True).sum(-1)
    first = [part[0] for part in each.split(_sizes(pairs))]
    kl = share * (torch.stack(first).mean() + each.mean())
    return Pull(kl, *(kl.new_zeros(()) for _ in range(3)))


def pull_target(subject: Subject, base: Base, pairs: Sequence[Pair], level: float, share: float = 1.0) -> Pull:
    """The pull of some target prompts, likewise, from one pass."""
    found = answer_logits(subject, pairs).log_softmax(-1)
    losses = -found.gather(1, answer_tokens(pairs, subject.device)[:, None])[:, 0]
    openings = torch.stack([x[:OPENING].mean() for x in losses.split(_sizes(pairs))])
    drifts = F.kl_div(found, base, reduction="none", log_target=True).sum(-1).split(_sizes(pairs))
    drift = torch.cat([x[OPENING:] for x in drifts]).mean()
    hinge = F.relu(openings - level).mean()
    return Pull(drift.new_zeros(()), share * hinge, share * drift, share * openings.mean().detach())


def _sizes(pairs: Sequence[Pair]) -> list[int]:
    return [len(answer) for _, answer in pairs]
