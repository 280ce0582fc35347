"""The tokens_kl scorer: KL divergence over every token of the base model's own continuations."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.core.cost import Answers, Cost, prompt_count
from obliteratus.core.errors import UserError
from obliteratus.core.types import Subject
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.generate import generate, stop_tokens
from obliteratus.inference.logits import kl_divergence
from obliteratus.inference.memory import host_memory
from obliteratus.inference.teacher_forced import read_answers
from obliteratus.prompts import evenly_spaced
from obliteratus.verify.drift import answered_controls, drift_scores
from obliteratus.verify.scoring import ItemValues, Measurement, ScorerContext, scorers

IDS, LOGITS = "continuations.control", "continuations.logits"
PADDING = -1  # no token has this id


def estimate_cost(tokens: int, prompts: int) -> Cost:
    """Return the cost before the edit, when prompts are answered and passed again with their answers.

    Afterwards only the second pass is needed; the larger cost is declared for both.
    """
    n = prompt_count("report", "control", prompts)
    return Cost(n, answers=(Answers(tokens, n),))


@scorers.register("tokens_kl", cite="arXiv:2406.11717", cost=lambda o: estimate_cost(o["tokens"], o["prompts"]))
def tokens_kl(
    context: ScorerContext,
    *,
    tokens: Annotated[int, Field(ge=1, le=1024)] = 16,
    prompts: Annotated[int, Field(ge=1)] = 48,
) -> Measurement:
    """Score KL(base ‖ edited) in nats per token over the base model's own greedy continuations of control prompts.

    The continuations are teacher-forced; the scores are mean, p95 and p99 over prompts of the mean over a prompt's
    tokens. An end token counts as one token if the answer ended in time.

    tokens: the most tokens of a continuation. prompts: the most control prompts, evenly spaced. The base's logits are
    kept unrounded in the model's own dtype, so that the base is not needed any more: prompts × tokens × vocabulary ×
    bytes, 151 MB for SmolLM2 in fp32 at the defaults. Raises UserError if that is more than half of the free memory.
    ``kl.tokens.answered`` is over control prompts that the base answers, as for the first token.
    """
    rows = evenly_spaced(len(context.prompts["control"]), prompts)
    ids = render_prompts(context.subject, [context.prompts["control"][i] for i in rows], reserve=tokens)
    if context.before is None:
        return Measurement(tensors=_continue_base(context.subject, ids, tokens))
    answers = [row[row != PADDING].tolist() for row in context.before.tensors[IDS]]
    base = context.before.tensors[LOGITS].split([len(answer) for answer in answers])

    def divergence(row: int, logits: Tensor) -> Tensor:
        p = base[row].to(logits.device).float().log_softmax(-1)
        return kl_divergence(p, logits.float().log_softmax(-1)).double().mean().cpu()

    means = read_answers(context.subject, ids, answers, divergence, title="VERIFY continuations")
    values = torch.stack(means).float()
    answered = answered_controls(context.before)
    scores = drift_scores("kl.tokens", values, answered[rows] if len(answered) else answered)
    return Measurement(scores, items={"kl.tokens": ItemValues(values, "nats")})


def _continue_base(subject: Subject, ids: Ids, tokens: int) -> dict[str, Tensor]:
    """Return the base's continuations [prompts, tokens] and its logits at all of their tokens [total, vocabulary]."""
    # the end token is predicted but never fed back, so any of several end tokens will do
    end = min(stop_tokens(subject), default=0)
    continuations = generate(subject, ids, tokens, title="VERIFY continuations")
    answers = [row if len(row) == tokens else [*row, end] for row in continuations]
    _check_logits_fit(subject, sum(len(row) for row in answers))
    logits = read_answers(subject, ids, answers, lambda row, x: x.cpu(), title="VERIFY continuations")
    table = torch.full((len(ids), tokens), PADDING, dtype=torch.int32)
    for row, answer in zip(table, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer)
    return {IDS: table, LOGITS: torch.cat(logits)}


def _check_logits_fit(subject: Subject, positions: int) -> None:
    size = positions * subject.model.get_output_embeddings().weight.shape[0] * subject.model.dtype.itemsize
    if 2 * size > host_memory():  # twice, because there are two copies while they are concatenated
        raise UserError(
            f"tokens_kl: the base model's logits take {size / 1e9:.1f} GB, more than half of the free memory; "
            "give the step fewer tokens or prompts"
        )
