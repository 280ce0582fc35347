"""How far each control prompt's first token moved, and which tokens did: ``first_tokens.jsonl``, one line a prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from obliteratus.core.run_folder import write_atomic
from obliteratus.core.shapes import Float
from obliteratus.core.types import Prompt, Subject
from obliteratus.inference.logits import kl_divergence
from obliteratus.verify.answers import read_lines
from obliteratus.verify.scoring import Measurement

FILE = "first_tokens.jsonl"
LOGP = "first_token.control"
MOVED = 3  # tokens that are named for each prompt; more of them seldom move by a percent


def write_first_tokens(
    before: Measurement, after: Measurement, subject: Subject, prompts: Sequence[Prompt], folder: Path
) -> None:
    """Write `FILE` for the control prompts, unless their first tokens were not measured in both states."""
    if LOGP not in before.tensors or LOGP not in after.tensors:
        return
    found = describe_changes(before.tensors[LOGP], after.tensors[LOGP], subject.tokenizer)
    lines = [{"prompt": prompt.text, **change} for prompt, change in zip(prompts, found, strict=True)]
    write_atomic(folder / FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def describe_changes(
    before: Float[Tensor, "prompts vocabulary"],
    after: Float[Tensor, "prompts vocabulary"],
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """Return, for each prompt, ``kl`` (base ‖ edited, in nats) and the tokens whose probability ``moved`` most.

    before, after: log-probabilities. Each moved token is a list of its text and its probabilities before and after.
    """
    first, second = before.double().exp(), after.double().exp()
    moved = (second - first).abs().topk(MOVED, dim=-1).indices.tolist()
    divergence = kl_divergence(before, after).tolist()
    return [
        {"kl": kl, "moved": [[tokenizer.decode([t]), float(first[row, t]), float(second[row, t])] for t in tokens]}
        for row, (kl, tokens) in enumerate(zip(divergence, moved, strict=True))
    ]


def read_first_tokens(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of `FILE`, or none if there is no such file."""
    return read_lines(folder / FILE)
