"""The keys of a study file, as plain data that is validated as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from obliteratus.core.separation import SplitBy
from obliteratus.core.settings import FrozenModel, JudgeSettings, Step


class Data(FrozenModel):
    """What the model is measured on."""

    RENAMED: ClassVar[Mapping[str, str]] = {"labelled": "labeled"}

    texts: str = ""
    """Texts for perplexity: a text file of paragraphs between blank lines, or a source as of prompts (JSONL, CSV,
    Parquet, hub:). Empty takes the package's own."""
    samples: int = Field(16, ge=1)
    """The most texts, prompts of each group and labeled questions, evenly spread."""
    length: int = Field(128, ge=2)
    """The most tokens of a text."""
    target: str = ""
    """Prompts for the behavior and KL, as on the command line; only their report part is used."""
    control: str = ""
    column: str = ""
    """Column of texts and prompts in files and data sets; empty takes the first usual name."""
    labeled: str = ""
    """Questions for accuracy: JSONL of ``prompt``, ``choices`` (texts) and ``answer`` (index of the right one)."""


class Study(FrozenModel):
    """A study: which parts are knocked out, and which metrics measure the damage."""

    name: str = ""
    about: str = ""
    model: str = ""
    """The model, unless the command line names one."""
    seed: int = 0
    split_by: SplitBy = "wording"
    """What prompts of two different parts may not have in common: much ``wording``, or their ``category``."""
    dtype: str = "auto"
    data: Data = Data()
    strategies: tuple[Step, ...] = Field(min_length=1)
    """Strategies by name; all other keys are their options."""
    metrics: tuple[Step, ...] = Field((Step(use="perplexity"),), min_length=1)
    """``perplexity``, ``behavior``, ``first_token_kl``, ``accuracy``, each with its options."""
    judge: JudgeSettings = JudgeSettings()
    batch: int = Field(0, ge=0)
    """The most tokens per pass; 0 takes what suits the machine."""
    output: str = ""
    """The output folder, unless the command line names one."""
