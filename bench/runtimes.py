"""Forecast the seconds of a method on a model of any size, from rates measured on one machine and one small model.

Rates of other sizes are extrapolated from FLOPs (at the GEMM rate of their width, and the share of it that the small
model reaches) and from bytes (weights are read once in each decoding step).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from obliteratus.core.cost import Cost, Values
from obliteratus.core.settings import FrozenModel
from obliteratus.forecast.formula import OWN, REFERENCE, SHARED, TEXT
from obliteratus.inference.generate import MAX_ROWS

RATES = Path(__file__).parents[1] / "docs" / "rates.json"
BYTES = 4  # of one weight; the rates are measured in fp32


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that determine its time and memory.

    ``inner`` is the width of the MLP, ``keys`` that of the keys and of the values.
    """

    name: str
    like: str
    layers: int
    width: int
    inner: int
    keys: int
    vocabulary: int
    tied: bool

    @property
    def backbone(self) -> float:
        """Weights of all blocks: queries and attention output, keys and values, and three MLP matrices."""
        block = 2 * self.width**2 + 2 * self.width * self.keys + 3 * self.width * self.inner
        return float(self.layers * block)

    @property
    def head(self) -> float:
        """Weights of the LM head."""
        return float(self.vocabulary * self.width)

    @property
    def read(self) -> float:
        """Bytes read in each decoding step."""
        return BYTES * (self.backbone + self.head)

    @property
    def weights(self) -> float:
        """Bytes of all weights."""
        return self.read + (0 if self.tied else BYTES * self.head)


MEASURED = Shape("135M", "SmolLM2-135M", 30, 576, 1536, 192, 49152, True)
SHAPES = (
    MEASURED,
    Shape("1B", "Llama-3.2-1B", 16, 2048, 8192, 512, 128256, True),
    Shape("8B", "Llama-3.1-8B", 32, 4096, 14336, 1024, 128256, False),
    Shape("70B", "Llama-3.3-70B", 80, 8192, 28672, 1024, 128256, False),
)


class Rates(FrozenModel):
    """docs/rates.json. All rates but those of the machine, ``gemm`` and ``bandwidth``, are measured on `MEASURED`."""

    date: str
    machine: str
    beside: str
    """What else ran on the machine."""
    gemm: dict[int, float]
    """FLOP/s of a matrix product of 1024 tokens by width."""
    bandwidth: float
    """Bytes/s of a matrix–vector product."""
    token: float
    """Seconds of one token in PROBE's batches."""
    head: float
    """Seconds of the LM head on one token."""
    step: float
    """Seconds of a decoding step without rows: reading the weights, and Python."""
    row: float
    """Seconds of each row in a decoding step."""
    gradient: float
    """Seconds of one token forward and backward."""
    check: dict[str, dict[str, float]]
    """Seconds forecast and measured in the same session, by stage of `basic` on the organism."""


def load_rates(path: Path = RATES) -> Rates:
    """Return the committed rates."""
    return Rates(**json.loads(path.read_text(encoding="utf-8")))


def extrapolate(rates: Rates, shape: Shape) -> dict[str, float]:
    """Return the seconds of a token, head, step, row and gradient token at this size."""

    def flops(weights: float, seconds: float, measured: float) -> float:
        return seconds * (weights / rates.gemm[shape.width]) / (measured / rates.gemm[MEASURED.width])

    whole, known = shape.backbone + shape.head, MEASURED.backbone + MEASURED.head
    rest = max(0.0, rates.step - MEASURED.read / rates.bandwidth)  # Python, for each layer
    return {
        "token": flops(shape.backbone, rates.token, MEASURED.backbone),
        "head": flops(shape.head, rates.head, MEASURED.head),
        "step": rates.step
        if shape == MEASURED
        else shape.read / rates.bandwidth + rest * shape.layers / MEASURED.layers,
        "row": flops(whole, rates.row, known),
        "gradient": flops(shape.backbone, rates.gradient, MEASURED.backbone),
    }


def forecast_seconds(
    cost: Cost, speed: dict[str, float], values: Values = REFERENCE, own: float = OWN, text: float = TEXT
) -> float:
    """Return the most seconds that this takes, if no answer and no training ends early.

    own, text: tokens of a prompt beyond the shared prefix, and of a paragraph.
    """
    spent = own * speed["token"] * cost.forwards.evaluate(values)
    spent += text * (speed["token"] + speed["head"]) * cost.texts.evaluate(values)
    for answers in cost.answers:
        rows = answers.prompts.evaluate(values)
        written = answers.tokens * (ceil(rows / MAX_ROWS) * speed["step"] + rows * speed["row"])
        spent += answers.times * (rows * own * speed["token"] + written)
    return spent + sum(t.steps * t.prompts * (SHARED + own + t.tokens) * speed["gradient"] for t in cost.training)


def format_seconds(value: float) -> str:
    """Return seconds as text with two digits, as precise as a forecast is."""
    rounded = float(f"{value:.2g}")
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if value >= 2 * size:
            return f"{float(f'{value / size:.2g}'):g} {unit}"
    return f"{rounded:g} s"


def to_plain_data(rates: Rates) -> dict[str, Any]:
    """Return the rates as they are written to the file, with four digits."""
    data: dict[str, Any] = json.loads(rates.model_dump_json(), parse_float=lambda x: float(f"{float(x):.4g}"))
    return data
