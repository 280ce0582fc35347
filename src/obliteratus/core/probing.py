"""What a pass over prompts reads besides the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from obliteratus.core.shapes import Float


@dataclass(frozen=True)
class ProbeRequest:
    """Modules, by path, that a pass over prompts reads besides the residual stream."""

    output_modules: Sequence[str] = ()
    """Modules whose outputs are wanted; PROBE keeps their mean over the control group (the anchors)."""
    input_modules: Sequence[str] = ()
    """Modules whose inputs are wanted; PROBE keeps their mean over each group."""
    expert_modules: Sequence[str] = ()
    """Stacks of experts whose routing is wanted, together with the output of each chosen expert."""
    contrast_modules: Sequence[str] = ()
    """Writers whose `WriterContrast` is wanted."""


@dataclass(frozen=True)
class WriterContrast:
    """How the groups differ in what one writer writes, and how to read that with the least effect elsewhere."""

    difference: Float[Tensor, "categories width"]
    """D: the mean output on each category of target prompts, less that on control prompts."""
    whitened: Float[Tensor, "categories width"]
    """D M⁻¹, with M the second moment of outputs at all positions of control prompts (`probe.contrasts`)."""
    share: Float[Tensor, " categories"]
    """Share of the target prompts that each category has."""
