"""Analyses: what is true of this model. Each has a negative control and states what it costs.

Importing this package registers all of them. May import causal and everything below it, and report for its plots.
"""

# Each import registers what the module holds.
from obliteratus.analyze import certificate as certificate
from obliteratus.analyze import cones as cones
from obliteratus.analyze import decomposition as decomposition
from obliteratus.analyze import entanglement as entanglement
from obliteratus.analyze import fingerprint as fingerprint
from obliteratus.analyze import footprint as footprint
from obliteratus.analyze import geometry as geometry
from obliteratus.analyze import lens as lens
from obliteratus.analyze import patching as patching
from obliteratus.analyze import positions as positions
from obliteratus.analyze import reach as reach
from obliteratus.analyze import repair as repair
from obliteratus.analyze import sae as sae
from obliteratus.analyze import separability as separability
from obliteratus.analyze import tuned_lens as tuned_lens
from obliteratus.analyze import uncertainty as uncertainty
from obliteratus.analyze.base import AnalysisContext, Finding, analyses, analyze, try_analyses

__all__ = ["AnalysisContext", "Finding", "analyses", "analyze", "try_analyses"]
