"""Logit lens of directions: the tokens that each stream's direction promotes and suppresses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.analyze.base import AnalysisContext, analyses
from obliteratus.analyze.chance import draw_chance_directions
from obliteratus.analyze.readout import compute_logit_effects
from obliteratus.analyze.samples import (
    LEVEL,
    Draws,
    Level,
    Sample,
    compute_thresholds,
    familywise_p_values,
    read_sample,
)
from obliteratus.core.shapes import Bool, Float, Int
from obliteratus.core.types import Subject
from obliteratus.report.curves import BLUE, GREY, ORANGE, Figure

DRAWS = 199  # p = 0.005 at best; each costs a product with the unembedding at every stream


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
    limit: Float[Tensor, " streams"]
    """A stream whose largest |logit| exceeds this is significant at the level, corrected for all streams."""
    p: Float[Tensor, " streams"]
    """p values of the largest |logit| among directions of random labels, corrected for all streams; 1 for a zero
    direction."""
    level: float
    sharing: Float[Tensor, " streams"]
    """Share of a stream's promoted tokens that the stream before promotes too, 0–1; zero at stream 0."""

    @property
    def significant(self) -> list[int]:
        """Streams whose direction moves a token's logit more than directions of random labels move any."""
        return (self.p <= self.level).nonzero().flatten().tolist()

    def to_dict(self) -> dict[str, Any]:
        """Return tokens with their logits by stream, and the limits from directions of random labels."""
        streams = [
            {"promoted": _pair(up, high), "suppressed": _pair(down, low)}
            for up, high, down, low in zip(self.promoted, self.high, self.suppressed, self.low, strict=True)
        ]
        tested = {"level": self.level, "limit": self.limit.tolist(), "p": self.p.tolist(), "found": self.significant}
        return {"streams": streams, **tested, "sharing": self.sharing.tolist()}

    def summary(self) -> str:
        """Return what the clearest stream promotes and suppresses."""
        if not self.significant:
            return f"no direction moves any token more than those of random labels do (level {self.level:g})"
        best = max(self.significant, key=lambda i: max(float(self.high[i, 0]), -float(self.low[i, 0])))
        up, down = (" ".join(map(repr, tokens[best][:5])) for tokens in (self.promoted, self.suppressed))
        count = len(self.significant)
        beyond = f"{count} of {len(self.p)} streams beyond random labels (level {self.level:g} over all)"
        return f"{beyond}; stream {best} promotes {up}, suppresses {down}"

    def draw(self, figure: Figure) -> None:
        """Draw the highest and lowest logit by stream, between the limits of random labels."""
        label = "logit (standard deviations)"
        axes = figure.add_subplot(xlabel="stream", ylabel=label, title="what the directions promote")
        streams = range(len(self.high))
        axes.plot(streams, self.high[:, 0].tolist(), "o-", color=ORANGE, label="most promoted token")
        axes.plot(streams, self.low[:, 0].tolist(), "o-", color=BLUE, label="most suppressed token")
        for sign in (1, -1):
            axes.plot(streams, (sign * self.limit).tolist(), "--", color=GREY)
        axes.plot([], [], "--", color=GREY, label="random labels stay within")
        axes.legend()


def _pair(tokens: tuple[str, ...], values: Tensor) -> list[tuple[str, float]]:
    return list(zip(tokens, values.tolist(), strict=False))


@analyses.register("lens", cite="nostalgebraist 2020, interpreting GPT: the logit lens", needs=("rows",))
def apply_logit_lens(
    context: AnalysisContext,
    *,
    tokens: Annotated[int, Field(ge=1, le=100)] = 10,
    draws: Draws = DRAWS,
    level: Level = LEVEL,
    seed: int = 0,
) -> Lens:
    """List the tokens that each stream's first direction promotes and suppresses, beside those of random labels.

    The direction times the final norm's gain goes through the unembedding, which needs no forward pass. A direction is
    significant where a token's logit is further out than ``draws`` differences of means under random labels put any
    (`draw_chance_directions`). Where labels mean nothing, a difference of means is significant at any stream in at most
    a share ``level`` of cases. tokens: how many are listed at each end. Needs rows, and four prompts of each group.
    """
    subject, rows = context.subject, context.directions.basis[:, 0]
    sample = read_sample(context.activations, "lens", least=4)
    logits = list(compute_logit_effects(subject, rows))
    high, up = find_extreme_tokens(logits, tokens, largest=True)
    low, down = find_extreme_tokens(logits, tokens, largest=False)
    present = rows.any(1)
    most = torch.maximum(high[:, 0], -low[:, 0])
    limit, p = compare_with_chance(subject, sample, most, present, draws, level, seed)
    return Lens(
        promoted=decode_tokens(subject, up, present),
        suppressed=decode_tokens(subject, down, present),
        high=high,
        low=low,
        limit=limit,
        p=p,
        level=level,
        sharing=_compute_sharing(up, present),
    )


def compare_with_chance(
    subject: Subject,
    sample: Sample,
    most: Float[Tensor, " streams"],
    present: Bool[Tensor, " streams"],
    draws: int,
    level: float,
    seed: int,
) -> tuple[Float[Tensor, " streams"], Float[Tensor, " streams"]]:
    """Return `Lens.limit` and `Lens.p` of the directions' largest |logit|; the limit is 0 where there is none."""
    limit, p = torch.zeros(len(most)).double(), torch.ones(len(most)).double()
    if present.any():
        streams = present.nonzero().flatten().tolist()
        chance = [find_largest_logits(subject, draw_chance_directions(sample, s, draws, seed)) for s in streams]
        table = torch.stack([torch.cat([most[s][None], x]) for s, x in zip(streams, chance, strict=True)], 1).double()
        limit[present], p[present] = compute_thresholds(table, level), familywise_p_values(table)
    return limit, p


def find_largest_logits(subject: Subject, units: Float[Tensor, "n width"]) -> Float[Tensor, " n"]:
    """Return the largest |logit| of each direction."""
    return torch.cat([part.abs().amax(1) for part in compute_logit_effects(subject, units)])


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
