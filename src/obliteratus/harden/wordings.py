"""Several ways to say no, each for prompts of one kind, so that no single direction leads to all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.shapes import Float, Int
from obliteratus.core.types import Subject
from obliteratus.harden.lessons import Lessons, find_end_token
from obliteratus.harden.settings import HardenSettings
from obliteratus.inference.chat_template import encode_texts
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.judge.judge import SHOWN, Judge

AXES = 8  # principal axes on which kinds are told apart; of more, each adds noise from a few dozen prompts
STARTS, ROUNDS = 20, 30  # of k-means; it settles within ten rounds, and the best of the starts counts
LEAST_SHARE = 1 / 3  # of an even share: a smaller kind is too few prompts to learn a wording from


def check_wordings(wordings: Sequence[str], judge: Judge) -> None:
    """Raise UserError for a wording that does not show the behavior."""
    for wording in wordings:
        if judge.judge_answer(wording) not in SHOWN:
            raise UserError(f"wording '{wording}' does not show {judge.name}, as the judge reads it; give another")


def vary_wordings(subject: Subject, lessons: Lessons, settings: HardenSettings) -> Lessons:
    """Return the lessons with target prompts divided into as many kinds as there are wordings, and the model's own.

    Prompts of the first kind keep the model's own answer. What the others say instead begins with other tokens, and
    what decides about it lies along other directions. Extended refusals (arXiv:2505.19056) spread a refusal over its
    tokens; this spreads it over prompts.
    """
    if not settings.wordings:
        return lessons
    rows = [row for row, _ in lessons.refusals]
    kinds = divide_kinds(read_states(subject, rows, settings.depth), 1 + len(settings.wordings), settings.seed).tolist()
    end = find_end_token(subject)
    texts = encode_texts(subject, settings.wordings)
    answers: list[list[int] | None] = [None, *([*text, *end] for text in texts)]
    varied = tuple((row, answers[kind] or own) for (row, own), kind in zip(lessons.refusals, kinds, strict=True))
    sizes = ", ".join(str(kinds.count(kind)) for kind in range(len(answers)))
    note("HARDEN", f"target prompts are divided into kinds of {sizes}, each refused in other words")
    return lessons.model_copy(update={"refusals": varied})


def read_states(subject: Subject, rows: Sequence[list[int]], depth: float) -> Float[Tensor, "rows width"]:
    """Return the residual stream at the last token of each row, where the first trained block reads it."""
    stream = round(depth * subject.n_layers)
    states = torch.zeros(len(rows), subject.width)
    with torch.inference_mode():
        for batch in read_hidden_states(subject, list(rows), last=max(stream, 1), title="HARDEN kinds"):
            states[batch.rows] = batch.stream[:, stream].float().cpu()
    return states


def divide_kinds(states: Float[Tensor, "rows width"], k: int, seed: int = 0) -> Int[Tensor, " rows"]:
    """Return the kind of each row, 0 to k − 1: k-means on the first principal axes, each scaled to one.

    Of several starts the one with the least squared distances counts whose smallest kind is not too small. The result
    depends on the rows and the seed alone.
    """
    centered = states - states.mean(0)
    axes = torch.linalg.svd(centered, full_matrices=False)[2][: min(AXES, len(states) - 1)]
    scores = centered @ axes.T
    scores = scores / scores.std(0).clamp(min=torch.finfo(scores.dtype).tiny)
    generator = torch.Generator().manual_seed(seed)
    found = [_run_k_means(scores, k, generator) for _ in range(STARTS)]
    large = [one for one in found if int(torch.bincount(one[1], minlength=k).min()) >= LEAST_SHARE * len(states) / k]
    return min(large or found, key=lambda one: one[0])[1]


def _run_k_means(scores: Float[Tensor, "rows axes"], k: int, generator: torch.Generator) -> tuple[float, Tensor]:
    """Return the summed squared distances to the nearest center, and which it is."""
    centers = scores[torch.randperm(len(scores), generator=generator)[:k]]
    for _ in range(ROUNDS):
        nearest = torch.cdist(scores, centers).argmin(1)
        members = [scores[nearest == i] for i in range(k)]
        centers = torch.stack([m.mean(0) if len(m) else c for m, c in zip(members, centers, strict=True)])
    nearest = torch.cdist(scores, centers).argmin(1)
    return float((scores - centers[nearest]).square().sum()), nearest
