"""How likely the answers are to the unedited model: text that has come apart is unlike anything it would say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from obliteratus.core.cost import Cost, prompt_count
from obliteratus.core.errors import UserError
from obliteratus.core.results import Score
from obliteratus.core.shapes import Float
from obliteratus.core.types import Prompt, Subject
from obliteratus.excise.live.hooks import (without_edits)
from obliteratus.inference.chat_template import context_length, render_prompts
from obliteratus.inference.generate import stop_tokens
from obliteratus.inference.teacher_forced import read_answers
from obliteratus.verify.intervals import bootstrap, group_ratio
from obliteratus.verify.steps import Measurement, ScorerContext, scorers

GROUPS = ("target", "control")


# A refusal undone costs nats at the first tokens, since the base would have refused (organism: 7.0, 2.4, then 0.2–1.4):
# that is the edit's purpose. What comes after them says whether the answer holds together.
OPENING = 4


@scorers.register("fluency", cost=lambda options: Cost(texts=prompt_count("report")))
def fluency(context: ScorerContext, *, opening: Annotated[int, Field(ge=0, le=64)] = OPENING) -> Measurement:
    """Perplexity under the unedited model of the answers to target and to control prompts, and the ratio of the two.

    exp of the mean over answers of the mean loss a token, each behind its own prompt. Answers are those of the refusal
    scorer, which must come before, just as they were given: loops and refusals too; an empty one is its end token.
    opening: the first tokens of each answer, which are not counted; an answer that is all opening counts as it is.
    Loops are likely text, so read it beside ``degenerate``. UserError without answers, or where the unedited model is
    not at hand.
    """
    base = context.subject if context.before is None else context.base
    if base is None:
        raise UserError("fluency: the unedited model is not at hand; give it to `verify` as base=")
    losses: dict[str, Tensor] = {}
    for group in (g for g in GROUPS if g in context.prompts.groups):
        answers = [r["answer"] for r in context.found.records if (r["scorer"], r["group"]) == ("refusal", group)]
        if len(answers) != len(context.prompts[group]):
            raise UserError("fluency: there are no answers to score; put the step refusal before it")
        with without_edits():
            losses[group] = answer_losses(base, context.prompts[group], answers, opening)
    return Measurement(_scores(losses), tensors={f"losses.answers.{g}": x for g, x in losses.items()})


def _scores(losses: dict[str, Tensor]) -> dict[str, Score]:
    scores = {f"fluency.{g}": bootstrap(x, lambda v: v.mean(-1).exp(), "perplexity") for g, x in losses.items()}
    if len(losses) == len(GROUPS):
        scores["fluency.ratio"] = group_ratio(losses["target"], losses["control"])
    return scores


def answer_losses(
    subject: Subject, prompts: Sequence[Prompt], answers: Sequence[str], opening: int = 0
) -> Float[Tensor, " n"]:
    """Mean negative log-likelihood in nats a token of each answer behind its prompt and opening, as the model is now.

    An empty answer, or one of special tokens alone, is the end token. Longer ones are cut at half of the context.
    """
    end = min(stop_tokens(subject), default=0)
    most = context_length(subject) // 2
    rows = subject.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    told = [list(row)[:most] or [end] for row in rows]
    ids = render_prompts(subject, prompts, reserve=max(map(len, told)))

    def loss(row: int, logits: Tensor) -> Tensor:
        counted = slice(opening if len(told[row]) > opening else 0, None)
        return cross_entropy(logits[counted].float(), torch.tensor(told[row][counted], device=logits.device)).cpu()

    return torch.stack(read_answers(subject, ids, told, loss, title="VERIFY fluency"))
