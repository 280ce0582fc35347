"""A full fine-tune of some matrices, in the form of what is added to them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F


class TunedLinear(nn.Module):
    """A linear layer whose weight is that of the base plus a trained difference of the same shape."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(torch.zeros_like(base.weight))
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, [..., out]; that of the base while the difference is not enabled."""
        return self.base(x) + F.linear(x, self.delta) if self.enabled else self.base(x)


class TunedMatrices(nn.Module):
    """A causal language model in which only the differences of some matrices are trained.

    It has the methods of a PeftModel that training uses. Without weight decay AdamW moves a difference as it would
    move the matrix.
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.tuned = {name: TunedLinear(model.get_submodule(name)) for name in names}
        for name, layer in self.tuned.items():
            model.set_submodule(name, layer)

    def get_base_model(self) -> Any:
        """Return the model, with the differences."""
        return self.model

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Make the model the base inside."""
        self._enable(False)
        try:
            yield
        finally:
            self._enable(True)

    def _enable(self, enabled: bool) -> None:
        for layer in self.tuned.values():
            layer.enabled = enabled

    def export(self, file: Path) -> None:
        """Save the differences in bf16, by the names of the weights that they are added to."""
        deltas = {f"{name}.weight": layer.delta.detach().to(torch.bfloat16) for name, layer in self.tuned.items()}
        save_file(deltas, file, metadata={"format": "pt"})
