"""What is true of this model: every analysis measures something real, has a null control, and says what it costs."""

from obliteratus.analyze import certificate as certificate  # each import registers what it holds
from obliteratus.analyze import cones as cones
from obliteratus.analyze import fingerprint as fingerprint
from obliteratus.analyze import footprint as footprint
from obliteratus.analyze import geometry as geometry
from obliteratus.analyze import separability as separability
from obliteratus.analyze import uncertainty as uncertainty
from obliteratus.analyze.base import Finding, Ground, analyses, analyze

__all__ = ["Finding", "Ground", "analyses", "analyze"]
