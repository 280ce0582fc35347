"""Prompts that are asked again and again, under one live plan after another. Blocks below the edits run only once.

Make these objects while no plan is live: they remember what the model does without one.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from obliteratus.core.shapes import Float
from obliteratus.core.types import Prompt, Subject
from obliteratus.inference.cached_prompts import CachedPrompts
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.logits import bounded_kl
from obliteratus.inference.memory import free_memory
from obliteratus.judge.judge import Judge
from obliteratus.verify.behavior import pair_answers, shows_already
from obliteratus.verify.own_words import answer_prompts

CACHE_SHARE = 0.125  # of the free memory, for each group's cached prompts


class JudgedPrompts:
    """Prompts whose answers the judge reads."""

    def __init__(self, subject: Subject, prompts: Sequence[Prompt], judge: Judge, tokens: int) -> None:
        """tokens: the most of an answer."""
        rows = render_prompts(subject, prompts, reserve=tokens)
        self.cached = CachedPrompts(subject, rows, budget=CACHE_SHARE * free_memory(subject))
        self.subject, self.prompts, self.judge, self.tokens = subject, prompts, judge, tokens

    def verdicts(self) -> list[str]:
        """Return the verdict on each answer of the model as it is now."""
        answers = self.cached.generate(self.tokens, done=shows_already(self.subject, self.judge))
        assert answers is not None, "nothing gives the answers up"
        asked = pair_answers(self.subject, self.prompts, answers)
        return [judgment.verdict for judgment in self.judge.judge_all(asked)]


def judge_prompts(subject: Subject, prompts: Sequence[Prompt], judge: Judge, tokens: int, title: str) -> list[str]:
    """Return the verdicts of `JudgedPrompts` on prompts that are asked once, for which nothing is cached."""
    answers = answer_prompts(subject, prompts, judge, tokens, title)
    return [judgment.verdict for judgment in judge.judge_all(answers)]


class ComparedPrompts:
    """Prompts whose first answer token is compared with that of the unedited model."""

    def __init__(self, subject: Subject, prompts: Sequence[Prompt], tokens: int) -> None:
        """tokens: room that is left for an answer in the model's context."""
        rows = render_prompts(subject, prompts, reserve=tokens)
        self.cached = CachedPrompts(subject, rows, budget=CACHE_SHARE * free_memory(subject), answers=())
        self.base = self.cached.first_token()

    def kl(self) -> Float[Tensor, " prompts"]:
        """Return KL(base ‖ model as it is now) by prompt, nats."""
        return bounded_kl(self.base, self.cached.first_token())
