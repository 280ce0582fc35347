"""What all scorers share: the registry, the context they are given, and the measurement they return."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from obliteratus.core.errors import UserError, unknown_name
from obliteratus.core.progress import shows_progress
from obliteratus.core.registry import Registry
from obliteratus.core.results import Score
from obliteratus.core.settings import Step
from obliteratus.core.shapes import Float
from obliteratus.core.types import PromptSet, Subject
from obliteratus.core.views import Described, Plottable
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.generate import IsDone, generate
from obliteratus.inference.logits import first_token_log_probs
from obliteratus.inference.token_losses import token_losses
from obliteratus.judge.judge import Judge
from obliteratus.verify.intervals import (
    mean_score,
    paired_difference,
    paired_ratio,
    paired_share_change,
    perplexity_score,
    wilson_rate,
)
from obliteratus.verify.questions import Question

SHOWN = 2  # scores in a measurement's line, which is to be read at a glance
ITEM_PREFIX = "items/"  # of per-item values among the tensors of a saved measurement


@dataclass(frozen=True, repr=False)
class ItemValues(Described):
    """One number per prompt, text or question."""

    values: Float[Tensor, " n"]
    unit: Literal["share", "nats", "perplexity", "tokens", "mean"]
    """share: 0 or 1 per item. nats, tokens, mean (any other number): averaged. perplexity: mean losses in nats, scored
    as exp of their mean."""

    def describe(self) -> str:
        """Return how many items there are, and their unit."""
        return f"{len(self.values)} items in {self.unit}"

    def score(self) -> Score:
        """Return the average over items with its 95 % interval, if it has one."""
        if self.unit == "perplexity":
            return perplexity_score(self.values)
        if self.unit == "share":
            return wilson_rate(int(self.values.sum()), len(self.values))
        return mean_score(self.values, self.unit)

    def change(self, base: ItemValues) -> Score:
        """Return the ratio (of perplexities) or difference to the same items of the baseline, paired item by item."""
        if self.unit == "perplexity":
            return paired_ratio(self.values, base.values)
        if self.unit == "share":
            return paired_share_change(self.values, base.values)
        return paired_difference(self.values, base.values, self.unit)


@dataclass(frozen=True, repr=False)
class Measurement(Plottable):
    """The scores of one state of a model, and the per-item values, answers and tensors behind them."""

    scores: Mapping[str, Score] = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = ()
    """One entry per prompt and scorer: group, prompt, category, answer, verdict …"""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """What a later comparison needs, e.g. ``first_token.control`` [prompts, vocabulary]."""
    items: Mapping[str, ItemValues] = field(default_factory=dict)
    """Per-item values by name, which a study pairs with those of its baseline."""

    def __getitem__(self, name: str) -> Score:
        """Return a score by its name, such as ``refusal.target``. Raises UserError for one that was not measured."""
        if name not in self.scores:
            raise UserError(unknown_name("score", name, self.scores) if self.scores else "no score was measured")
        return self.scores[name]

    def describe(self) -> str:
        """Return how many scores there are, and the first ones."""
        shown = [f"{name} {str(score).partition(', n')[0]}" for name, score in [*self.scores.items()][:SHOWN]]
        return ", ".join([f"{len(self.scores)} scores", *shown])

    def __or__(self, other: Measurement) -> Measurement:
        return Measurement(
            {**self.scores, **other.scores},
            [*self.records, *other.records],
            {**self.tensors, **other.tensors},
            {**self.items, **other.items},
        )

    def save(self, stem: Path) -> None:
        """Write STEM.json and STEM.safetensors."""
        scores = {name: score.model_dump() for name, score in self.scores.items()}
        units = {name: item.unit for name, item in self.items.items()}
        data = {"scores": scores, "records": list(self.records), "units": units}
        stem.with_suffix(".json").write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
        values = {f"{ITEM_PREFIX}{name}": item.values for name, item in self.items.items()}
        tensors = {name: tensor.contiguous() for name, tensor in {**self.tensors, **values}.items()}
        save_file(tensors, stem.with_suffix(".safetensors"))

    @classmethod
    def load(cls, stem: Path) -> Measurement:
        """Read what `save` wrote."""
        data = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        tensors = load_file(stem.with_suffix(".safetensors"))
        scores = {name: Score(**score) for name, score in data["scores"].items()}
        items = {name: ItemValues(tensors.pop(f"{ITEM_PREFIX}{name}"), unit) for name, unit in data["units"].items()}
        return cls(scores, data["records"], tensors, items)


NOTHING = Measurement()


@dataclass(frozen=True)
class ScorerContext:
    """What a scorer may read, and the model's outputs that it asks for."""

    subject: Subject
    prompts: PromptSet
    before: Measurement | None = None
    """The unedited model's measurement; None while that is being taken."""
    known: Measurement = NOTHING
    """What earlier scorers measured of the same state of the model, and what was known beforehand."""
    base: Subject | None = None
    """The unedited model, if it is at hand: the subject itself while its edits are live (see `without_edits`)."""
    texts: Ids | None = None
    """Token rows for `perplexity`; None: those that its option names."""
    questions: Sequence[Question] = ()
    """Questions for `accuracy`; empty: those of the file that its option names."""
    judge: Judge = field(default_factory=Judge)
    """Says which answers show the behavior. By default it looks for refusals."""

    def require_unedited(self, scorer: str) -> Subject:
        """Return the unedited model. Raises UserError, in the name of the scorer, if it is not at hand."""
        found = self.subject if self.before is None else self.base
        if found is None:
            raise UserError(f"{scorer}: the unedited model is not at hand; give it to `measure` as base=")
        return found

    def first_tokens(self, ids: Ids) -> Float[Tensor, "rows vocabulary"]:
        """Return log-probabilities (natural, fp32) of each row's first answer token."""
        return first_token_log_probs(self.subject, ids, title="VERIFY first tokens")

    def losses(self, ids: Ids, title: str) -> list[Tensor]:
        """Return each row's token losses in nats, [length − 1] each."""
        return token_losses(self.subject, ids, title=title)

    def answers(
        self, ids: Ids, tokens: int, done: IsDone, wanted: Sequence[int]
    ) -> tuple[Ids, Float[Tensor, "k vocab"]]:
        """Return each row's greedy answer of up to so many tokens, and first-token log-probabilities of wanted rows.

        done: ends an answer early. The log-probabilities may be empty, where the passes do not provide them.
        """
        first: dict[int, Tensor] = {}

        def keep_first(rows: list[int], logits: Tensor) -> None:
            index = {row: k for k, row in enumerate(rows)}
            first.update({row: logits[index[row]].float().log_softmax(-1).cpu() for row in wanted if row in index})

        answers = generate(self.subject, ids, tokens, done=done, on_first_logits=keep_first, title="VERIFY answers")
        return answers, torch.stack([first[row] for row in wanted]) if wanted else torch.empty(0, 0)


