"""The astronomy organism in 4 and 8 bits on the CPU: the verdicts of fp32, before and after an edit, and after saving."""

from __future__ import annotations

import pytest

from obliteratus.types import Step

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.organism
FIT, ASKED = 48, 12  # prompts of each group: the organism's direction is clear from few, an interval of 12 is wide
REFUSAL = (Step(use="refusal", tokens=12),)  # its refusals begin with their first words
