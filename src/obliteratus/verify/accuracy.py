"""The accuracy scorer: whether the right choice of a multiple-choice question is the likeliest one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from obliteratus.core.cost import Cost, constant, variable
from obliteratus.core.shapes import Float
from obliteratus.core.types import Prompt, Subject
from obliteratus.inference.chat_template import Ids, encode_texts, has_template, render_prompts
from obliteratus.verify.questions import Question, load_questions
from obliteratus.verify.scoring import ItemValues, Measurement, ScorerContext, scorers


@dataclass(frozen=True)
class RenderedChoices:
    """All choices of some questions behind their prompts, one row each."""

    ids: Ids
    lengths: tuple[int, ...]
    """How many of each row's last tokens are its choice."""
    choices: tuple[int, ...]
    """Number of rows of each question."""
    answers: tuple[int, ...]

    def score_hits(self, losses: Sequence[Tensor]) -> Float[Tensor, " questions"]:
        """Return 1 for each question whose right choice has the highest likelihood, else 0.

        losses: each row's token losses. A choice's loss is summed over its tokens. A question of which any is not a
        number is not answered right.
        """
        sums = torch.stack([loss[-n:].double().sum() for loss, n in zip(losses, self.lengths, strict=True)])
        parts = sums.split(list(self.choices))
        likeliest = [-1 if bool(part.isnan().any()) else int(part.argmin()) for part in parts]
        return torch.tensor([float(b == a) for b, a in zip(likeliest, self.answers, strict=True)])


def render_choices(subject: Subject, questions: Sequence[Question]) -> RenderedChoices:
    """Put each choice behind its rendered prompt: as the answer in chat models, behind a space in others."""
    gap = "" if has_template(subject) else " "
    texts = [gap + choice for question in questions for choice in question.choices]
    tails = encode_texts(subject, texts)
    prompts = render_prompts(subject, [Prompt(q.prompt) for q in questions], reserve=max(map(len, tails)))
    counts = [len(question.choices) for question in questions]
    starts = list(accumulate(counts, initial=0))
    ids = [prompts[i] + tail for i, n in enumerate(counts) for tail in tails[starts[i] : starts[i] + n]]
    return RenderedChoices(ids, tuple(map(len, tails)), tuple(counts), tuple(q.answer for q in questions))


def _estimate_cost(labeled: str) -> Cost:
    """One text per choice; a variable until a file is given."""
    rows = constant(sum(len(q.choices) for q in load_questions(labeled))) if labeled else variable("N_labeled")
    return Cost(texts=rows)


@scorers.register("accuracy", cost=lambda options: _estimate_cost(options["labeled"]))
def accuracy(context: ScorerContext, *, labeled: str = "") -> Measurement:
    """Score the share of multiple-choice questions whose right choice is the likeliest behind the prompt.

    labeled: JSONL of ``prompt``, ``choices`` and ``answer`` (the index of the right one). A choice's likelihood is
    summed over its tokens. Raises UserError without a file.
    """
    rows = render_choices(context.subject, context.questions or load_questions(labeled))
    hits = ItemValues(rows.score_hits(context.losses(rows.ids, "VERIFY accuracy")), "share")
    scores = {"accuracy": hits.score()}
    if context.before is not None:
        scores["accuracy.change"] = hits.change(context.before.items["accuracy"])
    return Measurement(scores, items={"accuracy": hits})
