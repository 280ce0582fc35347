"""Train the judge's classifier on the answers in tools/judge_answers, and write it beside the behavior."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, embedding_bag

from obliteratus.judge.behavior_file import FOLDER
from obliteratus.judge.classifier import BUCKETS, Classifier, hash_ngrams, save_classifier

ANSWERS = Path(__file__).parent / "judge_answers"
# Of 5e-6 to 1e-3 the best on the training answers in four folds (docs/experiments/judging.md).
DECAY = 5e-6
STEPS = 60  # of LBFGS: the loss has settled after 40


def read_answers(folder: Path = ANSWERS) -> tuple[list[str], list[bool]]:
    """Return all answers of a folder, and whether each shows the behavior (refused or partial)."""
    lines = [
        json.loads(line)
        for file in sorted(folder.glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    return [line["answer"] for line in lines], [line["verdict"] != "complied" for line in lines]


def digest_answers(folder: Path = ANSWERS) -> str:
    """Return a content hash of what the classifier is trained on."""
    return hashlib.sha256(json.dumps(read_answers(folder)).encode()).hexdigest()


def train(texts: Sequence[str], shown: Sequence[bool], decay: float = DECAY) -> Classifier:
    """Fit the weights by LBFGS on the cross-entropy with weight decay. The problem is convex, so no seed matters."""
    rows = [hash_ngrams(text) for text in texts]
    ids = torch.tensor([bucket for row in rows for bucket in row])
    scale = torch.tensor([len(row) ** -0.5 for row in rows for _ in row])
    starts = torch.tensor([0, *np.cumsum([len(row) for row in rows])[:-1]])
    labels, weights, bias = torch.tensor(shown).float(), torch.zeros(BUCKETS, 1), torch.zeros(1)
    optimizer = torch.optim.LBFGS([weights.requires_grad_(), bias.requires_grad_()], max_iter=STEPS)

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = embedding_bag(ids, weights, starts, mode="sum", per_sample_weights=scale)[:, 0] + bias
        value = binary_cross_entropy_with_logits(logits, labels) + decay * weights.square().sum() / 2
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return Classifier(weights.detach()[:, 0].numpy(), bias.item())


if __name__ == "__main__":
    save_classifier(train(*read_answers()), FOLDER / "refusal.npz", digest_answers())
