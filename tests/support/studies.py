"""A study's results as data: made by a formula, so that tests know what must come out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from obliteratus.core.results import Score
from obliteratus.study.base import KnockoutResult

UNITS = {"perplexity": "perplexity", "kl.first_token": "nats"}


OLD_MODEL = {"name": "gpt2"}
OLD_STUDY: dict[str, Any] = {
    "model": OLD_MODEL,
    "dataset": {"name": "owner/texts", "max_samples": 50},
    "strategies": [{"name": "layer_removal"}],
    "metrics": ["perplexity"],
    "batch_size": 4,
    "max_length": 256,
    "output_dir": "results/mine",
}


def write_yaml(data: Any, folder: Path) -> Path:
    """Write a study of the earlier program."""
    path = folder / "old.yaml"
    path.write_text(data if isinstance(data, str) else json.dumps(data))  # JSON is YAML
    return path


def make_score(value: float, half: float = 0.05, unit: str = "ratio", n: int = 16) -> Score:
    return Score(value=value, low=value - half, high=value + half, n=n, unit=unit)


def make_baseline(refusal: bool = False) -> KnockoutResult:
    """The baseline."""
    scores = {"perplexity": make_score(40.0, 5.0, "perplexity")}
    if refusal:
        scores |= {"refusal.target": make_score(0.9, 0.05, "share"), "refusal.control": make_score(0.1, 0.05, "share")}
    return KnockoutResult(scores=scores, seconds=1.0)


def make_part(
    strategy: str, component: str, ratio: float, layer: int = 0, number: int = -1, control: bool = False
) -> KnockoutResult:
    """A part whose loss multiplies the perplexity."""
    half = 0.05 if math.isfinite(ratio) else 0.0
    scores = {"perplexity": make_score(40.0 * ratio, 5.0, "perplexity")}
    return KnockoutResult(
        strategy=strategy, component=component, layer=layer, part=number, size=1000, control=control, scores=scores,
        change={"perplexity": make_score(ratio, half)}, seconds=0.5,
    )  # fmt: skip


def make_results(layers: int = 6, heads: int = 4, infinite: bool = False) -> tuple[KnockoutResult, ...]:
    """Blocks, halves, heads, chunks and controls: the first block does the most, the first head of each is idle."""
    found = [make_baseline()]
    for i in range(layers):
        found.append(make_part("layers", f"block {i}", 1 + 30 / (1 + 3 * i), i))
        found.append(make_part("ffn", f"feed-forward of block {i}", 1 + 3 / (1 + i), i))
        found += [make_part("heads", f"block {i} head {h}", 1 + 0.06 * h, i, h) for h in range(heads)]
    found += [
        make_part("embeddings", f"embeddings {48 * c} to {48 * c + 47}", 1.2 + 0.1 * (c % 3), -1, c) for c in range(12)
    ]
    found += [make_part("random", f"random {i}, as large as a head", 1.01 + 0.02 * i, i, -1, True) for i in range(4)]
    if infinite:
        found[1] = make_part("layers", "block 0", math.inf)
    return tuple(found)


def make_measured(rows: Tensor, metric: str = "perplexity") -> tuple[KnockoutResult, ...]:
    """Parts whose items change by the columns: of losses, or of a share. rows [items, parts]."""
    ratio = metric == "perplexity"
    found = [make_baseline()]
    for i, column in enumerate(rows.T):
        value = float(column.mean().exp() if ratio else column.mean())
        change, differences = {metric: make_score(value)}, {metric: tuple(column.tolist())}
        plain = make_part("heads", f"part {i}", 1.0, i)
        found.append(plain.model_copy(update={"change": change, "differences": differences}))
    return tuple(found)


def make_refusal_results(layers: int = 6) -> tuple[KnockoutResult, ...]:
    """Blocks by refusals and KL: the third alone refuses."""
    found = [make_baseline(refusal=True)]
    for i in range(layers):
        lost = -0.85 if i == 2 else -0.02
        change = {
            "refusal.target": make_score(lost, 0.06, "share"),
            "kl.first_token": make_score(0.1 + 0.01 * i, 0.02, "nats"),
        }
        change |= {"refusal.control": make_score(0.05, 0.06, "share"), "perplexity": make_score(1.1)}
        plain = make_part("layers", f"block {i}", 1.1, i)
        found.append(plain.model_copy(update={"change": change}))
    return tuple(found)
