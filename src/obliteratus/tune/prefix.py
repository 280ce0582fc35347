"""Prompts with their answers, passed many times under edits that change: the blocks below the lowest edit run once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from obliteratus.causal.interventions import Pair, answer_logits
from obliteratus.core.shapes import Float
from obliteratus.core.types import Subject
from obliteratus.inference.cached_prompts import CachedPrompts
from obliteratus.inference.memory import free_memory

KEPT = 0.25  # of the free memory: the graph of a pass may take half


class CachedPairs:
    """`answer_logits` for pairs of a fixed list, under any live edits. Gradients pass above the lowest of them."""

    def __init__(self, subject: Subject, pairs: Sequence[Pair]) -> None:
        self.subject = subject
        self.row = {str(pair): i for i, pair in enumerate(pairs)}
        leave = max(len(answer) for _, answer in pairs) + 1
        rows = [prompt + answer for prompt, answer in pairs]
        self.trunk = CachedPrompts(subject, rows, budget=KEPT * free_memory(subject), answers=(), leave=leave)

    def logp(self, pairs: Sequence[Pair]) -> Float[Tensor, "tokens vocabulary"]:
        """Log-probabilities that predict the answers' tokens, all answers one after the other. KeyError for other
        pairs."""
        prompts = self.trunk.now().of([self.row[str(pair)] for pair in pairs])
        return answer_logits(self.subject, pairs, prompts=prompts).log_softmax(-1)
