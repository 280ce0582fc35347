"""How large an audit is."""

from __future__ import annotations

from pydantic import Field

from obliteratus.core.settings import FrozenModel

LEAST_PROMPTS = 16  # `verify.intervals` gives no interval of a mean for fewer


class AuditSettings(FrozenModel):
    """How much an audit measures. The defaults take about 15 minutes for a model of 135M parameters on two cores."""

    methods: tuple[str, ...] = Field(("basic", "leace", "least_change", "balanced"), min_length=1)
    """Recipes whose plans are measured at rising strengths."""
    tune_steps: int = Field(20, ge=0, le=1000)
    """Gradient steps that fit the cheapest method's plan further; 0 for none."""
    tune_prompts: int = Field(48, ge=8)
    """Fit prompts of each group for those steps."""
    fit: int = Field(128, ge=8)
    """Most fit prompts of each group."""
    prompts: int = Field(48, ge=LEAST_PROMPTS)
    """Most report prompts of each group: 1 of 48 is 2 %."""
    tokens: int = Field(24, ge=4, le=4096)
    """Of each answer. A refusal shows within 24."""
    looks: int = Field(6, ge=3, le=40)
    """Most strengths of each curve."""
    seeds: int = Field(2, ge=0, le=20)
    """Fits on random halves of the fit prompts."""
    directions: tuple[int, ...] = (1, 2, 4)
    """Numbers of directions in each layer that are compared; the first is what the others are compared with."""
    windows: int = Field(6, ge=1)
    """Parts of the depth that are edited alone."""
    controls: int = Field(2, ge=1, le=50)
    """Random directions, and as many shuffled labelings."""
    examples: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    """Numbers of example prompts of each group."""
    reworded: int = Field(24, ge=8)
    """Target prompts that are asked otherwise."""
    repair: int = Field(4, ge=0)
    """Search prompts of each group on which self-repair is measured, at least 2; 0 leaves it out."""
    seed: int = 0


DEFAULT = AuditSettings()  # pydantic gives the fields their defaults
QUICK = AuditSettings(
    methods=("basic", "least_change"),
    tune_steps=0,
    fit=32,
    prompts=24,
    tokens=16,
    looks=4,
    seeds=0,
    directions=(1, 2),
    windows=3,
    controls=1,
    examples=(2, 8),
    reworded=8,
    repair=0,
)
"""What ``--quick`` measures: two methods, few prompts, and no gradients."""
