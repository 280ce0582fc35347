"""Teacher forcing: what the model predicts at each token of given answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from obliteratus.core.progress import Advance, progress
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
    with torch.inference_mode(), progress(title, len(ids)) as advance:
        forced = ForcedAnswers.prepare(subject, ids, answers)

        def run(batch: list[int]) -> dict[int, T]:
            return {i: reduce(i, own) for i, own in zip(batch, forced.read(batch), strict=True)}

        return forced.run_batches(run, advance)


@dataclass(frozen=True)
class ForcedAnswers:
    """Answers behind their prompts, as one model in one state reads them."""

    subject: Subject
    prompts: PreparedPrompts
    counts: list[int]
    """Tokens of each answer."""

    @classmethod
    def prepare(cls, subject: Subject, ids: Ids, answers: Ids) -> ForcedAnswers:
        """Run the prefix that the prompts share."""
        rows = [prompt + answer[:-1] for prompt, answer in zip(ids, answers, strict=True)]
        counts = [len(answer) for answer in answers]
        return cls(subject, prepare_prompts(subject, rows, leave=max(counts, default=1)), counts)

    def read(self, batch: list[int]) -> list[Tensor]:
        """Return the logits of some answers."""
        return _answer_logits(self.subject, self.prompts, batch, [self.counts[i] for i in batch])

    def run_batches(self, run: Callable[[list[int]], dict[int, T]], advance: Advance) -> list[T]:
        """Return the results of all rows, batch by batch."""
        results: dict[int, T] = {}
        lengths, most = [len(row) for row in self.prompts.rows], LOGIT_TOKENS // max(self.counts, default=1)
        for batch in make_batches(lengths, token_budget(self.subject), max(1, most)):
            for part in run_or_halve(run, batch):
                results |= part
                advance(len(part))
        return [results[i] for i in range(len(lengths))]


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