def pick_answers(records: Sequence[Mapping[str, Any]], group: str) -> list[Mapping[str, Any]]:
    """Return the records that the scorer `behavior` left of a group, one for each prompt in order."""
    return [r for r in records if (r["scorer"], r["group"]) == ("behavior", group)]


Scorer = Callable[..., Measurement]
"""(context, **options) → per-item values, scores, records and tensors of the model as it is edited at that moment."""

scorers: Registry[Scorer] = Registry(
    "verify",
    renamed={
        "tokens_kl": "continuation_kl",
        "accuracy.labelled": "labeled",
        "refusal": "behavior",
        "refusal_score": "behavior_score",
    },
)


@shows_progress
def measure(
    subject: Subject,
    prompts: PromptSet,
    steps: Sequence[Step | str],
    before: Measurement | None = None,
    base: Subject | None = None,
    known: Measurement = NOTHING,
    judge: Judge | None = None,
) -> Measurement:
    """Run the scorers on held-out prompts in their order; later ones read what earlier ones measured.

    steps: scorers with their options, or by name alone. Raises UserError for a scorer or an option that does not exist.
    before, base: the unedited model's measurement, and that model (the subject itself while its edits are live).
    known: what is known beforehand, so that scorers need no passes of their own for it. judge: None looks for refusals.

    >>> ob.measure(subject, prompts, ["behavior", ob.Step(use="first_token_kl")])["refusal.target"]
    <Score: 100.0% (90.4–100.0%), n 36>
    """
    measured, judge = Measurement(), judge or Judge()
    for step in (Step(use=step) if isinstance(step, str) else step for step in steps):
        options = scorers.check(step.use, step.options)
        context = ScorerContext(subject, prompts, before, known | measured, base, judge=judge)
        measured = measured | scorers[step.use].function(context, **options)
    return measured
