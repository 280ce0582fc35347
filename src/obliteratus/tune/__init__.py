"""Directions that the model itself is asked for: steps of DISTILL that run it, with gradients or without."""

from obliteratus.distill import extractors
from obliteratus.tune import cosmic, least_refusing, rdo, reasoning, select
from obliteratus.tune.lab import Lab

__all__ = ["Lab", "cosmic", "extractors", "least_refusing", "rdo", "reasoning", "select"]
