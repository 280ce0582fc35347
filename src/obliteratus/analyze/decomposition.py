"""Which blocks, and which heads in them, write the difference between the groups: measured, and it sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from obliteratus.analyze.base import GROUPS, Aim, AnalysisContext, Stream, analyses, choose_direction
from obliteratus.analyze.significance import Contrast, contrast_between_groups, describe_clearest
from obliteratus.analyze.writers import block_output_modules, writers_in_order
from obliteratus.core.cost import Cost, prompt_count
from obliteratus.core.shapes import Float
from obliteratus.core.types import ProbeRequest, Prompt, Site, Subject
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.hidden_states import BatchStates, read_hidden_states
from obliteratus.report.curves import BLUE, GREEN, GREY, ORANGE
from obliteratus.summon.sites import find_architecture, has_heads, read_gain
from obliteratus.weights.matrices import read_weight

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("attention", "mlp", "rest")


@dataclass(frozen=True)
class Decomposition:
    """What each component adds to the groups' difference along one direction; target − control, the stream's unit."""

    stream: int
    """Where the difference is decomposed; blocks from this on are not in it."""
    total: float
    """The difference there."""
    names: tuple[str, ...]
    """``embeddings``; then ``block 0 attention``, ``block 0 mlp``, ``block 0 rest`` …. The rest of a block is what its
    writers' outputs do not add up to: gates, multipliers and rounding."""
    parts: Contrast
    """Of ``names``; values sum to ``total``."""
    heads: Contrast
    """Of the heads in ``head_names``: each a share of its block's attention, biases left out."""
    head_names: tuple[tuple[int, int], ...]
    """(block, head)."""
    prompts: tuple[int, int]
    """Target and control prompts behind it."""

    def to_dict(self) -> dict[str, Any]:
        """Differences with their standard errors, and by name those beyond chance."""
        heads = [f"block {block} head {head}" for block, head in self.head_names]
        return {
            "stream": self.stream,
            "total": self.total,
            "prompts": list(self.prompts),
            "parts": _table(self.names, self.parts),
            "heads": _table(heads, self.heads),
            "found": [self.names[i] for i in self.parts.significant],
            "found_heads": [heads[i] for i in self.heads.significant],
        }

    def summary(self) -> str:
        """The largest components."""
        parts = describe_clearest(self.parts, lambda i: self.names[i])
        heads = describe_clearest(self.heads, lambda i: "block {} head {}".format(*self.head_names[i]))
        return f"difference at stream {self.stream} {self.total:+.3g}: {parts}; heads: {heads}"

    def draw(self, figure: Figure) -> None:
        """Bars of each block's parts, and below them a map of heads."""
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


def _table(names: Sequence[str], contrast: Contrast) -> dict[str, Any]:
    values = zip(names, contrast.value.tolist(), contrast.error.tolist(), strict=True)
    return {"limit": contrast.limit, "of": {name: {"value": v, "error": e} for name, v, e in values}}


COST = Cost(prompt_count("fit", "target") + prompt_count("fit", "control"))


@analyses.register(
    "decomposition", cite="Elhage et al. 2021, transformer-circuits.pub/2021/framework", cost=lambda options: COST
)
def decompose_difference(context: AnalysisContext, *, stream: Stream = None, seed: int = 0) -> Decomposition:
    """What each block's attention, MLP and heads add to the groups' difference along the direction, at one token.

    Measured on the fit prompts: outputs of everything that adds to the stream, behind its norm where there is one;
    heads by the columns of attention's output matrix that read them. Parts sum to the stream's difference. What
    stands out is told from chance by permuting the prompts' labels. stream: where; None is the best-scored one.
    """
    aim = choose_direction(context, stream, "decomposition")
    subject, prompts = context.subject, context.prompts
    heads = _heads(subject, aim)
    rows = [_rows(subject, prompts[group], aim, heads, context.activations.position) for group in GROUPS]
    n = 1 + len(PARTS) * aim.stream
    parts = contrast_between_groups(rows[0][:, :n], rows[1][:, :n], seed)
    names = ["embeddings"] + [f"block {block} {part}" for block in range(aim.stream) for part in PARTS]
    return Decomposition(
        stream=aim.stream,
        total=float(parts.value.double().sum()),
        names=tuple(names),
        parts=parts,
        heads=contrast_between_groups(rows[0][:, n:], rows[1][:, n:], seed),
        head_names=tuple((head.site.layer, i) for head in heads for i in range(len(head.along))),
        prompts=(len(rows[0]), len(rows[1])),
    )


