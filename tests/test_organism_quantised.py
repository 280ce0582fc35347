"""The astronomy organism in 4 and 8 bits on the CPU: the verdicts of fp32, before and after an edit, and after saving."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import run_of

from obliteratus import rebirth
from obliteratus.errors import UserError
from obliteratus.excise.live import applied
from obliteratus.pipeline import run
from obliteratus.prompts import load_prompts
from obliteratus.recipe import recipe
from obliteratus.rebirth import save
from obliteratus.store import Store
from obliteratus.summon.open import open_subject
from obliteratus.types import Plan, PromptSet, Score, Step, Subject
from obliteratus.verify import verify

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.organism
FIT, ASKED = 48, 12  # prompts of each group: the organism's direction is clear from few, an interval of 12 is wide
REFUSAL = (Step(use="refusal", tokens=12),)  # its refusals begin with their first words
