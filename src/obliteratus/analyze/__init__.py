"""Analyses: what is true of a model and its directions, each with a null control and a cost known beforehand.

`analyze` runs registered analyses on an `AnalysisContext`; `analyze.run` goes from prompts to a page of findings.
May import report, excise, verify, causal and everything below them; never pipeline, search, study or cli.
"""

# Each import registers the analyses of that module.
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
