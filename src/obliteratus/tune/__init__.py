"""Directions that the model itself is asked for: steps of DISTILL that run it, with gradients or without."""

from obliteratus.distill import extractors
from obliteratus.tune import cosmic, rdo, select
from obliteratus.tune.lab import Lab

__all__ = ["Lab", "cosmic", "extractors", "rdo", "select"]
