"""Ablation studies: knock a part out by a live edit, see what breaks, put it back."""

from obliteratus.study.base import Result, Spec, strategies

__all__ = ["Result", "Spec", "strategies"]
