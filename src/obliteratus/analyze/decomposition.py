"""Which blocks, and which of their heads, write the difference between the groups; the parts sum to the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from obliteratus.analyze.base import GROUPS, Aim, AnalysisContext, Stream, analyses, choose_direction
from obliteratus.analyze.samples import LEVEL
from obliteratus.analyze.significance import Contrast, contrast_between_groups, describe_clearest
from obliteratus.analyze.writers import attention_outputs, block_output_modules
from obliteratus.core.cost import Cost, prompt_count
from obliteratus.core.probing import ProbeRequest
from obliteratus.core.shapes import Float
from obliteratus.core.types import Prompt, Site, Subject
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.hidden_states import BatchStates, read_hidden_states
from obliteratus.report.curves import BLUE, GREEN, GREY, ORANGE, Figure
from obliteratus.summon.sites import read_gain
from obliteratus.weights.matrices import read_weight

PARTS = ("attention", "mlp", "rest")


@dataclass(frozen=True)
class Decomposition:
    """What each component adds to the difference target − control along one direction, in the stream's unit."""

    stream: int
    """The stream at which the difference is taken; blocks from this one on are not part of it."""
    total: float
    """The difference at that stream."""
    names: tuple[str, ...]
    """``embeddings``; then ``block 0 attention``, ``block 0 mlp``, ``block 0 rest`` …. A block's rest is what it adds
    beyond its writers' outputs: gates, multipliers and rounding."""
    parts: Contrast
    """For each of ``names``; the values sum to ``total``."""
    heads: Contrast
    """For each of ``head_names``: the head's share of its block's attention, without biases. The limit is that of parts
    and heads together."""
    head_names: tuple[tuple[int, int], ...]
    """(block, head)."""
    prompts: tuple[int, int]
    """Number of target and control prompts."""

    def to_dict(self) -> dict[str, Any]:
        """Return the differences with their standard errors, and the names of the significant ones."""
        heads = [f"block {block} head {head}" for block, head in self.head_names]
        return {
            "stream": self.stream,
            "total": self.total,
            "prompts": list(self.prompts),
            "level": LEVEL,
            "parts": _tabulate(self.names, self.parts),
            "heads": _tabulate(heads, self.heads),
            "found": [self.names[i] for i in self.parts.significant],
            "found_heads": [heads[i] for i in self.heads.significant],
        }

    def summary(self) -> str:
        """Return the difference and its largest components."""
        parts = describe_clearest(self.parts, lambda i: self.names[i])
        heads = describe_clearest(self.heads, lambda i: "block {} head {}".format(*self.head_names[i]))
        tested = f"{self.prompts[0]} and {self.prompts[1]} held-out prompts, level {LEVEL:g} over all parts and heads"
        return f"difference at stream {self.stream} {self.total:+.3g}: {parts}; heads: {heads} ({tested})"

    def draw(self, figure: Figure) -> None:
        """Draw bars of each block's parts, and below them a map of heads."""
        rows = 2 if self.head_names else 1
        axes = figure.add_subplot(rows, 1, 1, xlabel="block", ylabel="Δ along d", title="who writes the difference")
        blocks = self.parts.value[1:].view(-1, len(PARTS))
        for i, (part, color) in enumerate(zip(PARTS, (BLUE, ORANGE, GREY), strict=True)):
            places = torch.arange(len(blocks)) + 0.28 * (i - 1)  # three bars side by side, a gap after each block
            axes.bar(places.tolist(), blocks[:, i].tolist(), width=0.28, color=color, label=part)
        axes.axhline(float(self.parts.value[0]), color=GREEN, linewidth=1, label="embeddings")
        axes.legend()
        if self.head_names:
            self._draw_heads(figure.add_subplot(rows, 1, 2, xlabel="block", ylabel="head"))

    def _draw_heads(self, axes: Any) -> None:
        size = [1 + max(pair[i] for pair in self.head_names) for i in (0, 1)]
        table = torch.full((size[1], size[0]), torch.nan)
        for (block, head), value in zip(self.head_names, self.heads.value.tolist(), strict=True):
            table[head, block] = value
        most = max(float(self.heads.value.abs().max()), torch.finfo(torch.float32).tiny)
        image = axes.imshow(table.numpy(), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", origin="lower")
        axes.figure.colorbar(image, ax=axes, label="Δ along d")


def _tabulate(names: Sequence[str], contrast: Contrast) -> dict[str, Any]:
    values = zip(names, contrast.value.tolist(), contrast.error.tolist(), strict=True)
    return {"limit": contrast.limit, "of": {name: {"value": v, "error": e} for name, v, e in values}}


COST = Cost(prompt_count("search", "target") + prompt_count("search", "control"))


@analyses.register(
    "decomposition", cite="Elhage et al. 2021, transformer-circuits.pub/2021/framework", cost=lambda options: COST
)
def decompose_difference(context: AnalysisContext, *, stream: Stream = None, seed: int = 0) -> Decomposition:
    """Measure what each block's attention, MLP and heads add to the groups' difference along the direction.

    Measured at one token of the search prompts, from the outputs of everything that adds to the stream, behind its norm
    where there is one. A head's part comes from the columns of attention's output matrix that read the head.

    The direction was not fitted on these prompts: along a direction that was, any two sets of prompts differ, whatever
    their labels. The limit comes from permutations of the search prompts' labels. Where labels mean nothing, anything
    is found among all parts and heads in at most 5 % of cases.

    stream: where the difference is taken; None for the stream with the highest score.
    """
    aim = choose_direction(context, stream, "decomposition")
    subject, prompts = context.subject, context.held_out
    heads = _project_head_weights(subject, aim)
    position = context.activations.position
    target, control = (_measure_components(subject, prompts[group], aim, heads, position) for group in GROUPS)
    names = ["embeddings"] + [f"block {block} {part}" for block in range(aim.stream) for part in PARTS]
    parts, of_heads = contrast_between_groups(target, control, seed).split(len(names))
    return Decomposition(
        stream=aim.stream,
        total=float(parts.value.double().sum()),
        names=tuple(names),
        parts=parts,
        heads=of_heads,
        head_names=tuple((head.site.layer, i) for head in heads for i in range(len(head.along))),
        prompts=(len(target), len(control)),
    )


# ------------------------------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class _HeadWeights:
    """The output matrix of one block's attention, projected on the direction."""

    site: Site
    along: Float[Tensor, "heads size"]
    """dᵀW of each head's columns, d multiplied by the gain of a norm behind it; fp64."""
    gain: Float[Tensor, " width"] | None
    """The gain of that norm, or None where there is none."""


def _project_head_weights(subject: Subject, aim: Aim) -> list[_HeadWeights]:
    """Return the weights of every block below the stream whose mixer is attention with evenly sized heads."""
    heads = []
    for site, size in attention_outputs(subject):
        if site.layer < aim.stream:
            weight, gain = read_weight(subject.module(site.path), site).cpu().double(), read_gain(subject.model, site)
            folded = aim.vector.double() if gain is None else aim.vector.double() * gain.cpu().double()
            along = (folded @ weight).view(-1, size)
            heads.append(_HeadWeights(site, along, None if gain is None else gain.cpu()))
    return heads


def _measure_components(
    subject: Subject, prompts: Sequence[Prompt], aim: Aim, heads: Sequence[_HeadWeights], position: int
) -> Float[Tensor, "prompts components"]:
    """Return every prompt's components along the direction, fp64: embeddings, parts block by block, heads."""
    where = [block_output_modules(subject, layer) for layer in range(aim.stream)]
    wanted = [path for parts in where for paths in parts.values() for path in paths]
    paths = list(dict.fromkeys(wanted + [head.site.path for head in heads if head.gain is not None]))
    request = ProbeRequest(paths, [head.site.path for head in heads])
    ids = render_prompts(subject, prompts)
    result: list[Tensor] = [torch.empty(0)] * len(ids)
    for batch in read_hidden_states(
        subject, ids, position=position, request=request, last=aim.stream, title="ANALYZE decomposition"
    ):
        outputs = dict(zip(paths, batch.outputs.unbind(1), strict=True))
        stream = batch.stream.double() @ aim.vector.double()
        columns = [stream[:, :1]]
        for layer, parts in enumerate(where):
            known = [_project_outputs(outputs, parts[part], aim, len(stream)) for part in ("attention", "mlp")]
            columns.append(torch.stack([*known, stream[:, layer + 1] - stream[:, layer] - sum(known)], 1))
        columns += [_project_heads(head, batch, outputs) for head in heads]
        for row, values in zip(batch.rows, torch.cat(columns, 1), strict=True):
            result[row] = values
    return torch.stack(result)


def _project_outputs(outputs: dict[str, Tensor], paths: Sequence[str], aim: Aim, rows: int) -> Float[Tensor, " rows"]:
    parts = [outputs[path].double() @ aim.vector.double() for path in paths]
    return torch.stack(parts).sum(0) if parts else torch.zeros(rows, dtype=torch.float64)


def _project_heads(head: _HeadWeights, batch: BatchStates, outputs: dict[str, Tensor]) -> Float[Tensor, "rows heads"]:
    """Return dᵀW x of each head's columns; behind a norm, times the factor that it scaled the prompt's output by."""
    x = batch.inputs[head.site.path].double().view(-1, *head.along.shape)
    along = torch.einsum("rhs,hs->rh", x, head.along)
    if head.gain is None:
        return along
    before = outputs[head.site.path].double() * head.gain.double()
    after = outputs[head.site.gain or ""].double()
    return along * ((after * before).sum(1) / before.square().sum(1)).clamp(min=0)[:, None]
