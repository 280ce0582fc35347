"""Checks that weights hold neither NaN nor Inf, one tensor at a time and without copies."""

from __future__ import annotations

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from obliteratus.core.errors import UserError
from obliteratus.weights.devices import gather_tensor
from obliteratus.weights.matrices import stored_floats

CHUNK = 1 << 22  # values tested at once where the cheap test failed: 16 MB in fp32


def is_finite(tensor: Tensor) -> bool:
    """Return whether no value is NaN or Inf."""
    if not tensor.is_floating_point() or torch.isfinite(tensor.sum(dtype=torch.float32)):
        return True
    # Large finite values can overflow the sum, so each value is looked at only if it is not finite.
    return all(bool(torch.isfinite(chunk).all()) for chunk in tensor.flatten().split(CHUNK))


def check_finite(model: nn.Module, name: str) -> None:
    """Raise UserError that names the first tensor with a NaN or Inf. name: the model's, for the message."""
    for path, module in model.named_modules():
        with align_module_device(module):
            for key, tensor in stored_floats(module).items():
                if not is_finite(gather_tensor(tensor)):
                    raise UserError(f"{name}: {path}.{key} holds NaN or Inf; download it again, or use another dtype")
