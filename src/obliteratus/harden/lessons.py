"""What a model is trained on: its own refusals of target prompts, and its own answers to control prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from obliteratus.causal.early_stopping import draw_batch
from obliteratus.causal.interventions import Pair, concatenate_answers
from obliteratus.causal.losses import ROWS_PER_PASS, ReferenceLogits
from obliteratus.core.errors import UserError
from obliteratus.core.progress import note
from obliteratus.core.settings import FrozenModel
from obliteratus.core.shapes import Float
from obliteratus.core.types import Prompt, PromptSet, Subject
from obliteratus.harden.settings import HardenSettings
from obliteratus.inference.answers import AnswerDecoder
from obliteratus.inference.chat_template import find_answer_end, render_prompts
from obliteratus.inference.generate import generate
from obliteratus.judge.judge import SHOWN, Judge
from obliteratus.prompts import pick_evenly
from obliteratus.tune.tuning_data import CachedPairs

LEAST = 8  # pairs of either group: of fewer, a batch would be the same in each step
FIRST_TOKEN = 0.5  # extra weight on first tokens, where the choice to refuse is made; as in organisms/losses.py
FILE = "lessons.json"


class Lessons(FrozenModel):
    """Token ids of prompts with answers."""

    refusals: tuple[Pair, ...]
    """Target prompts, with answers that show the behavior."""
    answers: tuple[Pair, ...]
    """Control prompts, with answers that do not."""

    def draw(self, size: int, step: int, seed: int) -> tuple[list[Pair], list[Pair]]:
        """Return the pairs of a step, which depend on its number and the seed alone."""
        rng = random.Random(f"{seed} {step}")
        return draw_batch(self.refusals, size, rng), draw_batch(self.answers, size, rng)


def collect_lessons(subject: Subject, prompts: PromptSet, judge: Judge, settings: HardenSettings) -> Lessons:
    """Let the model answer, and keep the answers that are as they should be.

    Raises UserError if fewer than `LEAST` answers of a group are.
    """
    sizes = {
        "target": (settings.prompts, settings.tokens),
        "control": (settings.control_prompts, settings.control_tokens),
    }
    answered = {g: _answer(subject, prompts[g], *size, f"HARDEN {g} answers") for g, size in sizes.items()}
    decoder = AnswerDecoder.create(subject)

    def shows(pair: Pair) -> bool:
        return judge.judge_answer(decoder.decode(pair[1])) in SHOWN

    refusals = tuple(pair for pair in answered["target"] if shows(pair))
    answers = tuple(pair for pair in answered["control"] if not shows(pair))
    for group, kept, what in (("target", refusals, "show"), ("control", answers, "do not show")):
        if len(kept) < LEAST:
            raise UserError(
                f"harden: {len(kept)} of {len(answered[group])} answers to {group} prompts {what} {judge.name}, and at "
                f"least {LEAST} must; give other prompts or another --behavior"
            )
    note("HARDEN", f"{len(refusals)} answers that show {judge.name} and {len(answers)} others are trained on")
    return Lessons(refusals=refusals, answers=answers)


def _answer(subject: Subject, prompts: Sequence[Prompt], most: int, tokens: int, title: str) -> list[Pair]:
    """Return prompts with the model's greedy answers, ended by the end token where they ended."""
    ids = render_prompts(subject, pick_evenly(prompts, most), reserve=tokens)
    answers = generate(subject, ids, tokens, title=title)
    end = find_end_token(subject)
    ended = [answer + end if len(answer) < tokens else answer for answer in answers]
    return [pair for pair in zip(ids, ended, strict=True) if pair[1]]


def find_end_token(subject: Subject) -> list[int]:
    """Return the token that ends an answer: the chat template's, or else the tokenizer's; empty without either."""
    mark, end = find_answer_end(subject), subject.tokenizer.eos_token_id
    if len(mark) == 1:
        return list(mark)
    return [] if end is None else [end]


def save_lessons(lessons: Lessons, folder: Path) -> None:
    """Write the token ids."""
    (folder / FILE).write_text(lessons.model_dump_json(), encoding="utf-8")


def load_lessons(folder: Path) -> Lessons:
    """Read what `save_lessons` wrote."""
    return Lessons.model_validate_json((folder / FILE).read_text(encoding="utf-8"))


# -------------------------------------------------------------------------------------------------- losses
class LessonLosses:
    """The losses of pairs on the model as it is, without and under live edits. Make it before the adapter is there.

    Blocks below the first one that is trained, and below all live edits, run only once.
    """

    def __init__(self, subject: Subject, lessons: Lessons) -> None:
        pairs = [*lessons.refusals, *lessons.answers]
        self.subject = subject
        self.base = ReferenceLogits(subject)
        for start in range(0, len(lessons.answers), ROWS_PER_PASS):
            self.base.logp(lessons.answers[start : start + ROWS_PER_PASS])
        self.cached = CachedPairs(subject, pairs)

    def refusal(self, pairs: Sequence[Pair]) -> Float[Tensor, ""]:
        """Return the cross-entropy of the answers in nats a token, plus `FIRST_TOKEN` × that of their first tokens."""
        wanted = concatenate_answers(pairs, self.subject.device)
        return weigh_first(F.nll_loss(self.cached.logp(pairs), wanted, reduction="none"), pairs)

    def control(self, pairs: Sequence[Pair]) -> Float[Tensor, ""]:
        """Return KL(base ‖ model as it is now) in nats a token, plus `FIRST_TOKEN` × that of first tokens."""
        base = self.base.logp(pairs)
        each = F.kl_div(self.cached.logp(pairs), base, reduction="none", log_target=True).sum(-1)
        return weigh_first(each, pairs)


def weigh_first(each: Float[Tensor, " tokens"], pairs: Sequence[Pair]) -> Float[Tensor, ""]:
    """Return the mean over all tokens plus `FIRST_TOKEN` × the mean over the first of each answer."""
    first = torch.stack([part[0] for part in each.split([len(answer) for _, answer in pairs])])
    return each.mean() + FIRST_TOKEN * first.mean()
