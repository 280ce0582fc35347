"""A step that removes from the directions the subspace that the stream spans while the model reasons."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.causal.interventions import FitContext
from obliteratus.core.cost import Answers, Cost, prompt_count
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.shapes import Float
from obliteratus.core.types import Activations, Directions, Subject
from obliteratus.distill.steps import (
    align_signs,
    compute_score,
    extractors,
    mean_difference,
    orthonormalize,
    require_directions,
)
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.generate import generate
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.prompts import evenly_spaced, pick_evenly

STEP = "keep_reasoning"
TAG = re.compile(r"<(/?)(?:think|thinking|reasoning)>")


def _cost(options: Mapping[str, Any]) -> Cost:
    asked = prompt_count("fit", "control", options["prompts"])
    return Cost(asked * options["places"], (Answers(options["tokens"], asked),))


@extractors.register(STEP, needs=("model",), cost=_cost)
def keep_reasoning(
    acts: Activations,
    so_far: Directions | None,
    context: FitContext,
    *,
    k: Annotated[int, Field(ge=1, le=64)] = 4,
    prompts: Annotated[int, Field(ge=1)] = 32,
    tokens: Annotated[int, Field(ge=1)] = 64,
    places: Annotated[int, Field(ge=1)] = 4,
) -> Directions:
    """Remove from each direction the subspace in which the stream varies most while the model reasons.

    The model answers ``prompts`` control prompts with ``tokens`` tokens, in thinking mode if the template has one. Its
    reasoning is the text inside the think block, or the whole answer if there is no such block. The stream is read at
    ``places`` evenly spaced tokens of each reasoning span; at each stream index the top k right singular vectors of
    these rows, centered, are projected out of the directions.
    Rows stay orthonormal; a direction that lies inside the subspace becomes a row of zeros. raw stays that of the step
    before. Not published: a method of this name in another program projects out prompt activations, not reasoning.
    Raises UserError if there are too few places for k.
    """
    so_far = require_directions(so_far, STEP)
    rows = collect_reasoning_rows(context, prompts, tokens, places)
    if min(len(rows) - 1, context.subject.width) < k:
        raise UserError(f"distill step '{STEP}': k={k} needs more than {k} places; got {len(rows)}; raise prompts")
    out = compute_reasoning_subspace(context.subject, rows, k)
    rest = so_far.basis - torch.einsum("lkw,ljw,ljv->lkv", so_far.basis, out, out)
    basis = align_signs(orthonormalize(rest), mean_difference(acts))
    left = float(rest.norm() / so_far.basis.norm().clamp(min=1e-30))
    note(STEP, f"{len(rows)} places; {left:.2f} of the directions' length remains")
    return Directions(basis, compute_score(acts, basis), so_far.raw, so_far.unit, so_far.trace)


def collect_reasoning_rows(context: FitContext, prompts: int, tokens: int, places: int) -> Ids:
    """Return prompts with their answers cut off at a token of the reasoning: the stream is read at each row's end."""
    control = context.prompts["control"]
    chosen = pick_evenly(control, prompts)
    thinking = replace(context.subject, chat=replace(context.subject.chat, thinking=True))
    ids = render_prompts(thinking, chosen, reserve=tokens)
    rows = []
    for prompt, answer in zip(ids, generate(context.subject, ids, tokens, title=f"DISTILL {STEP}"), strict=True):
        start, stop = find_reasoning_span(context.subject, prompt, answer)
        n = stop - start
        rows += [prompt + answer[: start + i + 1] for i in evenly_spaced(n, places)]
    return rows


def find_reasoning_span(subject: Subject, prompt: list[int], answer: list[int]) -> tuple[int, int]:
    """Return (start, stop) of the tokens of an answer that are reasoning.

    That is the inside of the first think block, which the template may have opened already; a block that is not closed
    extends to the end. Without a block it is the whole answer.
    """
    tags = [tag.group(1) for tag in TAG.finditer(subject.tokenizer.decode(prompt))]
    text = subject.tokenizer.decode(answer)
    opened = bool(tags) and tags[-1] == ""
    begin, end = 0, len(text)
    for tag in TAG.finditer(text):
        if not tag.group(1) and not opened:
            opened, begin = True, tag.end()
        elif tag.group(1) and opened:
            end = tag.start()
            break
    lengths = [len(subject.tokenizer.decode(answer[: i + 1])) for i in range(len(answer))]
    return sum(n <= begin for n in lengths) if begin else 0, sum(n <= end for n in lengths)


def compute_reasoning_subspace(subject: Subject, rows: Ids, k: int) -> Float[Tensor, "streams k width"]:
    """Return the top k right singular vectors of the centered stream at the rows' last tokens, by stream index."""
    stream = torch.empty(len(rows), subject.n_layers + 1, subject.width)
    for reading in read_hidden_states(subject, rows, title=f"DISTILL {STEP} places"):
        stream[reading.rows] = reading.stream
    _, _, v = torch.linalg.svd((stream - stream.mean(0)).transpose(0, 1), full_matrices=False)
    top: Tensor = v[:, :k]
    return top
