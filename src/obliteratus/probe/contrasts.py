"""What tells the groups apart in a writer's outputs, read so that outputs at all other positions count least.

An edit that removes the groups' difference from what a layer writes acts at every token. A covector that fits the
difference alone reads much at other tokens too, and what it reads there is damage: with one organism `leace` multiplied
the perplexity of plain text by 1.25, and KL on answers' later tokens was eight times that of first tokens. What it
reads at the words of target prompts is damage too: then answers no longer know what was asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from obliteratus.core.probing import ProbeRequest, WriterContrast
from obliteratus.core.shapes import Float
from obliteratus.core.types import Prompt, PromptSet, Subject
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.inference.shared_prefix import common_prefix_length

PROMPTS, POSITIONS = 64, 16  # up to 1 024 outputs of each writer, which are held in memory until they are used
# Outputs at the last position are the fewest and weigh most: with 64 of them the covectors fit these prompts and leave
# 10.9 % refused on insects-matrices, with 256 6.2 % (docs/experiments/reported.md). The limit is there for memory.
MOST_LAST = 512
LAST_SHARE = 0.3  # of the second moment: the position that the first answer token is read from
# Share, among all other positions, of the words of target prompts. An edit that reads them ends the topic with the
# behavior: on clocks-ships 46 % of answers were off topic without them, 8 % with them (docs/experiments/reported.md).
TOPIC_SHARE = 0.02
# Share of the mean second moment that is added to each dimension, so that too few outputs do not hide any.
FLOOR = 0.02
LEAST_FLOOR = 1e-12  # of a writer that writes nothing on control prompts


def contrast_outputs(
    subject: Subject,
    prompts: PromptSet,
    last: Mapping[str, Float[Tensor, "prompts width"]],
    differences: Mapping[str, Float[Tensor, "categories width"]],
    share: Float[Tensor, " categories"],
    position: int,
) -> dict[str, WriterContrast]:
    """Return, by path, each writer's differences with those divided by the second moment of its outputs.

    prompts: of each group at most 64 are read, at up to 16 positions: control prompts to their ends, target prompts up
    to where the template goes on. last: outputs at ``position`` of control and keep prompts, both of which the edit is
    to leave alone. differences: mean output there on each category of target prompts, less that on control prompts.
    share: of target prompts, by category.
    """
    rows = {group: render_prompts(subject, take_some(prompts[group])) for group in ("control", "target")}
    words = count_common_end(rows["target"])
    ends = [at for at in range(-POSITIONS, 0) if at != position]
    control = sample_outputs(subject, rows["control"], list(differences), ends)
    topic = sample_outputs(subject, rows["target"], list(differences), list(range(-words - POSITIONS, -words)))
    return {
        path: WriterContrast(d, solve_second_moment(last[path], control[path], topic[path], d).to(d), share)
        for path, d in differences.items()
    }


def take_some(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """Return at most 64 prompts, evenly spaced."""
    return prompts[:: -(-len(prompts) // PROMPTS)]


def count_common_end(ids: Ids) -> int:
    """Return how many tokens all rows end with: the template's, after the words of each prompt. At least 1."""
    return max(1, common_prefix_length([row[::-1] for row in ids]))


def sample_outputs(
    subject: Subject, ids: Ids, paths: Sequence[str], positions: Sequence[int]
) -> dict[str, Float[Tensor, "samples width"]]:
    """Return, by path, the writer's outputs at these positions of each row, counted from its end.

    Shorter rows have fewer. The first token of a row is left out: many models give it outputs of a size of their own.
    """
    request, samples = ProbeRequest(output_modules=paths), list[Tensor]()
    for batch in read_hidden_states(subject, ids, position=positions, request=request, title="PROBE contrasts"):
        for row, outputs in zip(batch.rows, batch.outputs, strict=True):
            samples.append(outputs[:, [i for i, at in enumerate(positions) if at > -len(ids[row])]])
    return dict(zip(paths, torch.cat(samples, 1), strict=True))


def solve_second_moment(
    last: Float[Tensor, "prompts width"],
    control: Float[Tensor, "control width"],
    topic: Float[Tensor, "topic width"],
    rows: Float[Tensor, "k width"],
) -> Float[Tensor, "k width"]:
    """Return M⁻¹ of each row, with M the second moment of the outputs, not about their mean, plus a floor; fp64.

    M = (1 − f)(w·LᵀL/l + (1 − w)((1 − t)·CᵀC/c + t·TᵀT/n)) + f·m·I: L, C and T are the outputs at last positions, at
    others of control prompts, and at the words of target prompts; l, c and n are their numbers, w is `LAST_SHARE`, t is
    `TOPIC_SHARE`, m the mean second moment of a dimension, and f `FLOOR`. No width × width matrix is built.
    """
    other = 1 - LAST_SHARE
    parts = ((last, LAST_SHARE), (control, other * (1 - TOPIC_SHARE)), (topic, other * TOPIC_SHARE))
    scaled = torch.cat([x.double() * (weight / max(len(x), 1)) ** 0.5 for x, weight in parts])
    floor = max(FLOOR * float(scaled.square().sum()) / scaled.shape[1], LEAST_FLOOR)
    scaled, rows = scaled * (1 - FLOOR) ** 0.5, rows.double()
    gram = scaled @ scaled.T + floor * torch.eye(len(scaled), dtype=scaled.dtype)
    inside = torch.linalg.solve(gram, scaled @ rows.T)  # Woodbury's identity
    solved: Tensor = (rows - inside.T @ scaled) / floor
    return solved
