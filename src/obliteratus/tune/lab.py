"""What steps need that ask the model itself: the model, the fit prompts, and interventions that gradients pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from obliteratus.shapes import Float
from obliteratus.summon.anatomy import gain_of
from obliteratus.summon.capture import blocks
from obliteratus.types import PromptSet, Subject

Pair = tuple[list[int], list[int]]
"""Token ids of a templated prompt and of an answer to it."""


@dataclass(frozen=True)
class Lab:
    """The model as it is now (edits of earlier passes applied) and the prompts that directions are fitted on."""

    subject: Subject
    prompts: PromptSet


@contextmanager
def ablating(subject: Subject, direction: Float[Tensor, " width"]) -> Iterator[None]:
    """Inside, nothing along the direction is written into the stream, by any writer. Gradients reach it.

    Behind a norm with gain γ the writer loses γ⊙d instead, so that what passes the norm is free of d.
    """
    handles = []
    for site in subject.sites:
        if site.role == "writes":
            gain = gain_of(subject, site)
            along = direction if gain is None else gain.to(direction) * direction
            handles.append(subject.module(site.path).register_forward_hook(_without(along / along.norm())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without(unit: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output - (output @ unit.to(output.dtype))[..., None] * unit.to(output.dtype)

    return hook


@contextmanager
def adding(subject: Subject, stream: int, vector: Float[Tensor, " width"]) -> Iterator[None]:
    """Inside, the vector is added to the stream at index ``stream`` (≥ 1), at every token. Gradients reach it."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + vector.to(output[0].dtype), *output[1:])
        return output + vector.to(output.dtype)

    handle = blocks(subject)[stream - 1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def answer_logits(subject: Subject, pairs: Sequence[Pair]) -> Float[Tensor, "tokens vocabulary"]:
    """Logits that predict the answers' tokens, all answers one after the other; fp32.

    Right padding under the causal mask is never seen by what is kept. The head runs on the kept positions only.
    """
    rows = [torch.tensor(prompt + answer) for prompt, answer in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(subject.device)
    kept = [(i, len(p) - 1 + k) for i, (p, a) in enumerate(pairs) for k in range(len(a))]
    row, column = torch.tensor(kept, device=ids.device).T

    def pick(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0][row, column][None],)

    handle = subject.model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        logits: Tensor = subject.model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        handle.remove()
    return logits


def answer_tokens(pairs: Sequence[Pair], device: torch.device) -> Tensor:
    """The tokens that `answer_logits` predicts, in its order. [tokens]."""
    return torch.tensor([token for _, answer in pairs for token in answer], device=device)
