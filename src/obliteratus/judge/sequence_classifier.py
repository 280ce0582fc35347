"""A sequence classifier of transformers as a judge, by folder or hub id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from obliteratus.core.errors import UserError
from obliteratus.judge.reasoning import cut_reasoning
from obliteratus.judge.rung import Answered

BATCH = 16  # answers of one pass; such models are small, and answers short
# Labels without a name are called so by transformers, and number 1 is what a two-way classifier looks for.
UNNAMED = "LABEL_1"


@dataclass(frozen=True)
class SequenceClassifierRung:
    """A classifier that reads an answer alone, as published refusal classifiers do."""

    model: Any
    tokenizer: Any
    label: int
    """Index of the label that stands for the behavior."""

    def judge(self, answers: Sequence[Answered]) -> list[bool | None]:
        """Return for each answer whether its likeliest label is the behavior's."""
        texts, shown = [cut_reasoning(answered.answer) for answered in answers], list[bool | None]()
        with torch.inference_mode():
            for start in range(0, len(texts), BATCH):
                inputs = self.tokenizer(
                    texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt"
                )
                shown += (self.model(**inputs).logits.argmax(-1) == self.label).tolist()
        return shown


def is_sequence_classifier(source: str) -> bool:
    """Return whether a model is configured as a sequence classifier. Raises UserError if there is no such model."""
    names = _read_config(source).architectures or []
    return any(name.endswith("ForSequenceClassification") for name in names)


def open_sequence_classifier(source: str, label: str, behavior: str) -> SequenceClassifierRung:
    """Open a classifier from a folder or the hub.

    label: the name of the label that stands for the behavior; empty takes the one that is called like it, or the second
    of two without names. Raises UserError if no label fits.
    """
    index = find_label(_read_config(source).id2label, label, behavior, source)
    model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    return SequenceClassifierRung(model, AutoTokenizer.from_pretrained(source), index)


def find_label(labels: dict[int, str], wanted: str, behavior: str, source: str) -> int:
    """Return the index of the label that stands for the behavior. Raises UserError that lists the labels."""
    for name in [wanted] if wanted else [behavior, UNNAMED]:
        for index, label in labels.items():
            if label.casefold() == name.casefold():
                return index
    known = ", ".join(labels.values())
    raise UserError(f"{source}: no label is called '{wanted or behavior}'; set judge.label to one of {known}")


def _read_config(source: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"judge '{source}': there is no such model ({first[:120]}); give a folder or a hub id"
        ) from error
