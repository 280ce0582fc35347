"""What stays the same while a plan is fitted: the model, prompts with answers, and what the unedited model says."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from obliteratus.causal.early_stopping import draw_batch
from obliteratus.causal.interventions import Pair, compute_answer_logits
from obliteratus.causal.losses import ReferenceLogits
from obliteratus.core.settings import Tune
from obliteratus.core.shapes import Float
from obliteratus.core.types import Plan, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.cached_prompts import CachedPrompts
from obliteratus.inference.memory import free_memory
from obliteratus.tune.gradient_memory import GradientMemory, recompute_blocks
from obliteratus.tune.objective import ZERO_LOSS, LossTerms, control_loss, target_loss
from obliteratus.tune.targets import TrainingPairs

CACHE_SHARE = 0.25  # of the free memory, for cached prompts: the graph of a pass may take half


class TuningData:
    """What stays the same while a plan is fitted: the model, its own answers, and training and held-out pairs."""

    def __init__(
        self,
        subject: Subject,
        train: TrainingPairs,
        held_out: TrainingPairs,
        settings: Tune,
        memory: GradientMemory,
        seed: int = 0,
    ) -> None:
        self.subject, self.train, self.held_out = subject, train, held_out
        self.settings, self.memory, self.seed = settings, memory, seed
        self.reference = ReferenceLogits(subject)
        self.cached = CachedPairs(subject, [*train.control, *train.target, *held_out.control, *held_out.target])

    def iterate_losses(self, plan: Plan, pairs: TrainingPairs, margin: float) -> Iterator[LossTerms]:
        """Yield the loss of a few pairs at a time, weighted by their share, so that only one graph is held.

        Take gradients of each before asking for the next.
        """
        for chunk, share in self._chunks(pairs.control):
            base = self.reference.logp(chunk)
            with applied(self.subject, plan), recompute_blocks(self.subject, self.memory):
                yield control_loss(self.cached.logp(chunk), base, chunk, share)
        for chunk, share in self._chunks(pairs.target):
            base = self.reference.logp(chunk)
            with applied(self.subject, plan), recompute_blocks(self.subject, self.memory):
                yield target_loss(self.cached.logp(chunk), base, chunk, margin, share)

    @torch.no_grad()
    def evaluate(self, plan: Plan) -> LossTerms:
        """Return the loss on the held-out pairs."""
        return sum(self.iterate_losses(plan, self.held_out, self.settings.margin), ZERO_LOSS)

    def draw_batch(self, step: int) -> TrainingPairs:
        """Draw the pairs of a step. They depend on its number and the seed alone."""
        rng = random.Random(f"{self.seed} {step}")
        groups = (self.train.control, self.train.target)
        return TrainingPairs(*(draw_batch(pairs, self.settings.batch, rng) for pairs in groups))

    def _chunks(self, pairs: Sequence[Pair]) -> Iterator[tuple[Sequence[Pair], float]]:
        """Yield as many pairs as fit one pass, with their share of all pairs."""
        for start in range(0, len(pairs), self.memory.rows):
            chunk = pairs[start : start + self.memory.rows]
            yield chunk, len(chunk) / len(pairs)


class CachedPairs:
    """Log-probabilities of a fixed list of pairs under live edits. Blocks below the lowest edit run only once.

    Gradients reach all edits.
    """

    def __init__(self, subject: Subject, pairs: Sequence[Pair]) -> None:
        self.subject = subject
        self.row_of = {str(pair): i for i, pair in enumerate(pairs)}
        longest = max(len(answer) for _, answer in pairs)
        rows = [prompt + answer for prompt, answer in pairs]
        budget = CACHE_SHARE * free_memory(subject)
        self.cached = CachedPrompts(subject, rows, budget=budget, answers=(), leave=longest + 1)

    def logp(self, pairs: Sequence[Pair]) -> Float[Tensor, "tokens vocabulary"]:
        """Return the log-probabilities that predict the answers' tokens, all answers concatenated.

        Raises KeyError for a pair that is not in the list.
        """
        prompts = self.cached.prepare().select([self.row_of[str(pair)] for pair in pairs])
        return compute_answer_logits(self.subject, pairs, prompts=prompts).log_softmax(-1)
