"""Given answers under teacher forcing: what the model predicts at each of their tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from obliteratus.core.progress import progress
from obliteratus.core.types import Subject
from obliteratus.inference.batching import make_batches, pad_rows, run_or_halve, state_bytes, token_budget
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.logits import narrow_head, next_logits
from obliteratus.inference.memory import LOGIT_TOKENS
from obliteratus.inference.shared_prefix import PreparedPrompts, prepare_prompts

T = TypeVar("T")


def read_answers(
    subject: Subject, ids: Ids, answers: Ids, of: Callable[[int, Tensor], T], *, title: str = "answers"
) -> list[T]:
    """``of(row, logits)`` for each row. logits [len(answer), vocabulary], in the model's own dtype on its device,
    predict the tokens of ``answers[row]`` (at least one) behind the prompt ``ids[row]``; the last is never fed.

    Rows pass in batches; the LM head sees the answers' positions alone.
    """
    found: dict[int, T] = {}
    with torch.inference_mode(), progress(title, len(ids)) as advance:
        rows = [prompt + answer[:-1] for prompt, answer in zip(ids, answers, strict=True)]
        longest = max((len(answer) for answer in answers), default=1)
        prompts = prepare_prompts(subject, rows, leave=longest)

        def run(group: list[int]) -> dict[int, T]:
            parts = _logits(subject, prompts, group, [len(answers[i]) for i in group])
            return {i: of(i, part) for i, part in zip(group, parts, strict=True)}

        size = token_budget(subject, state_bytes(subject))
        for group in make_batches([len(r) for r in prompts.rows], size, max(1, LOGIT_TOKENS // longest)):
            for part in run_or_halve(run, group):
                found |= part
                advance(len(part))
    return [found[i] for i in range(len(ids))]


def _logits(subject: Subject, prompts: PreparedPrompts, group: list[int], counts: list[int]) -> list[Tensor]:
    """Logits at the last so many positions of each row of the group."""
    batch, lengths = pad_rows([prompts.rows[i] for i in group], subject.device)
    kept = [
        (k, n - count + j)
        for k, (n, count) in enumerate(zip(lengths.tolist(), counts, strict=True))
        for j in range(count)
    ]
    row, column = torch.tensor(kept, device=subject.device).T
    with narrow_head(subject, lambda states: states[row, column][:, None]):
        logits = next_logits(subject, batch, prompts.skipped, prompts.cache(group))
    return list(logits.split(counts))
