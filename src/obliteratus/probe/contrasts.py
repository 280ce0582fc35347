"""What tells the groups apart in a writer's outputs, read so that outputs at all other positions count least.

An edit that removes the groups' difference from what a layer writes acts at every token. A covector that fits the
difference alone reads much at other tokens too, and what it reads there is damage: with one organism `leace` multiplied
the perplexity of plain text by 1.25, and KL on answers' later tokens was eight times that of first tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from obliteratus.core.probing import ProbeRequest, WriterContrast
from obliteratus.core.shapes import Float
from obliteratus.core.types import Prompt, Subject
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.hidden_states import read_hidden_states

PROMPTS, POSITIONS = 64, 16  # up to 1 024 outputs of each writer, which are held in memory until they are used
# Outputs at the last position are the fewest and weigh most: with 64 of them the covectors fit these prompts and leave
# 10.9 % refused on insects-matrices, with 256 6.2 % (docs/experiments/reported.md). The limit is there for memory.
MOST_LAST = 512
LAST_SHARE = 0.3  # of the second moment: the position that the first answer token is read from
# Share of the mean second moment that is added to each dimension, so that too few outputs do not hide any.
FLOOR = 0.02
LEAST_FLOOR = 1e-12  # of a writer that writes nothing on control prompts


def contrast_outputs(
    subject: Subject,
    prompts: Sequence[Prompt],
    last: Mapping[str, Float[Tensor, "prompts width"]],
    differences: Mapping[str, Float[Tensor, "categories width"]],
    share: Float[Tensor, " categories"],
    position: int,
) -> dict[str, WriterContrast]:
    """Return, by path, each writer's differences with those divided by the second moment of its outputs.

    prompts: control prompts, of which at most 64 are read, at up to 16 positions from the end. last: outputs at
    ``position`` of control and keep prompts, both of which the edit is to leave alone. differences: mean output there
    on each category of target prompts, less that on control prompts. share: of target prompts, by category.
    """
    few = prompts[:: -(-len(prompts) // PROMPTS)]
    others = sample_outputs(subject, few, list(differences), position)
    return {
        path: WriterContrast(d, solve_second_moment(last[path], others[path], d).to(d), share)
        for path, d in differences.items()
    }


def sample_outputs(
    subject: Subject, prompts: Sequence[Prompt], paths: Sequence[str], position: int
) -> dict[str, Float[Tensor, "samples width"]]:
    """Return, by path, the writer's outputs at up to 16 positions from the end of each prompt, but for ``position``.

    The first token of a row is left out: many models give it outputs of a size of their own.
    """
    ids = render_prompts(subject, prompts)
    positions = [at for at in range(-POSITIONS, 0) if at != position]
    request, samples = ProbeRequest(output_modules=paths), list[Tensor]()
    for batch in read_hidden_states(subject, ids, position=positions, request=request, title="PROBE contrasts"):
        for row, outputs in zip(batch.rows, batch.outputs, strict=True):
            samples.append(outputs[:, [i for i, at in enumerate(positions) if at > -len(ids[row])]])
    return dict(zip(paths, torch.cat(samples, 1), strict=True))


def solve_second_moment(
    last: Float[Tensor, "prompts width"],
    others: Float[Tensor, "others width"],
    rows: Float[Tensor, "k width"],
) -> Float[Tensor, "k width"]:
    """Return M⁻¹ of each row, with M the second moment of the outputs, not about their mean, plus a floor; fp64.

    M = (1 − f)(w·LᵀL/l + (1 − w)·OᵀO/o) + f·m·I: L and O are the last and the other outputs, l and o their numbers, w
    is `LAST_SHARE`, m the mean second moment of a dimension, and f `FLOOR`. No width × width matrix is built.
    """
    weights = (LAST_SHARE / max(len(last), 1), (1 - LAST_SHARE) / max(len(others), 1))
    scaled = torch.cat([x.double() * w**0.5 for x, w in zip((last, others), weights, strict=True)])
    floor = max(FLOOR * float(scaled.square().sum()) / scaled.shape[1], LEAST_FLOOR)
    scaled, rows = scaled * (1 - FLOOR) ** 0.5, rows.double()
    gram = scaled @ scaled.T + floor * torch.eye(len(scaled), dtype=scaled.dtype)
    inside = torch.linalg.solve(gram, scaled @ rows.T)  # Woodbury's identity
    solved: Tensor = (rows - inside.T @ scaled) / floor
    return solved
