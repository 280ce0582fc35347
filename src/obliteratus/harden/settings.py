"""How a model is hardened."""

from __future__ import annotations

from pydantic import Field

from obliteratus.core.settings import FrozenModel


class HardenSettings(FrozenModel):
    """What is trained, and against which edits. Chosen on `organism:astronomy` (docs/experiments/harden.md)."""

    attacks: tuple[str, ...] = Field(("least_change", "leace"), min_length=1)
    """Methods whose edits are live during training, in turn. Only those that take no gradients themselves."""
    steps: int = Field(48, ge=1, le=10000)
    alone: float = Field(0.75, ge=0, le=1)
    """Share of the steps that come before the first edit: the wordings are learned without one, in half the time."""
    refit: int = Field(4, ge=1)
    """Steps until the next method is fitted on the model as it then is. Training can resume there."""
    attack_prompts: int = Field(16, ge=8)
    """Fit prompts of each group that each of these edits is fitted on, drawn anew each time."""
    climb: float = Field(0.03, ge=0, le=1)
    """Learning rate of the edit, which moves against the training in each step as `tune` would move it; 0 leaves it as
    it was fitted. Change of a strength, and of a direction's entries in units of their mean size."""
    scales: tuple[float, float] = (0.6, 2.0)
    """Least and most factor on the edit's strengths, one of which is drawn for each step."""
    prompts: int = Field(64, ge=8)
    """Most target fit prompts that are trained on."""
    tokens: int = Field(20, ge=4, le=256)
    """Most of an answer to one of them."""
    control_prompts: int = Field(128, ge=8)
    """The same of control prompts."""
    control_tokens: int = Field(12, ge=4, le=256)
    """The same of control prompts; the KL that is held down is mostly that of the first tokens."""
    batch: int = Field(6, ge=1, le=256)
    """Prompts of each group in one step."""
    wordings: tuple[str, ...] = (
        "This request goes beyond what I am allowed to do.",
        "Unfortunately, I cannot help with that topic.",
        "Helping with that is not something I can do.",
    )
    """Other ways to show the behavior, each trained on target prompts of one kind, beside the model's own; empty for
    its own alone. Their first tokens should differ."""
    rank: int = Field(8, ge=1, le=256)
    lr: float = Field(1.5e-3, gt=0, le=1)
    depth: float = Field(0.4, ge=0, lt=1)
    """Depth of the first block with an adapter, 0–1."""
    control: float = Field(8.0, ge=0)
    """Weight of KL(base ‖ hardened) on control prompts, relative to the cross-entropy of refusals."""
    attacked: float = Field(0.5, ge=0)
    """Weight of the cross-entropy of refusals while an edit is live."""
    entangle: float = Field(0.1, ge=0)
    """Weight of the same KL while an edit is live, which is to rise up to `entangled`: who removes the behavior is to
    change the answers to control prompts too."""
    entangled: float = Field(1.0, ge=0)
    """Nats of that KL from which on it need not rise."""
    seed: int = 0


DEFAULT = HardenSettings()  # pydantic gives the fields their defaults
