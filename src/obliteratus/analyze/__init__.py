"""What is true of this model: every analysis measures something real, has a null control, and says what it costs."""

from obliteratus.analyze import decomposition as decomposition
from obliteratus.analyze import entanglement as entanglement
from obliteratus.analyze import lens as lens
from obliteratus.analyze import patching as patching
from obliteratus.analyze import positions as positions
from obliteratus.analyze import repair as repair
from obliteratus.analyze import tuned_lens as tuned_lens
from obliteratus.analyze.base import Finding, Ground, analyses, analyze

__all__ = ["Finding", "Ground", "analyses", "analyze"]
