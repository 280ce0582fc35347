"""Logit lens of directions: the tokens that each stream's direction promotes and suppresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.analyze.base import AnalysisContext, analyses
from obliteratus.analyze.readout import compute_logit_effects
from obliteratus.analyze.significance import draw_unit_vectors
from obliteratus.core.shapes import Bool, Float, Int
from obliteratus.core.types import Subject
from obliteratus.report.curves import BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL = 0.95


@dataclass(frozen=True)
class Lens:
    """Through the final norm's gain and the unembedding; logits in standard deviations over the vocabulary."""

    promoted: tuple[tuple[str, ...], ...]
    """Of each stream, the tokens whose logits the direction raises most, first the highest; none where it is zero."""
    suppressed: tuple[tuple[str, ...], ...]
    """And lowers most."""
    high: Float[Tensor, "streams tokens"]
    """The logits of `compute_logit_effects`."""
    low: Float[Tensor, "streams tokens"]
    """The logits of `suppressed`."""
    limit: float
    """What |logit| no token reaches for as many random directions as there are streams, in 19 of 20 such sets."""
    sharing: Float[Tensor, " streams"]
    """Of the tokens a stream promotes, the share that the stream before promotes too, 0–1; zero at stream 0."""

    @property
    def significant(self) -> list[int]:
        """Streams whose direction promotes or suppresses a token more than random directions do any."""
        most = torch.maximum(self.high[:, 0], -self.low[:, 0])
        return [i for i, value in enumerate(most.tolist()) if value > self.limit]

    def to_dict(self) -> dict[str, Any]:
        """Tokens with their logits, stream by stream, and the limit that random directions give."""
        streams = [
            {"promoted": _pairs(up, high), "suppressed": _pairs(down, low)}
            for up, high, down, low in zip(self.promoted, self.high, self.suppressed, self.low, strict=True)
        ]
        return {"streams": streams, "limit": self.limit, "found": self.significant, "sharing": self.sharing.tolist()}

    def summary(self) -> str:
        """What the clearest stream promotes."""
        if not self.significant:
            return "no direction promotes or suppresses any token more than random directions do"
        best = max(self.significant, key=lambda i: max(float(self.high[i, 0]), -float(self.low[i, 0])))
        up, down = (" ".join(map(repr, tokens[best][:5])) for tokens in (self.promoted, self.suppressed))
        return (
            f"{len(self.significant)} streams beyond random directions; stream {best} promotes {up}, suppresses {down}"
        )

    def draw(self, figure: Figure) -> None:
        """The top and the bottom token's logit by stream, the first of them named at the clearest one."""
        label = "logit (standard deviations)"
        axes = figure.add_subplot(xlabel="stream", ylabel=label, title="what the directions promote")
        streams = range(len(self.high))
        axes.plot(streams, self.high[:, 0].tolist(), "o-", color=ORANGE, label="most promoted token")
        axes.plot(streams, self.low[:, 0].tolist(), "o-", color=BLUE, label="most suppressed token")
        for sign in (1, -1):
            axes.axhline(sign * self.limit, color=GREY, linestyle="--")
        axes.plot([], [], "--", color=GREY, label="random directions stay within")
        axes.legend()


def _pairs(tokens: tuple[str, ...], values: Tensor) -> list[tuple[str, float]]:
    return list(zip(tokens, values.tolist(), strict=False))


@analyses.register("lens", cite="nostalgebraist 2020, interpreting GPT: the logit lens")
def apply_logit_lens(
    context: AnalysisContext,
    *,
    tokens: Annotated[int, Field(ge=1, le=100)] = 10,
    random: Annotated[int, Field(ge=100, le=10000)] = 1000,
    seed: int = 0,
) -> Lens:
    """Which tokens each stream's first direction promotes and suppresses, beside what random directions do.

    Asks no pass: γ⊙d through the unembedding. A direction counts where a token's logit lies further out than any of
    ``random`` random directions' would by chance, over all streams together (5 %). tokens: listed at each end.
    """
    subject, rows = context.subject, context.directions.basis[:, 0]
    logits = list(compute_logit_effects(subject, rows))
    high, up = find_extreme_tokens(logits, tokens, largest=True)
    low, down = find_extreme_tokens(logits, tokens, largest=False)
    there = rows.any(1)
    return Lens(
        promoted=decode_tokens(subject, up, there),
        suppressed=decode_tokens(subject, down, there),
        high=high,
        low=low,
        limit=compute_random_limit(subject, int(there.sum()), random, seed),
        sharing=_sharing(up, there),
    )


def compute_random_limit(subject: Subject, streams: int, random: int, seed: int) -> float:
    """The largest |logit| over so many random directions: its 95 % point. The quantile 0.95^(1/streams) of one's."""
    units = draw_unit_vectors(random, subject.width, seed)
    largest = torch.cat([part.abs().amax(1) for part in compute_logit_effects(subject, units)])
    return float(torch.quantile(largest, LEVEL ** (1 / max(streams, 1))))


def find_extreme_tokens(logits: list[Tensor], k: int, largest: bool) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The k largest or smallest logits of each row, and their tokens; all of them where there are fewer."""
    found = [part.topk(min(k, part.shape[1]), dim=1, largest=largest) for part in logits]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def decode_tokens(
    subject: Subject, tokens: Int[Tensor, "n k"], there: Bool[Tensor, " n"]
) -> tuple[tuple[str, ...], ...]:
    """Tokens as text, none for rows that are not there; ids beyond the tokenizer, of a padded vocabulary, by number."""
    known = len(subject.tokenizer)

    def text(token: int) -> str:
        return str(subject.tokenizer.decode([token])) if token < known else f"#{token}"

    rows = zip(tokens.tolist(), there.tolist(), strict=True)
    return tuple(tuple(text(t) for t in row) if real else () for row, real in rows)


def _sharing(tokens: Int[Tensor, "streams k"], there: Tensor) -> Float[Tensor, " streams"]:
    """Of each stream's tokens, the share that is among the stream's before."""
    same = (tokens[1:, :, None] == tokens[:-1, None, :]).any(2).float().mean(1)
    return torch.cat([torch.zeros(1), same * (there[1:] & there[:-1])])
