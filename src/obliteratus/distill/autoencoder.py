"""Sparse autoencoders: the model itself, and reading one that SAELens saved.

The leading dimension of every tensor counts streams, which are independent of each other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.shapes import Float


@dataclass(frozen=True)
class SparseAutoencoder:
    """f = g((x − offset)·encoder + bias) and x̂ = f·decoder + offset, where g zeroes what is not above the threshold."""

    encoder: Float[Tensor, "streams width features"]
    bias: Float[Tensor, "streams features"]
    decoder: Float[Tensor, "streams features width"]
    """Rows of unit length if the autoencoder was trained here."""
    offset: Float[Tensor, "streams width"]
    threshold: Float[Tensor, " features"] | float = 0.0
    """0 makes g a ReLU; a tensor makes it a JumpReLU."""

    def encode(self, x: Float[Tensor, "streams rows width"]) -> Float[Tensor, "streams rows features"]:
        """Return how strongly each feature fires on each row, ≥ 0."""
        pre_activation = torch.baddbmm(self.bias[:, None], x - self.offset[:, None], self.encoder)
        return pre_activation * (pre_activation > self.threshold)

    def decode(self, features: Float[Tensor, "streams rows features"]) -> Float[Tensor, "streams rows width"]:
        """Return the reconstructed rows."""
        return torch.baddbmm(self.offset[:, None], features, self.decoder)

    @property
    def parameters(self) -> list[Tensor]:
        """The trained tensors, in the order of the constructor's arguments."""
        return [self.encoder, self.bias, self.decoder, self.offset]


# ------------------------------------------------------------------------------------------ SAELens files
REQUIRED_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
# `SparseAutoencoder.encode` computes these two: ReLU, and JumpReLU if the file has a threshold.
ARCHITECTURES = ("standard", "jumprelu")
# SAELens folds the average scaling into the weights when it saves; its other rules rescale each row differently.
NORMALIZATIONS = ("none", "expected_average_only_in")


def load_autoencoder(path: str, width: int) -> SparseAutoencoder:
    """Load a SAELens file as one fp32 autoencoder (streams = 1).

    Raises UserError if the file cannot be read, is no SAELens autoencoder, or was trained on a stream of another width.
    """
    file = Path(path).expanduser()
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"pretrained SAE '{path}' cannot be read ({error}); give a .safetensors file") from error
    config = _read_config(file.with_name("cfg.json"))
    _check_shapes(path, tensors, width)
    encoder, bias, decoder, offset = (tensors[name].float() for name in REQUIRED_TENSORS)
    if not config.get("apply_b_dec_to_input", True):  # SAELens subtracts b_dec by default
        bias = bias + offset @ encoder  # cancels the offset that our `encode` subtracts
    threshold = tensors["threshold"].float() if "threshold" in tensors else 0.0
    return SparseAutoencoder(encoder[None], bias[None], decoder[None], offset[None], threshold)


def _read_config(file: Path) -> dict[str, Any]:
    """Return cfg.json, or {} if it is missing. Raises UserError for a kind whose features would be misread."""
    if not file.exists():
        return {}
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for key, supported in (("architecture", ARCHITECTURES), ("normalize_activations", NORMALIZATIONS)):
        if config.get(key, supported[0]) not in supported:
            raise UserError(f"{file}: {key} '{config[key]}' is not supported; use one of {', '.join(supported)}")
    return config


def _check_shapes(path: str, tensors: dict[str, Tensor], width: int) -> None:
    missing = [name for name in REQUIRED_TENSORS if name not in tensors]
    if missing:
        raise UserError(
            f"pretrained SAE '{path}' has no {', '.join(missing)}; a SAELens file needs {', '.join(REQUIRED_TENSORS)}"
        )
    features, own_width = tensors["W_dec"].shape[0], tensors["W_dec"].shape[-1]
    if own_width != width:
        raise UserError(
            f"pretrained SAE '{path}' is {own_width} wide and this model's stream is {width}; "
            "use an SAE trained on this model"
        )
    shapes = {"W_enc": (width, features), "b_enc": (features,), "W_dec": (features, width), "b_dec": (width,)}
    shapes |= {"threshold": (features,)} if "threshold" in tensors else {}
    for name, shape in shapes.items():
        if tensors[name].shape != torch.Size(shape):
            raise UserError(f"pretrained SAE '{path}': {name} is {list(tensors[name].shape)}, not {list(shape)}")
