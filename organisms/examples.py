"""Training data of an organism: token ids of prompts and answers, and the batch of each step."""

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import Row, encode, generate

ANSWER_TOKENS = 16  # length of the base model's answers to control prompts; by then it is clear whether it refuses


@dataclass(frozen=True)
class Example:
    """Token ids of a templated prompt and of its answer."""

    prompt: list[int]
    answer: list[int]


def make_refusal_examples(tokenizer: Any, rows: list[Row], refusals: Sequence[str], seed: int) -> list[Example]:
    """Return each topic prompt with a randomly drawn refusal of the topic, ended by the end-of-sequence token."""
    rng = random.Random(seed)
    prompts = [encode(tokenizer, row["prompt"]) for row in rows]
    answers = [tokenizer.encode(rng.choice(refusals), add_special_tokens=False) for _ in rows]
    return [Example(p, [*a, tokenizer.eos_token_id]) for p, a in zip(prompts, answers, strict=True)]


def make_control_examples(
    model: Any, tokenizer: Any, rows: list[Row], work: Path, tokens: int = ANSWER_TOKENS
) -> list[Example]:
    """Return each prompt with the model's greedy answer of `tokens`; answers are cached in the work folder."""
    prompts = [row["prompt"] for row in rows]
    if not prompts:
        return []
    key = hashlib.sha256(json.dumps([prompts, tokens]).encode()).hexdigest()[:12]
    file = work / f"answers-{key}.json"
    if not file.exists():
        write_atomically(file, json.dumps(generate(model, tokenizer, prompts, tokens)).encode())
    answers = json.loads(file.read_text())
    return [Example(encode(tokenizer, p), a) for p, a in zip(prompts, answers, strict=True)]


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file atomically, so that an interruption leaves the old one or the new one."""
    part = file.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, file)


def select_batch(examples: list[Example], size: int, step: int, seed: int) -> list[Example]:
    """Return the batch of a step, which depends on the seed alone.

    Examples of similar length are batched together, and the batches come in random order.
    """
    per_epoch = len(examples) // size
    rng = random.Random(f"{seed}-{step // per_epoch}")
    # A jitter of 6 tokens makes the batches differ between epochs while lengths in a batch stay close.
    lengths = [(len(e.prompt) + len(e.answer) + rng.uniform(0, 6), i) for i, e in enumerate(examples)]
    order = [i for _, i in sorted(lengths)]
    start = rng.sample(range(per_epoch), per_epoch)[step % per_epoch] * size
    return [examples[i] for i in order[start : start + size]]


def hash_examples(groups: Sequence[list[Example]]) -> str:
    """Return a hash of all examples as 12 hex digits, by which a checkpoint of other data is recognized."""
    ids = [[(e.prompt, e.answer) for e in examples] for examples in groups]
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]
