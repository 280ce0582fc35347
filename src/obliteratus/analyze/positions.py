"""At which tokens, and from which stream on, the groups differ along the directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.analyze.auc import pairwise_auc
from obliteratus.analyze.base import GROUPS, AnalysisContext, analyses
from obliteratus.analyze.samples import LEVEL
from obliteratus.analyze.significance import Contrast, contrast_between_groups, describe_clearest
from obliteratus.core.cost import Cost, prompt_count
from obliteratus.core.shapes import Float
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.report.curves import Figure


@dataclass(frozen=True)
class Positions:
    """Held-out prompts projected on each stream's own direction, at the last tokens of every prompt."""

    tokens: tuple[str, ...]
    """For the positions −P … −1, the token where all prompts share it, as a template's tokens are; else empty."""
    streams: int
    """L + 1."""
    contrast: Contrast
    """Mean of target − mean of control at each position and stream, position by position; the stream's unit."""
    auc: Float[Tensor, "positions streams"]
    """Share of pairs in which the target prompt is further along: 0–1, 0.5 where the groups are alike."""
    prompts: tuple[int, int]
    """Number of target and control prompts."""

    def locate(self, i: int) -> tuple[int, int]:
        """Return the (position, stream) of the i-th number of the contrast."""
        return i // self.streams - len(self.tokens), i % self.streams

    def to_dict(self) -> dict[str, Any]:
        """Return differences with standard errors and AUC by position, and the places beyond chance."""
        shape = (len(self.tokens), self.streams)
        values = {"difference": self.contrast.value, "error": self.contrast.error, "auc": self.auc}
        tables = {name: value.reshape(shape).tolist() for name, value in values.items()}
        found = [list(self.locate(i)) for i in self.contrast.significant]
        about = {
            "tokens": list(self.tokens),
            "limit": self.contrast.limit,
            "level": LEVEL,
            "prompts": list(self.prompts),
        }
        return {**about, "found": found, **tables}

    def summary(self) -> str:
        """Return where the groups differ most clearly."""
        clearest = describe_clearest(self.contrast, lambda i: "token {} stream {}".format(*self.locate(i)))
        positions = {self.locate(i)[0] for i in self.contrast.significant}
        tested = f"level {LEVEL:g} over all tokens and streams"
        return f"the groups differ at {len(positions)} of the last {len(self.tokens)} tokens: {clearest} ({tested})"

    def draw(self, figure: Figure) -> None:
        """Draw a map of AUC: streams across, tokens down."""
        axes = figure.add_subplot(xlabel="stream", ylabel="token from the end", title="AUC of the groups, held out")
        size = (-0.5, self.streams - 0.5, -0.5, -len(self.tokens) - 0.5)
        image = axes.imshow(self.auc.numpy(), cmap="RdBu_r", vmin=0, vmax=1, aspect="auto", extent=size)
        ticks = range(-len(self.tokens), 0)
        axes.set_yticks(list(ticks), [f"{p} {t!r}" if t else str(p) for p, t in zip(ticks, self.tokens, strict=True)])
        figure.colorbar(image, ax=axes, label="AUC")


COST = Cost(prompt_count("search", "target") + prompt_count("search", "control"))


@analyses.register("positions", cite="arXiv:2406.11717", cost=lambda options: COST)
def measure_positions(
    context: AnalysisContext, *, last: Annotated[int, Field(ge=1, le=256)] = 12, seed: int = 0
) -> Positions:
    """Measure how far the groups differ along each stream's first direction, at the last tokens of held-out prompts.

    One pass reads all positions. The directions are used as fitted, at their one token. The limit comes from
    permutations of the prompts' labels: where these mean nothing, anything is found among all tokens and streams in at
    most 5 % of cases. last: how many tokens, at most as many as the shortest prompt has.
    """
    subject = context.subject
    ids = {group: render_prompts(subject, context.held_out[group]) for group in GROUPS}
    rows = [row for group in GROUPS for row in ids[group]]
    n = min(last, *map(len, rows))
    target, control = (_project(context, ids[group], n) for group in GROUPS)
    return Positions(
        tokens=_find_shared_tokens(context, rows, n),
        streams=subject.n_layers + 1,
        contrast=contrast_between_groups(target.flatten(1), control.flatten(1), seed),
        auc=pairwise_auc(target.flatten(1), control.flatten(1)).view(target.shape[1:]),
        prompts=(len(target), len(control)),
    )


def _project(context: AnalysisContext, ids: Ids, n: int) -> Float[Tensor, "prompts positions streams"]:
    directions, subject = context.directions.basis[:, 0], context.subject
    result = torch.empty(len(ids), n, len(directions))
    for batch in read_hidden_states(subject, ids, position=range(-n, 0), title="ANALYZE positions"):
        result[batch.rows] = torch.einsum("rlpw,lw->rpl", batch.stream, directions)
    return result


def _find_shared_tokens(context: AnalysisContext, ids: Sequence[list[int]], n: int) -> tuple[str, ...]:
    tokenizer = context.subject.tokenizer
    distinct = ({row[position] for row in ids} for position in range(-n, 0))
    return tuple(str(tokenizer.decode([*tokens])) if len(tokens) == 1 else "" for tokens in distinct)
