"""The continuation_kl scorer: KL divergence over the tokens of the base model's own answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.core.cost import Cost, prompt_count
from obliteratus.core.errors import UserError
from obliteratus.core.progress import progress
from obliteratus.core.shapes import Float
from obliteratus.core.types import Subject
from obliteratus.excise.live.hooks import without_edits
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.logits import kl_divergence
from obliteratus.inference.teacher_forced import ForcedAnswers
from obliteratus.prompts import evenly_spaced
from obliteratus.verify.behavior import CONTROL_ANSWERS, PADDING
from obliteratus.verify.drift import answered_controls, drift_scores
from obliteratus.verify.scoring import ItemValues, Measurement, ScorerContext, scorers

NAME = "kl.continuation"


@scorers.register(
    "continuation_kl",
    cite="arXiv:2406.11717",
    needs=("answers", "base"),
    # A prompt passes twice after the edit, through either model, and not at all before it.
    cost=lambda options: Cost(texts=prompt_count("report", "control", options["prompts"])),
)
def continuation_kl(
    context: ScorerContext,
    *,
    tokens: Annotated[int, Field(ge=1, le=4096)] = 16,
    prompts: Annotated[int, Field(ge=1)] = 32,
) -> Measurement:
    """Score KL(base ‖ edited) in nats per token over the base model's own greedy answers to control prompts.

    Either model reads the answers that the behavior scorer has from the base. The value of a prompt is the mean over
    its answer's tokens, among them the end token if the answer ended in time; the scores are mean, p95 and p99 over
    prompts. ``kl.continuation.answered`` is over control prompts that the base answers, as for the first token: an
    answer that shows the behavior was stopped there.

    tokens: the most tokens of an answer that count. prompts: the most control prompts, evenly spaced. Raises UserError
    without the base's answers, or if the unedited model is not at hand.
    """
    answers = context.known if context.before is None else context.before
    if CONTROL_ANSWERS not in answers.tensors:
        raise UserError("continuation_kl: there are no answers of the unedited model; put the step behavior before it")
    if context.before is None:
        return Measurement()
    base = context.require_unedited("continuation_kl")
    rows = evenly_spaced(len(context.prompts["control"]), prompts)
    continuations = [_cut_padding(context.before.tensors[CONTROL_ANSWERS][row, :tokens]) for row in rows]
    ids = render_prompts(context.subject, [context.prompts["control"][row] for row in rows], reserve=tokens)
    values = mean_divergences(base, context.subject, ids, continuations)
    answered = answered_controls(context.before)
    scores = drift_scores(NAME, values, answered[rows] if len(answered) else answered)
    return Measurement(scores, items={NAME: ItemValues(values, "nats")})


def _cut_padding(row: Tensor) -> list[int]:
    return [int(token) for token in row if token != PADDING]


def mean_divergences(base: Subject, subject: Subject, ids: Ids, answers: Ids) -> Float[Tensor, " n"]:
    """Return the mean over each answer's tokens of KL(base ‖ edited) in nats, behind the prompts.

    base: may be the subject itself, since edits that are live do not count for it. Both models read a batch of answers
    before the next one begins, so only the logits of one batch are held.
    """
    with torch.inference_mode(), progress("VERIFY continuations", 2 * len(ids)) as advance:
        with without_edits():
            unedited = ForcedAnswers.prepare(base, ids, answers)
        edited = ForcedAnswers.prepare(subject, ids, answers)
        means = edited.run_batches(_compare(unedited, edited), lambda rows: advance(2 * rows))
    return torch.stack(means)


def _compare(unedited: ForcedAnswers, edited: ForcedAnswers) -> Callable[[list[int]], dict[int, Tensor]]:
    def compare(batch: list[int]) -> dict[int, Tensor]:
        with without_edits():
            before = [logits.to(edited.subject.device) for logits in unedited.read(batch)]
        pairs = zip(before, edited.read(batch), strict=True)
        means = [kl_divergence(*(x.float().log_softmax(-1) for x in pair)).double().mean() for pair in pairs]
        return {row: mean.float().cpu() for row, mean in zip(batch, means, strict=True)}

    return compare
