"""A few weights and tokens of a model, kept in its plans, by which another file of the same model is recognized.

A digest tells whether two checkpoints are equal. A quantized file of a model is not: its weights are only near.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from obliteratus.core.types import Layout, Subject
from obliteratus.summon.digest import make_weight_sampler
from obliteratus.weights.bitsandbytes import is_packed

LAYOUTS: Mapping[str, Layout] = {layout: layout for layout in get_args(Layout)}
TOKENS = 64  # of the vocabulary: another tokenizer differs in most of them


@dataclass(frozen=True)
class ModelSamples:
    """What is known of the model that a plan was made for."""

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Values of each writer by its parameter, as `weights.matrices.sample_weight` takes them."""
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    """How transformers stores each of them, in which order samples were taken."""
    rows: int = 0
    """Rows of the embedding."""
    tokens: Mapping[int, str] = field(default_factory=dict)
    """Some tokens by their number."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON; weights as bfloat16 in base64."""
        weights = {name: [self.layouts[name], _encode(values)] for name, values in self.weights.items()}
        return {"weights": weights, "rows": self.rows, "tokens": {str(n): token for n, token in self.tokens.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelSamples:
        """Undo `to_dict`. Raises ValueError, TypeError, KeyError or AttributeError for anything else."""
        weights = {str(name): _decode(text) for name, (_, text) in data["weights"].items()}
        layouts = {str(name): LAYOUTS[layout] for name, (layout, _) in data["weights"].items()}
        return cls(weights, layouts, int(data["rows"]), {int(n): str(token) for n, token in data["tokens"].items()})


def _encode(values: Tensor) -> str:
    return base64.b64encode(values.bfloat16().view(torch.uint8).numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.bfloat16).float()


def sample_model(subject: Subject) -> ModelSamples:
    """Return the samples of a model. Those of a model that is packed, with no base, hold no weights."""
    source, writers = subject.source, [site for site in subject.sites if site.role == "writes"]
    packed = any(is_packed(subject.module(site.path)) for site in writers)
    weights: dict[str, Tensor] = {}
    layouts = {site.parameter: site.layout for site in writers}
    if not packed or source.base:
        sample = make_weight_sampler(subject.model, source.base, source.revision, subject.offloaded)
        weights = {site.parameter: torch.tensor(sample(site)) for site in writers}
    rows = subject.model.get_input_embeddings().weight.shape[0]
    known = range(min(rows, len(subject.tokenizer)))
    numbers = list(known[:: max(len(known) // TOKENS, 1)])
    tokens = dict(zip(numbers, subject.tokenizer.convert_ids_to_tokens(numbers), strict=True))
    return ModelSamples(
        weights, layouts, int(rows), {n: token for n, token in tokens.items() if isinstance(token, str)}
    )
