"""The loss of TUNE on prompts with answers: KL on control prompts, hinge loss and drift on target prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from obliteratus.causal.interventions import Pair, concatenate_answers
from obliteratus.core.shapes import Float

LogProbs = Float[Tensor, "tokens vocabulary"]
"""Log-probabilities that predict the answers' tokens, all answers concatenated."""


@dataclass(frozen=True)
class LossTerms:
    """The terms of the loss. KL and drift are means over tokens, hinge and nll sums over each prompt's answer."""

    kl: Float[Tensor, ""]
    """KL(base ‖ edited) of control prompts: mean over first tokens plus mean over all tokens of their answers; nats a
    token."""
    hinge: Float[Tensor, ""]
    """Mean over target prompts of what their answers fall short of the margin (`margin_shortfall`), summed over the
    answer's tokens; nats a prompt."""
    drift: Float[Tensor, ""]
    """KL(base ‖ edited) of target prompts, over the tokens that the base model would also choose, which follow the
    opening; nats a token. Degenerate answers show here."""
    nll: Float[Tensor, ""]
    """Negative log-likelihood of the tokens that the base model would not choose, summed over each answer, mean over
    target prompts; nats a prompt. It is reported, and not part of the loss."""

    def total(self, weight: float, coherence: float) -> Float[Tensor, ""]:
        """Return the weighted sum that is minimized. weight: factor on the hinge loss. coherence: on the drift."""
        return self.kl + weight * self.hinge + coherence * self.drift

    def __add__(self, other: LossTerms) -> LossTerms:
        return LossTerms(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


ZERO_LOSS = LossTerms(*(torch.zeros(()) for _ in range(4)))


def control_loss(edited: LogProbs, base: LogProbs, pairs: Sequence[Pair], share: float = 1.0) -> LossTerms:
    """Return the loss on control pairs, times ``share``.

    edited, base: log-probabilities of the model under the live edits, and of the unedited model.
    """
    per_token = F.kl_div(edited, base, reduction="none", log_target=True).sum(-1)
    first = [part[0] for part in per_token.split(_answer_lengths(pairs))]
    kl = share * (torch.stack(first).mean() + per_token.mean())
    return LossTerms(kl, *(kl.new_zeros(()) for _ in range(3)))


def target_loss(
    edited: LogProbs, base: LogProbs, pairs: Sequence[Pair], margin: float, share: float = 1.0
) -> LossTerms:
    """Return the loss on target pairs, times ``share``. The arguments are those of `control_loss`."""
    tokens, base_tokens = concatenate_answers(pairs, edited.device), base.argmax(-1)
    same = base_tokens == tokens
    hinge = margin_shortfall(edited, tokens, base_tokens, margin).sum() / len(pairs)
    drift = (F.kl_div(edited, base, reduction="none", log_target=True).sum(-1) * same).sum() / same.sum().clamp(min=1)
    nll = -(_pick(edited, tokens) * ~same).sum().detach() / len(pairs)
    return LossTerms(drift.new_zeros(()), share * hinge, share * drift, share * nll)


def margin_shortfall(edited: LogProbs, tokens: Tensor, base_tokens: Tensor, margin: float) -> Float[Tensor, " tokens"]:
    """Return by how many nats each token falls short of being ``margin`` nats likelier than the base model's choice.

    Greedy decoding takes the likelier of the two tokens, so this difference decides whether an answer refuses; the
    token's own probability does not. 0 where the base model would choose the same token.
    """
    return F.relu(margin + _pick(edited, base_tokens) - _pick(edited, tokens)) * (base_tokens != tokens)


def _pick(logp: LogProbs, tokens: Tensor) -> Float[Tensor, " tokens"]:
    return logp.gather(1, tokens[:, None])[:, 0]


def _answer_lengths(pairs: Sequence[Pair]) -> list[int]:
    return [len(answer) for _, answer in pairs]