# ------------------------------------------------------------------------------------------- measuring
@dataclass(frozen=True)
class _Heads:
    """One attention output, along the direction."""

    site: Site
    along: Float[Tensor, "heads size"]
    """dᵀW of each head's columns, d folded with the gain of a norm behind it; fp64."""
    gain: Float[Tensor, " width"] | None
    """That norm's, or none."""


def _heads(subject: Subject, aim: Aim) -> list[_Heads]:
    """Of every block below the stream whose mixer is attention, with inputs that its heads share evenly."""
    family, n = find_architecture(subject.model.config), int(subject.model.config.get_text_config().num_attention_heads)
    found = []
    for site in writers_in_order(subject):
        if 0 <= site.layer < aim.stream and has_heads(family, site):
            weight, gain = read_weight(subject.module(site.path), site).cpu().double(), read_gain(subject.model, site)
            folded = aim.vector.double() if gain is None else aim.vector.double() * gain.cpu().double()
            if weight.shape[1] % n == 0:
                found.append(_Heads(site, (folded @ weight).view(n, -1), None if gain is None else gain.cpu()))
    return found


def _rows(
    subject: Subject, prompts: Sequence[Prompt], aim: Aim, heads: Sequence[_Heads], position: int
) -> Float[Tensor, "prompts components"]:
    """Every prompt's components along the direction, fp64: embeddings, parts block by block, heads."""
    where = [block_output_modules(subject, layer) for layer in range(aim.stream)]
    wanted = [path for parts in where for paths in parts.values() for path in paths]
    paths = list(dict.fromkeys(wanted + [head.site.path for head in heads if head.gain is not None]))
    request = ProbeRequest(paths, [head.site.path for head in heads])
    ids = render_prompts(subject, prompts)
    result: list[Tensor] = [torch.empty(0)] * len(ids)
    for got in read_hidden_states(
        subject, ids, position=position, request=request, last=aim.stream, title="ANALYZE decomposition"
    ):
        outputs = dict(zip(paths, got.outputs.unbind(1), strict=True))
        stream = got.stream.double() @ aim.vector.double()
        columns = [stream[:, :1]]
        for layer, parts in enumerate(where):
            known = [_along(outputs, parts[part], aim, len(stream)) for part in ("attention", "mlp")]
            columns.append(torch.stack([*known, stream[:, layer + 1] - stream[:, layer] - sum(known)], 1))
        columns += [_of_heads(head, got, outputs) for head in heads]
        for row, values in zip(got.rows, torch.cat(columns, 1), strict=True):
            result[row] = values
    return torch.stack(result)


def _along(outputs: dict[str, Tensor], paths: Sequence[str], aim: Aim, rows: int) -> Float[Tensor, " rows"]:
    parts = [outputs[path].double() @ aim.vector.double() for path in paths]
    return torch.stack(parts).sum(0) if parts else torch.zeros(rows, dtype=torch.float64)


def _of_heads(head: _Heads, got: BatchStates, outputs: dict[str, Tensor]) -> Float[Tensor, "rows heads"]:
    """dᵀW x of each head's columns; behind a norm, times the number that it scaled this prompt's output by."""
    x = got.inputs[head.site.path].double().view(-1, *head.along.shape)
    along = torch.einsum("rhs,hs->rh", x, head.along)
    if head.gain is None:
        return along
    before = outputs[head.site.path].double() * head.gain.double()
    after = outputs[head.site.gain or ""].double()
    return along * ((after * before).sum(1) / before.square().sum(1)).clamp(min=0)[:, None]
