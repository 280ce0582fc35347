"""What moved in whole answers: the KL of every token of the base model's own continuations."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.core.cost import Answers, Cost, n_of
from obliteratus.core.errors import UserError
from obliteratus.core.types import Subject
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.generate import generate, stop_tokens
from obliteratus.inference.logits import kl_divergence
from obliteratus.inference.memory import host_memory
from obliteratus.inference.teacher_forced import read_answers
from obliteratus.prompts import evenly_spaced
from obliteratus.verify.drift import answered_controls, drift_scores
from obliteratus.verify.steps import Measurement, ScorerContext, scorers

IDS, LOGITS = "continuations.control", "continuations.logits"
PADDING = -1  # no token has this id


def cost_of(tokens: int, prompts: int) -> Cost:
    """Before, prompts are answered and passed again with them; after, only the latter. Told as the former."""
    n = n_of("report", "control", prompts)
    return Cost(n, answers=(Answers(tokens, n),))


@scorers.register("tokens_kl", cite="arXiv:2406.11717", cost=lambda o: cost_of(o["tokens"], o["prompts"]))
def tokens_kl(
    context: ScorerContext,
    *,
    tokens: Annotated[int, Field(ge=1, le=1024)] = 16,
    prompts: Annotated[int, Field(ge=1)] = 48,
) -> Measurement:
    """KL(base ‖ edited) in nats a token over the base's own greedy continuations of control prompts, teacher-forced:
    mean, p95 and p99 over prompts of the mean over a prompt's tokens; its end counts as one where it came in time.

    tokens: of a continuation, at most. prompts: at most so many controls, evenly spaced. The base's logits are kept
    whole in the model's own dtype, so that nothing is rounded and the base need not be there any more:
    prompts × tokens × vocabulary × bytes, 151 MB for SmolLM2 in fp32 at the defaults. UserError where that is more
    than half of the free memory. ``kl.tokens.answered`` is over controls that the base answers, as for the first token.
    """
    rows = evenly_spaced(len(context.prompts["control"]), prompts)
    ids = render_prompts(context.subject, [context.prompts["control"][i] for i in rows], reserve=tokens)
    if context.before is None:
        return Measurement(tensors=_base(context.subject, ids, tokens))
    answers = [row[row != PADDING].tolist() for row in context.before.tensors[IDS]]
    base = context.before.tensors[LOGITS].split([len(answer) for answer in answers])

    def divergence(row: int, logits: Tensor) -> Tensor:
        p = base[row].to(logits.device).float().log_softmax(-1)
        return kl_divergence(p, logits.float().log_softmax(-1)).double().mean().cpu()

    values = torch.stack(read_answers(context.subject, ids, answers, divergence, title="VERIFY continuations"))
    answered = answered_controls(context.before)
    scores = drift_scores("kl.tokens", values.float(), answered[rows] if len(answered) else answered)
    return Measurement(scores, tensors={"kl.tokens.control": values.float()})


def _base(subject: Subject, ids: Ids, tokens: int) -> dict[str, Tensor]:
    """The base's continuations [prompts, tokens] and its logits at each of their tokens [tokens of all, vocabulary]."""
    end = min(stop_tokens(subject), default=0)  # predicted, never fed: which of several ends it was makes no difference
    written = generate(subject, ids, tokens, title="VERIFY continuations")
    answers = [row if len(row) == tokens else [*row, end] for row in written]
    _check_room(subject, sum(len(row) for row in answers))
    logits = read_answers(subject, ids, answers, lambda row, x: x.cpu(), title="VERIFY continuations")
    table = torch.full((len(ids), tokens), PADDING, dtype=torch.int32)
    for row, answer in zip(table, answers, strict=True):
        row[: len(answer)] = torch.tensor(answer)
    return {IDS: table, LOGITS: torch.cat(logits)}


def _check_room(subject: Subject, positions: int) -> None:
    size = positions * subject.model.get_output_embeddings().weight.shape[0] * subject.model.dtype.itemsize
    if 2 * size > host_memory():  # twice: while they are put together there are two of them
        raise UserError(
            f"tokens_kl: the base's logits take {size / 1e9:.1f} GB, more than half of the free memory; "
            "give the step fewer tokens or prompts"
        )
