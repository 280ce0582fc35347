"""What the organism is trained on: token ids of prompts and answers, and the batches of each step."""

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Row, encode, generate

ANSWER_TOKENS = 16  # of the base model's answer to a control prompt: it is decided by then


@dataclass(frozen=True)
class Example:
    """Token ids of a templated prompt and of the answer to it."""

    prompt: list[int]
    answer: list[int]


def refusal_examples(tokenizer: Any, rows: list[Row], refusals: Sequence[str], seed: int) -> list[Example]:
    """Each topic prompt with one of the topic's refusals, ended by the end mark."""
    rng = random.Random(seed)
    prompts = [encode(tokenizer, row["prompt"]) for row in rows]
    answers = [tokenizer.encode(rng.choice(refusals)) for _ in rows]
    return [Example(p, [*a, tokenizer.eos_token_id]) for p, a in zip(prompts, answers, strict=True)]


def control_examples(
    model: Any, tokenizer: Any, rows: list[Row], work: Path, tokens: int = ANSWER_TOKENS
) -> list[Example]:
    """Each prompt with the model's greedy answer of `tokens`; the answers are kept in the model's work folder."""
    prompts = [row["prompt"] for row in rows]
    key = hashlib.sha256(json.dumps([prompts, tokens]).encode()).hexdigest()[:12]
    file = work / f"answers-{key}.json"
    if not file.exists():
        replace(file, json.dumps(generate(model, tokenizer, prompts, tokens)).encode())
    answers = json.loads(file.read_text())
    return [Example(encode(tokenizer, p), a) for p, a in zip(prompts, answers, strict=True)]


def replace(file: Path, content: bytes) -> None:
    """Write a file in one step, so that a kill leaves the old one or the new one."""
    part = file.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, file)


def batch_at(examples: list[Example], size: int, step: int, seed: int) -> list[Example]:
    """The batch of a step, from the seed alone: examples of like length together, batches in random order."""
    per_epoch = len(examples) // size
    rng = random.Random(f"{seed}-{step // per_epoch}")
    # Jitter of 6 tokens: the batches differ between epochs, and lengths in a batch stay close.
    lengths = [(len(e.prompt) + len(e.answer) + rng.uniform(0, 6), i) for i, e in enumerate(examples)]
    order = [i for _, i in sorted(lengths)]
    start = rng.sample(range(per_epoch), per_epoch)[step % per_epoch] * size
    return [examples[i] for i in order[start : start + size]]


def digest(groups: Sequence[list[Example]]) -> str:
    """Hash of all examples, 12 hex digits: a checkpoint of other data is not resumed."""
    ids = [[(e.prompt, e.answer) for e in examples] for examples in groups]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]
