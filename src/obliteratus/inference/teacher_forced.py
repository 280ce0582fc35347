"""Teacher forcing: what the model predicts at each token of given answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from obliteratus.core.progress import progress
from obliteratus.core.types import Subject
from obliteratus.inference.batching import make_batches, pad_rows, run_or_halve, token_budget
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.logits import narrow_head, next_logits
from obliteratus.inference.memory import LOGIT_TOKENS
from obliteratus.inference.shared_prefix import PreparedPrompts, prepare_prompts

T = TypeVar("T")


def read_answers(
    subject: Subject, ids: Ids, answers: Ids, reduce: Callable[[int, Tensor], T], *, title: str = "answers"
) -> list[T]:
    """Return ``reduce(row, logits)`` for each row.

    logits [len(answer), vocabulary], in the model's own dtype on its device, predict the tokens of ``answers[row]`` (at
    least one) behind the prompt ``ids[row]``. The last token of an answer is never fed. Rows run in batches, and the LM
    head sees only the answers' positions.
    """
    results: dict[int, T] = {}
    with torch.inference_mode(), progress(title, len(ids)) as advance:
        rows = [prompt + answer[:-1] for prompt, answer in zip(ids, answers, strict=True)]
        longest = max((len(answer) for answer in answers), default=1)
        prompts = prepare_prompts(subject, rows, leave=longest)

        def run(batch: list[int]) -> dict[int, T]:
            logits = _answer_logits(subject, prompts, batch, [len(answers[i]) for i in batch])
            return {i: reduce(i, own) for i, own in zip(batch, logits, strict=True)}

        lengths = [len(row) for row in prompts.rows]
        for batch in make_batches(lengths, token_budget(subject), max(1, LOGIT_TOKENS // longest)):
            for part in run_or_halve(run, batch):
                results |= part
                advance(len(part))
    return [results[i] for i in range(len(ids))]


def _answer_logits(subject: Subject, prompts: PreparedPrompts, batch: list[int], counts: list[int]) -> list[Tensor]:
    """Return the logits at the last ``counts[k]`` positions of each row of the batch."""
    ids, lengths = pad_rows([prompts.rows[i] for i in batch], subject.device)
    positions = [
        (k, length - count + j)
        for k, (length, count) in enumerate(zip(lengths.tolist(), counts, strict=True))
        for j in range(count)
    ]
    row, column = torch.tensor(positions, device=subject.device).T
    with narrow_head(subject, lambda states: states[row, column][:, None]):
        logits = next_logits(subject, ids, prompts.prefix_length, prompts.make_cache(batch))
    return list(logits.split(counts))
