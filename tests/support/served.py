"""Folders for commands that answer under plans."""

from __future__ import annotations

from pathlib import Path

from tests.support.plans import random_plan
from tests.support.tiny import save_tiny

from obliteratus.excise.plan import save_plan
from obliteratus.summon.load import open_subject


def save_model_and_plans(folder: Path) -> Path:
    """Write ``model``, a tiny one, and two plans for it, ``one`` and ``two``, into the folder, and return it."""
    subject = open_subject(save_tiny(folder / "model"))
    save_plan(random_plan(subject, strength=1.5), folder / "one")
    save_plan(random_plan(subject, seed=5), folder / "two")
    return folder
