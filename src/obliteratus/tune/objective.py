"""What a tuned plan is pulled by, on prompts with their answers: KL of controls, a hinge and the drift of targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from obliteratus.causal.interventions import Pair, answer_tokens
from obliteratus.core.settings import Tune
from obliteratus.core.shapes import Float

LogP = Float[Tensor, "tokens vocabulary"]
"""Log-probabilities that predict the answers' tokens, all answers one after the other."""


@dataclass(frozen=True)
class LossTerms:
    """How far a plan is off, nats a token."""

    kl: Float[Tensor, ""]
    """KL(base ‖ edited): of controls' first tokens, plus of all tokens of their answers."""
    hinge: Float[Tensor, ""]
    """Mean over target prompts of what their answers lack of their lead (`margin_shortfall`): 0 once none refuses."""
    drift: Float[Tensor, ""]
    """KL(base ‖ edited) where the base would say the same as target prompts' answers, all behind their opening:
    degenerate answers show here."""
    nll: Float[Tensor, ""]
    """What the tokens of answers cost that the base would not say, mean over target prompts."""

    def total(self, how: Tune) -> Float[Tensor, ""]:
        """What is made small."""
        return self.kl + how.weight * self.hinge + how.coherence * self.drift

    def __add__(self, other: LossTerms) -> LossTerms:
        return LossTerms(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


NO_PULL = LossTerms(*(torch.zeros(()) for _ in range(4)))


def control_loss(found: LogP, base: LogP, pairs: Sequence[Pair], share: float = 1.0) -> LossTerms:
    """The pull of some controls, times ``share``. found, base: of the model as it is now, and untouched."""
    each = F.kl_div(found, base, reduction="none", log_target=True).sum(-1)
    first = [part[0] for part in each.split(_sizes(pairs))]
    kl = share * (torch.stack(first).mean() + each.mean())
    return LossTerms(kl, *(kl.new_zeros(()) for _ in range(3)))


def target_loss(found: LogP, base: LogP, pairs: Sequence[Pair], lead: float, share: float = 1.0) -> LossTerms:
    """The pull of some target prompts, likewise."""
    tokens, rivals = answer_tokens(pairs, found.device), base.argmax(-1)
    same = rivals == tokens
    hinge = margin_shortfall(found, tokens, rivals, lead).sum() / len(pairs)
    drift = (F.kl_div(found, base, reduction="none", log_target=True).sum(-1) * same).sum() / same.sum().clamp(min=1)
    cost = -(_at(found, tokens) * ~same).sum().detach() / len(pairs)
    return LossTerms(drift.new_zeros(()), share * hinge, share * drift, share * cost)


def margin_shortfall(found: LogP, tokens: Tensor, rivals: Tensor, lead: float) -> Float[Tensor, " tokens"]:
    """What each token lacks, in nats, to be by ``lead`` likelier than its rival, that which the base would say there.

    A greedy answer takes the likelier one: so this, and not the token's own probability, says whether it refuses. 0
    where the base would say the same.
    """
    return F.relu(lead + _at(found, rivals) - _at(found, tokens)) * (rivals != tokens)


def _at(logp: LogP, tokens: Tensor) -> Float[Tensor, " tokens"]:
    return logp.gather(1, tokens[:, None])[:, 0]


def _sizes(pairs: Sequence[Pair]) -> list[int]:
    return [len(answer) for _, answer in pairs]
