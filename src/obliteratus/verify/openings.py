"""By which tokens a model refuses: named by the user, or read off the model, and how far it leans to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.shapes import Float
from obliteratus.core.types import Subject

# A token that begins fewer than one answer in twenty moves no mean log-odds; at four times the share among the
# controls it moves them by log 4, more than prompts of one group differ by. Published sets were written by hand.
SHARE, TIMES = 0.05, 4.0


def log_odds(logp: Float[Tensor, "rows vocabulary"], tokens: Sequence[int]) -> Float[Tensor, " rows"]:
    """log Σ_{t∈R} p_t − log Σ_{t∉R} p_t of each row, in nats, fp64.

    Published code adds 1e-8 to both sums, which caps the value at ±18.4; logarithms need no such help.
    """
    chosen = torch.zeros(logp.shape[-1], dtype=torch.bool)
    chosen[list(tokens)] = True
    values = logp.double()
    odds: Tensor = values[:, chosen].logsumexp(-1) - values[:, ~chosen].logsumexp(-1)
    return odds


def typical_openings(
    target: Float[Tensor, " vocabulary"], control: Float[Tensor, " vocabulary"], step: str, least: float = SHARE
) -> list[int]:
    """Tokens with at least ``least`` on target prompts and at least four times what they have on control prompts.

    target, control: mean probability, or share of answers, of each token. Raises UserError where there is none.
    """
    found = frequent_openings(target, control, least)
    if not found:
        raise UserError(
            f"distill step '{step}': no token is typical of this model's answers to target prompts; name those that "
            'begin its refusals, e.g. tokens = ["I", "Sorry"]'
        )
    return found


def frequent_openings(
    target: Float[Tensor, " vocabulary"], control: Float[Tensor, " vocabulary"], least: float = SHARE
) -> list[int]:
    """The same; empty where there is none."""
    found = ((target >= least) & (target >= TIMES * control)).nonzero()[:, 0].tolist()
    return [int(token) for token in found]


def opening_tokens(subject: Subject, tokens: Sequence[str], step: str) -> list[int]:
    """The first token of each text. Raises UserError for a text without tokens."""
    ids = [subject.tokenizer(text, add_special_tokens=False)["input_ids"][:1] for text in tokens]
    for text, found in zip(tokens, ids, strict=True):
        if not found:
            raise UserError(f"distill step '{step}': tokens holds '{text}', which the tokenizer makes nothing of")
    return sorted({int(found[0]) for found in ids})


def openings_to_text(subject: Subject, tokens: Sequence[int]) -> str:
    """Tokens as text, for a note."""
    return " ".join(repr(subject.tokenizer.decode([token])) for token in tokens)
