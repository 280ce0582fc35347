"""Directions that the model itself is asked for: steps of DISTILL that run it, with gradients or without."""

from obliteratus.causal import cosmic, least_refusing, rdo, reasoning, select
from obliteratus.causal.interventions import FitContext
from obliteratus.distill import extractors

__all__ = ["FitContext", "cosmic", "extractors", "least_refusing", "rdo", "reasoning", "select"]
