"""A small classifier of answers: logistic regression on hashed letter n-grams, trained by tools/train_judge.py."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from obliteratus.judge.reasoning import cut_reasoning
from obliteratus.judge.rung import Answered
from obliteratus.judge.text import cut_quotations

BUCKETS = 1 << 18  # 256 KiB at a byte each; an answer has about 900 n-grams
LENGTHS = (2, 3, 4, 5)  # letters of an n-gram: endings and short words, in any script
READ = 400  # letters of an answer that are read; 240 did worse (docs/experiments/judging.md)


@dataclass(frozen=True)
class Classifier:
    """The weights of one behavior's classifier."""

    weights: NDArray[np.float32]
    """One for each of `BUCKETS`."""
    bias: float

    def judge(self, answers: Sequence[Answered]) -> list[bool | None]:
        """Return for each answer whether it shows the behavior, by the sign of its logit."""
        return [self.logit(answered.answer) > 0 for answered in answers]

    def logit(self, text: str) -> float:
        """Return the log-odds (nats) that an answer shows the behavior."""
        found = hash_ngrams(text)
        total: float = self.weights[found].sum().item()
        return total / math.sqrt(max(1, len(found))) + self.bias


def hash_ngrams(text: str) -> list[int]:
    """Return the buckets of an answer's n-grams, each once: folded, without reasoning and quotations."""
    plain = f" {' '.join(cut_quotations(cut_reasoning(text)).split())[:READ]} "
    ngrams = {plain[i : i + n] for n in LENGTHS for i in range(len(plain) - n + 1)}
    return sorted({zlib.crc32(ngram.encode()) % BUCKETS for ngram in ngrams})


@cache
def load_classifier(path: Path) -> Classifier:
    """Read what `save_classifier` wrote."""
    with np.load(path) as file:
        return Classifier(file["weights"].astype(np.float32) * file["scale"], float(file["bias"]))


def save_classifier(classifier: Classifier, path: Path, trained_on: str) -> None:
    """Write the weights in a byte each, with their scale and the bias. trained_on: digest of the training answers."""
    scale = np.float32(np.abs(classifier.weights).max() / 127)
    weights = np.round(classifier.weights / scale).astype(np.int8)
    np.savez_compressed(path, weights=weights, scale=scale, bias=np.float32(classifier.bias), trained_on=trained_on)
