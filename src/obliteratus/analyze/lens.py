"""Logit lens of directions: the tokens that each stream's direction promotes and suppresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.analyze.base import AnalysisContext, analyses
from obliteratus.analyze.readout import compute_logit_effects
from obliteratus.analyze.significance import draw_unit_vectors
from obliteratus.core.shapes import Bool, Float, Int
from obliteratus.core.types import Subject
from obliteratus.report.curves import BLUE, GREY, ORANGE, Figure

QUANTILE = 0.95


@dataclass(frozen=True)
class Lens:
    """Tokens by the logits of the directions, through the final norm's gain and the unembedding.

    Logits are in standard deviations over the vocabulary.
    """

    promoted: tuple[tuple[str, ...], ...]
    """For each stream, the tokens whose logits its direction raises most, highest first; none for a zero direction."""
    suppressed: tuple[tuple[str, ...], ...]
    """For each stream, the tokens whose logits it lowers most, lowest first."""
    high: Float[Tensor, "streams tokens"]
    """Logits of the promoted tokens."""
    low: Float[Tensor, "streams tokens"]
    """Logits of the suppressed tokens."""
    limit: float
    """The |logit| that no token reaches in 19 of 20 sets of as many random directions as there are streams."""
    sharing: Float[Tensor, " streams"]
    """Share of a stream's promoted tokens that the stream before promotes too, 0–1; zero at stream 0."""

    @property
    def significant(self) -> list[int]:
        """Streams whose direction moves a token's logit more than random directions move any."""
        most = torch.maximum(self.high[:, 0], -self.low[:, 0])
        return [i for i, value in enumerate(most.tolist()) if value > self.limit]

    def to_dict(self) -> dict[str, Any]:
        """Return tokens with their logits by stream, and the limit from random directions."""
        streams = [
            {"promoted": _pair(up, high), "suppressed": _pair(down, low)}
            for up, high, down, low in zip(self.promoted, self.high, self.suppressed, self.low, strict=True)
        ]
        return {"streams": streams, "limit": self.limit, "found": self.significant, "sharing": self.sharing.tolist()}

    def summary(self) -> str:
        """Return what the clearest stream promotes and suppresses."""
        if not self.significant:
            return "no direction promotes or suppresses any token more than random directions do"
        best = max(self.significant, key=lambda i: max(float(self.high[i, 0]), -float(self.low[i, 0])))
        up, down = (" ".join(map(repr, tokens[best][:5])) for tokens in (self.promoted, self.suppressed))
        count = len(self.significant)
        return f"{count} streams beyond random directions; stream {best} promotes {up}, suppresses {down}"

    def draw(self, figure: Figure) -> None:
        """Draw the highest and lowest logit by stream, between the limits of random directions."""
        label = "logit (standard deviations)"
        axes = figure.add_subplot(xlabel="stream", ylabel=label, title="what the directions promote")
        streams = range(len(self.high))
        axes.plot(streams, self.high[:, 0].tolist(), "o-", color=ORANGE, label="most promoted token")
        axes.plot(streams, self.low[:, 0].tolist(), "o-", color=BLUE, label="most suppressed token")
        for sign in (1, -1):
            axes.axhline(sign * self.limit, color=GREY, linestyle="--")
        axes.plot([], [], "--", color=GREY, label="random directions stay within")
        axes.legend()


def _pair(tokens: tuple[str, ...], values: Tensor) -> list[tuple[str, float]]:
    return list(zip(tokens, values.tolist(), strict=False))


@analyses.register("lens", cite="nostalgebraist 2020, interpreting GPT: the logit lens")
def apply_logit_lens(
    context: AnalysisContext,
    *,
    tokens: Annotated[int, Field(ge=1, le=100)] = 10,
    random: Annotated[int, Field(ge=100, le=10000)] = 1000,
    seed: int = 0,
) -> Lens:
    """List the tokens that each stream's first direction promotes and suppresses, beside random directions.

    The direction times the final norm's gain goes through the unembedding, which needs no forward pass. A direction is
    significant where a token's logit is further out than any of ``random`` random directions would put one by chance,
    over all streams together (5 %). tokens: how many are listed at each end.
    """
    subject, rows = context.subject, context.directions.basis[:, 0]
    logits = list(compute_logit_effects(subject, rows))
    high, up = find_extreme_tokens(logits, tokens, largest=True)
    low, down = find_extreme_tokens(logits, tokens, largest=False)
    present = rows.any(1)
    return Lens(
        promoted=decode_tokens(subject, up, present),
        suppressed=decode_tokens(subject, down, present),
        high=high,
        low=low,
        limit=compute_random_limit(subject, int(present.sum()), random, seed),
        sharing=_compute_sharing(up, present),
    )


def compute_random_limit(subject: Subject, streams: int, random: int, seed: int) -> float:
    """Return the 95 % point of the largest |logit| over ``streams`` random directions.

    That is the quantile 0.95^(1/streams) of a single direction's largest |logit|.
    """
    units = draw_unit_vectors(random, subject.width, seed)
    largest = torch.cat([part.abs().amax(1) for part in compute_logit_effects(subject, units)])
    return float(torch.quantile(largest, QUANTILE ** (1 / max(streams, 1))))


def find_extreme_tokens(logits: list[Tensor], k: int, largest: bool) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """Return the k largest or smallest logits of each row and their tokens; all where the vocabulary is smaller."""
    extremes = [part.topk(min(k, part.shape[1]), dim=1, largest=largest) for part in logits]
    return torch.cat([e.values for e in extremes]), torch.cat([e.indices for e in extremes])


def decode_tokens(
    subject: Subject, tokens: Int[Tensor, "n k"], present: Bool[Tensor, " n"]
) -> tuple[tuple[str, ...], ...]:
    """Return tokens as text, none for rows that are not present.

    Ids beyond the tokenizer's, as a padded vocabulary has them, are shown by number.
    """
    known = len(subject.tokenizer)

    def text(token: int) -> str:
        return str(subject.tokenizer.decode([token])) if token < known else f"#{token}"

    rows = zip(tokens.tolist(), present.tolist(), strict=True)
    return tuple(tuple(text(t) for t in row) if real else () for row, real in rows)


def _compute_sharing(tokens: Int[Tensor, "streams k"], present: Tensor) -> Float[Tensor, " streams"]:
    """Return the share of each stream's tokens that are also the previous stream's."""
    same = (tokens[1:, :, None] == tokens[:-1, None, :]).any(2).float().mean(1)
    return torch.cat([torch.zeros(1), same * (present[1:] & present[:-1])])
