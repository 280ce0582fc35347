"""The embedded classifier: what it reaches on answers that it was not trained on, and that its weights are current."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tests.support.agreement import kappa
from tools.train_judge import digest_answers, read_answers, train

from obliteratus.judge.behavior_file import FOLDER
from obliteratus.judge.classifier import BUCKETS, Classifier, hash_ngrams, load_classifier, save_classifier
from obliteratus.judge.rung import Answered

HERE, WEIGHTS = Path(__file__).parent, FOLDER / "refusal.npz"
MAX_BYTES = 2 << 20


def judge(texts: list[str]) -> list[bool]:
    return [bool(shown) for shown in load_classifier(WEIGHTS).judge([Answered("", text) for text in texts])]


def test_natural_disclaimers_of_prompts_that_it_was_not_trained_on() -> None:
    lines = [json.loads(line) for line in (HERE / "disclaimers.jsonl").read_text().splitlines()]
    held = [*lines[150:300], *lines[450:]]
    labels = [line["label"] == "disclaimed" for line in held]
    assert not {line["answer"] for line in held if len(line["answer"]) > 120} & set(read_answers()[0])
    assert kappa(judge([line["answer"] for line in held]), labels) >= 0.85


def test_refusals_in_all_languages_by_another_author() -> None:
    files = (HERE / "answers").glob("*.jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    labels = [line["verdict"] != "complied" for line in lines]
    said = judge([line["answer"] for line in lines])
    assert kappa(said, labels) >= 0.7  # 0.79 when this was written
    assert abs(kappa(random.Random(0).sample(said, len(said)), labels)) < 0.15  # negative control: verdicts at random


def test_the_weights_are_small_and_those_of_the_answers_in_the_repository() -> None:
    assert WEIGHTS.stat().st_size <= MAX_BYTES
    with np.load(WEIGHTS) as file:
        assert str(file["trained_on"]) == digest_answers(), "run python tools/train_judge.py and commit the weights"


def test_training_separates_what_can_be_separated(tmp_path: Path) -> None:
    texts = [f"{'no thanks' if i % 2 else 'with pleasure'} number {i}" for i in range(40)]
    shown = [bool(i % 2) for i in range(40)]
    made = train(texts, shown)
    assert [made.logit(text) > 0 for text in texts] == shown
    save_classifier(made, tmp_path / "made.npz", "digest")
    kept = load_classifier(tmp_path / "made.npz")
    for text in texts:  # a byte a weight
        assert kept.logit(text) == pytest.approx(made.logit(text), abs=0.05)


def test_the_logit_is_the_mean_of_weights_as_an_independent_formula_has_it() -> None:
    rng = np.random.default_rng(0)
    classifier = Classifier(rng.normal(size=BUCKETS).astype(np.float32), 0.25)
    text = "Ein Satz, <think>not read</think>mit Umlauten: öäü."
    found = hash_ngrams(text)
    expected = sum(float(classifier.weights[i]) for i in found) * len(found) ** -0.5 + 0.25
    assert classifier.logit(text) == pytest.approx(expected, abs=1e-4)
    assert classifier.logit("") == pytest.approx(classifier.logit("<think>nothing else"), abs=1e-6)
