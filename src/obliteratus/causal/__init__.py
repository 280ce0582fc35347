"""Directions chosen by what they do to the model: steps of DISTILL that run it, with gradients or without.

Importing this package registers the steps. It may import core, weights, summon, inference, prompts, probe, distill,
weigh, excise and verify.
"""

from obliteratus.causal import cosmic, false_refusal, least_refusing, rdo, reasoning, select
from obliteratus.causal.interventions import FitContext
from obliteratus.distill import extractors

__all__ = ["FitContext", "cosmic", "extractors", "false_refusal", "least_refusing", "rdo", "reasoning", "select"]
