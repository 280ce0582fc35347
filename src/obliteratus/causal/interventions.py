"""What steps that run the model share: their context, and ablation, addition and logits that gradients pass through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from obliteratus.core.shapes import Float
from obliteratus.core.types import PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.writers import remove_from_writers
from obliteratus.inference.batching import pad_rows
from obliteratus.inference.hooks import add_to_output, decoder_blocks
from obliteratus.inference.logits import narrow_head, next_logits
from obliteratus.inference.shared_prefix import PreparedPrompts, prepare_prompts
from obliteratus.judge.judge import Judge

Pair = tuple[list[int], list[int]]
"""Token ids of a templated prompt and of an answer to it."""


@dataclass(frozen=True)
class FitContext:
    """The model, with the edits of earlier passes applied, and the prompts that directions are fitted on."""

    subject: Subject
    prompts: PromptSet
    judge: Judge = field(default_factory=Judge)
    """Says which answers show the behavior. By default it looks for refusals."""


def ablate(subject: Subject, direction: Float[Tensor, " width"]) -> AbstractContextManager[None]:
    """Return a context inside which no writer writes along the direction. Gradients reach the direction."""
    return applied(subject, remove_from_writers(subject, normalize(direction, dim=0)[None]))


@contextmanager
def add_to_stream(subject: Subject, stream: int, vector: Float[Tensor, " width"]) -> Iterator[None]:
    """Inside, the vector is added to the stream at index ``stream`` (≥ 1), at every token. Gradients reach it."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return add_to_output(output, vector)

    handle = decoder_blocks(subject)[stream - 1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def compute_answer_logits(
    subject: Subject,
    pairs: Sequence[Pair],
    on_states: Callable[[Tensor], None] = lambda states: None,
    prompts: PreparedPrompts | None = None,
) -> Float[Tensor, "tokens vocabulary"]:
    """Return the logits that predict the answers' tokens, one answer after the other; fp32. Gradients pass through.

    The prefix that all prompts share (the template's system turn) runs once. Rows are padded on the right, which the
    causal mask hides. The head runs at the answers' positions only; ``on_states`` is called with its input there,
    [tokens, width], which `compute_head_logits` accepts. prompts: the same rows, if already prepared.
    """
    rows = [prompt + answer for prompt, answer in pairs]
    prompts = prompts or prepare_prompts(subject, rows, leave=max(len(a) for _, a in pairs) + 1)
    ids, _ = pad_rows(prompts.rows, subject.device)
    positions = [(i, len(p) - prompts.prefix_length - 1 + k) for i, (p, a) in enumerate(pairs) for k in range(len(a))]
    row, column = torch.tensor(positions, device=ids.device).T

    def pick(states: Tensor) -> Tensor:
        on_states(states[row, column])
        return states[row, column][:, None]

    with narrow_head(subject, pick), prompts.pass_over(range(len(ids))):
        return next_logits(subject, ids, prompts.prefix_length, prompts.make_cache(range(len(ids)))).float()


def compute_head_logits(subject: Subject, states: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens vocabulary"]:
    """Return the logits of states that `compute_answer_logits` passed to ``on_states``; fp32.

    The model's own forward pass runs on one token and its state is replaced, so that soft caps and scales apply.
    """
    with narrow_head(subject, lambda _: states[:, None]):
        return next_logits(subject, torch.zeros(1, 1, dtype=torch.long, device=subject.device), 0, None).float()


def concatenate_answers(pairs: Sequence[Pair], device: torch.device) -> Tensor:
    """Return the tokens that `compute_answer_logits` predicts, in its order. [tokens]."""
    return torch.tensor([token for _, answer in pairs for token in answer], device=device)
