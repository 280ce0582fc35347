"""The fluency scorer: how likely the edited model's answers are to the unedited model, as incoherent text is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from obliteratus.core.cost import Cost, prompt_count
from obliteratus.core.errors import UserError
from obliteratus.core.shapes import Float
from obliteratus.core.types import Prompt, Subject
from obliteratus.excise.live.hooks import without_edits
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.inference.chat_template import context_length, encode_texts, render_prompts
from obliteratus.inference.generate import stop_tokens
from obliteratus.inference.teacher_forced import read_answers
from obliteratus.prompts import evenly_spaced
from obliteratus.verify.intervals import group_ratio
from obliteratus.verify.scoring import ItemValues, Measurement, ScorerContext, pick_answers, scorers

GROUPS = ("target", "control")
# A refusal that is undone costs nats at the first tokens, because the base would have refused there (organism: 7.0,
# 2.4, then 0.2–1.4). That is the edit's purpose; only later tokens tell whether the answer holds together.
OPENING = 4


def estimate_cost(prompts: int) -> Cost:
    """Return the cost of reading so many answers of each group."""
    target, control = (prompt_count("report", group, prompts) for group in GROUPS)
    return Cost(texts=target + control)


@scorers.register("fluency", needs=("answers", "base"), cost=lambda options: estimate_cost(options["prompts"]))
def fluency(
    context: ScorerContext,
    *,
    opening: Annotated[int, Field(ge=0, le=64)] = OPENING,
    prompts: Annotated[int, Field(ge=2)] = 24,
) -> Measurement:
    """Score the unedited model's perplexity on the answers to target and to control prompts, and their ratio.

    It is exp of the mean over answers of the mean loss per token, each behind its own prompt. The answers are those of
    the behavior scorer, which must run first, just as they were given, with loops and refusals; an empty answer counts
    as its end token. Loops are likely text, so read it together with ``degenerate``.

    opening: how many first tokens of each answer do not count; an answer that is no longer than that counts whole.
    prompts: the most prompts of each group, evenly spaced. Raises UserError without answers, or if the unedited model
    is not at hand.
    """
    base = context.require_unedited("fluency")
    items: dict[str, ItemValues] = {}
    for group in (g for g in GROUPS if g in context.prompts.groups):
        answers = list_answers(context, group)
        rows = evenly_spaced(len(answers), prompts)
        asked = [context.prompts[group][row] for row in rows]
        with without_edits():
            losses = answer_losses(base, asked, [answers[row] for row in rows], opening)
        items[f"fluency.{group}"] = ItemValues(losses, "perplexity")
    scores = {name: item.score() for name, item in items.items()}
    if len(items) == len(GROUPS):
        target, control = items.values()
        scores["fluency.ratio"] = group_ratio(target.values, control.values)
    return Measurement(scores, items=items)


def list_answers(context: ScorerContext, group: str) -> list[str]:
    """Return the answers to a group, as the scorer `behavior` got them. Raises UserError if there are none."""
    opened = AnswerDecoder.create(context.subject).opened  # by the template, so that it is no part of the answer
    records = pick_answers(context.known.records, group)
    if len(records) != len(context.prompts[group]):
        raise UserError("there are no answers to score; put the step behavior before it")
    return [record["answer"].removeprefix(opened) for record in records]


def answer_losses(
    subject: Subject, prompts: Sequence[Prompt], answers: Sequence[str], opening: int = 0, title: str = "VERIFY fluency"
) -> Float[Tensor, " n"]:
    """Return the mean loss in nats per token of each answer behind its prompt and opening, in the model as it is now.

    An empty answer, or one of special tokens alone, counts as the end token. Longer ones are cut at half of the
    context length.
    """
    end = min(stop_tokens(subject), default=0)
    longest = context_length(subject) // 2
    rows = encode_texts(subject, answers)
    answer_ids = [list(row)[:longest] or [end] for row in rows]
    ids = render_prompts(subject, prompts, reserve=max(map(len, answer_ids)))

    def mean_loss(row: int, logits: Tensor) -> Tensor:
        answer = answer_ids[row]
        counted = slice(opening if len(answer) > opening else 0, None)
        return cross_entropy(logits[counted].float(), torch.tensor(answer[counted], device=logits.device)).cpu()

    return torch.stack(read_answers(subject, ids, answer_ids, mean_loss, title=title))
