"""The first tokens of a model's refusals: as the user names them or as the model shows them, and their log-odds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.shapes import Float
from obliteratus.core.types import Subject
from obliteratus.inference.chat_template import encode_texts

# A token that begins fewer than one answer in twenty hardly changes the mean log-odds. At four times its share among
# control prompts it changes them by log 4, which is more than prompts of one group differ by. Published token sets were
# written by hand.
MIN_SHARE, MIN_RATIO = 0.05, 4.0


def log_odds(logp: Float[Tensor, "rows vocabulary"], tokens: Sequence[int]) -> Float[Tensor, " rows"]:
    """Return log Σ_{t∈R} p_t − log Σ_{t∉R} p_t of each row, in nats, fp64.

    Published code adds 1e-8 to both sums, which caps the value at ±18.4; logarithms need no such help.
    """
    chosen = torch.zeros(logp.shape[-1], dtype=torch.bool)
    chosen[list(tokens)] = True
    values = logp.double()
    odds: Tensor = values[:, chosen].logsumexp(-1) - values[:, ~chosen].logsumexp(-1)
    return odds


def typical_openings(
    target: Float[Tensor, " vocabulary"], control: Float[Tensor, " vocabulary"], step: str, least: float = MIN_SHARE
) -> list[int]:
    """Return `frequent_openings`. Raises UserError if there are none."""
    tokens = frequent_openings(target, control, least)
    if not tokens:
        raise UserError(
            f"distill step '{step}': no token is typical of this model's answers to target prompts; name those that "
            'begin its refusals, e.g. tokens = ["I", "Sorry"]'
        )
    return tokens


def frequent_openings(
    target: Float[Tensor, " vocabulary"], control: Float[Tensor, " vocabulary"], least: float = MIN_SHARE
) -> list[int]:
    """Return tokens with at least ``least`` on target prompts and four times what they have on control prompts.

    target, control: each token's mean probability, or share of answers.
    """
    tokens = ((target >= least) & (target >= MIN_RATIO * control)).nonzero()[:, 0].tolist()
    return [int(token) for token in tokens]


def opening_tokens(subject: Subject, tokens: Sequence[str], step: str) -> list[int]:
    """Return the first token of each text, sorted. Raises UserError for a text without tokens."""
    ids = encode_texts(subject, tokens)
    for text, row in zip(tokens, ids, strict=True):
        if not row:
            raise UserError(f"distill step '{step}': tokens holds '{text}', for which the tokenizer returns no token")
    return sorted({row[0] for row in ids})


def openings_to_text(subject: Subject, tokens: Sequence[int]) -> str:
    """Return the tokens as quoted texts, for a note."""
    return " ".join(repr(subject.tokenizer.decode([token])) for token in tokens)
