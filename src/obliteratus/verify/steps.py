"""What every scorer shares: the registry, what it is given, and what it gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from obliteratus.core.registry import Registry
from obliteratus.core.results import Score
from obliteratus.core.settings import Step
from obliteratus.core.types import PromptSet, Subject


@dataclass(frozen=True)
class Measurement:
    """What VERIFY found on one state of a model."""

    scores: Mapping[str, Score] = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = ()
    """One entry a prompt and scorer: group, prompt, category, answer, verdict …"""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """What a later comparison needs, e.g. ``first_token.control`` [prompts, vocabulary]."""

    def __or__(self, other: Measurement) -> Measurement:
        return Measurement(
            {**self.scores, **other.scores},
            [*self.records, *other.records],
            {**self.tensors, **other.tensors},
        )

    def save(self, stem: Path) -> None:
        """Write STEM.json and STEM.safetensors."""
        data = {"scores": {k: v.model_dump() for k, v in self.scores.items()}, "records": list(self.records)}
        stem.with_suffix(".json").write_text(json.dumps(data, indent=1, ensure_ascii=False))
        save_file({k: v.contiguous() for k, v in self.tensors.items()}, stem.with_suffix(".safetensors"))

    @classmethod
    def load(cls, stem: Path) -> Measurement:
        """What `save` wrote."""
        data = json.loads(stem.with_suffix(".json").read_text())
        scores = {k: Score(**v) for k, v in data["scores"].items()}
        return cls(scores, data["records"], load_file(stem.with_suffix(".safetensors")))


@dataclass(frozen=True)
class ScorerContext:
    """What a scorer may look at."""

    subject: Subject
    prompts: PromptSet
    before: Measurement | None
    """The unedited model's measurement; None while that is being taken."""
    found: Measurement = field(default_factory=Measurement)
    """What the scorers before this one found on the same model."""
    base: Subject | None = None
    """The unedited model, where it is at hand: the subject itself while its edits are live (see `unedited`)."""


Scorer = Callable[..., Measurement]
"""(context, **options) → scores, records, tensors."""


scorers: Registry[Scorer] = Registry("verify")
NOTHING = Measurement()


def measure(
    subject: Subject,
    prompts: PromptSet,
    steps: Sequence[Step],
    before: Measurement | None = None,
    base: Subject | None = None,
    found: Measurement = NOTHING,
) -> Measurement:
    """Run the scorers on held-out prompts, in their order: later ones see what earlier ones found.

    before, base: what was measured of the unedited model, and that model; the subject itself where edits are live.
    found: what is known beforehand: tensors that scorers would else pass prompts for.
    """
    told = Measurement()
    for step in steps:
        options = scorers.check(step.use, step.options)
        told = told | scorers[step.use].function(ScorerContext(subject, prompts, before, found | told, base), **options)
    return told
