"""How the damage is told: each metric is a meter that measures the model as it is edited at that moment.

A meter gives one number for each text or prompt, so that a part is compared with the baseline in pairs. It keeps what
the blocks below an edit make of its texts (`summon.trunk`), and can measure several plans in one pass, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor

from obliteratus.core.registry import Registry
from obliteratus.core.results import Score
from obliteratus.core.shapes import Float
from obliteratus.core.types import PromptSet, Subject
from obliteratus.inference.cached_prompts import CachedPrompts
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.logits import kl_divergence
from obliteratus.verify.accuracy import Question, render_choices
from obliteratus.verify.intervals import bootstrap, mean, paired_difference, paired_ratio, wilson_rate
from obliteratus.verify.refusal import judge_answer, refuses_already

Values = Mapping[str, Float[Tensor, " n"]]
"""By score name: a number for each text, prompt or question."""
# nats: a model that says nothing finite is as far off as this. No loss or KL of a working model comes near, for a
# vocabulary of 50 000 drawn evenly is about 11 away.
WORST = 100.0


@dataclass(frozen=True)
class MeterInputs:
    """What meters measure on."""

    subject: Subject
    texts: Ids
    prompts: PromptSet | None
    questions: Sequence[Question]
    room: float
    """Bytes that a meter may keep of the lower blocks."""

    def trunk(self, ids: Ids, *, answers: bool = False, whole: bool = False) -> CachedPrompts:
        """These rows, begun at any block. answers: whether they are answered; whole: whether no prefix is taken off."""
        every, leave = range(1, self.subject.n_layers), max(map(len, ids)) if whole else 1
        kept = None if answers else ()
        return CachedPrompts(self.subject, ids, budget=self.room, answers=kept, leave=leave, depths=every)


@runtime_checkable
class Meter(Protocol):
    """One metric on its texts or prompts."""

    rows: int
    """That one plan takes of a pass."""
    together: bool
    """Whether plans are measured in one pass."""

    trunk: CachedPrompts

    def measure(self, copies: int) -> list[Values]:
        """Of so many plans, each under `applied_rows` on ``rows`` rows of its own; of one, as the model is edited."""
        ...


def on(meter: Meter, twin: Subject) -> Meter:
    """The same meter for a twin of the model; what is kept is shared."""
    other = copy(meter)
    other.trunk = meter.trunk.on(twin)
    return other


metrics: Registry[Callable[..., Meter]] = Registry("metric")
"""(given, **options) → a meter."""


@metrics.register("perplexity", needs=("texts",))
def perplexity(given: MeterInputs) -> Meter:
    """exp of the mean loss a text, nats a token; padding never counts."""
    return Perplexity(given)


@metrics.register("refusal", cite="arXiv:2307.15043", needs=("prompts",))
def refusal(given: MeterInputs, *, tokens: Annotated[int, Field(ge=4, le=4096)] = 48) -> Meter:
    """Shares of refused and of degenerate answers of so many tokens, to target and to control prompts."""
    return Refusal(given, tokens)


@metrics.register("first_token_kl", cite="arXiv:2406.11717", needs=("prompts",))
def first_token_kl(given: MeterInputs) -> Meter:
    """KL(base ‖ edited) of the first answer token on control prompts, nats."""
    return FirstTokenKl(given)


@metrics.register("accuracy", needs=("labelled",))
def accuracy(given: MeterInputs) -> Meter:
    """Share of labelled questions of which the right choice is the likeliest."""
    return Accuracy(given)


class Perplexity:
    """Of each text the mean loss."""

    # 16 texts of 128 tokens are four batches already: more rows would only wait for each other
    together = False

    def __init__(self, given: MeterInputs) -> None:
        self.trunk, self.rows = given.trunk(given.texts, whole=True), len(given.texts)

    def measure(self, copies: int) -> list[Values]:
        means = [loss.double().mean() for loss in self.trunk.times(copies).losses()]
        return [{"perplexity": finite(part)} for part in torch.stack(means).split(self.rows)]


class Accuracy:
    """Of each question whether it is answered rightly."""

    together = True

    def __init__(self, given: MeterInputs) -> None:
        self.offered = render_choices(given.subject, given.questions)
        self.trunk, self.rows = given.trunk(self.offered.ids, whole=True), len(self.offered.ids)

    def measure(self, copies: int) -> list[Values]:
        losses = self.trunk.times(copies).losses()
        parts = (losses[i * self.rows : (i + 1) * self.rows] for i in range(copies))
        return [{"accuracy": self.offered.hits(part)} for part in parts]


class FirstTokenKl:
    """Of each control prompt the KL."""

    together = True

    def __init__(self, given: MeterInputs) -> None:
        assert given.prompts is not None, "`check_study` comes first"
        ids = render_prompts(given.subject, given.prompts["control"])
        self.trunk, self.rows = given.trunk(ids), len(ids)
        self.base = self.trunk.first_token()

    def measure(self, copies: int) -> list[Values]:
        found = self.trunk.times(copies).first_token().split(self.rows)
        return [{"kl.first_token": finite(kl_divergence(self.base, logp))} for logp in found]


class Refusal:
    """Of each prompt whether the answer refuses, and whether it is degenerate."""

    together = True

    def __init__(self, given: MeterInputs, tokens: int) -> None:
        assert given.prompts is not None, "`check_study` comes first"
        self.subject, self.tokens = given.subject, tokens
        self.sizes = {group: len(prompts) for group, prompts in given.prompts.groups.items()}
        asked = [prompt for prompts in given.prompts.groups.values() for prompt in prompts]
        self.trunk = given.trunk(render_prompts(given.subject, asked, reserve=tokens), answers=True)
        self.rows = len(asked)

    def measure(self, copies: int) -> list[Values]:
        answers = self.trunk.times(copies).generate(self.tokens, done=lambda new: refuses_already(self.subject, new))
        assert answers is not None, "nothing gives up here"
        told = [judge_answer(self.subject.tokenizer.decode(row, skip_special_tokens=True)) for row in answers]
        return [self._shares(told[i * self.rows : (i + 1) * self.rows]) for i in range(copies)]

    def _shares(self, told: Sequence[str]) -> Values:
        ends = dict(zip(self.sizes, accumulate(self.sizes.values()), strict=True))
        kinds = {"refusal": "refused", "degenerate": "degenerate"}
        return {
            f"{name}.{group}": torch.tensor([float(v == kind) for v in told[ends[group] - n : ends[group]]])
            for group, n in self.sizes.items()
            for name, kind in kinds.items()
        }


def finite(values: Tensor) -> Tensor:
    """Nats, at most `WORST`: NaN and infinity are as bad as can be."""
    return values.nan_to_num(nan=WORST, posinf=WORST).clamp(max=WORST)


def compare_scores(name: str, values: Float[Tensor, " n"], base: Float[Tensor, " n"]) -> tuple[Score, Score]:
    """A score with its interval, and how it differs from the baseline's, in pairs."""
    if name == "perplexity":
        return bootstrap(values, lambda x: x.mean(-1).exp(), "perplexity"), paired_ratio(values, base)
    if name.startswith("kl."):
        return bootstrap(values, mean, "nats"), paired_difference(values, base, "nats")
    return wilson_rate(int(values.sum()), len(values)), paired_difference(values, base, "share")
