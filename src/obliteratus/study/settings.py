"""What a study file can say: plain data, checked as a whole when it is made."""

from __future__ import annotations

from pydantic import Field

from obliteratus.core.settings import FrozenModel, Step


class Data(FrozenModel):
    """What the model is measured on."""

    texts: str = ""
    """For perplexity: a text file of paragraphs between blank lines, or JSONL, CSV, Parquet, hub: as prompts are read.
    Empty takes the package's own."""
    samples: int = Field(16, ge=1)
    """Texts, prompts of each group and labelled questions, at most, evenly spread."""
    length: int = Field(128, ge=2)
    """Tokens of a text, at most."""
    target: str = ""
    """Prompts, as on the command line, for refusal and KL; only their report part is used."""
    control: str = ""
    labelled: str = ""
    """JSONL of ``prompt``, ``choices`` (texts) and ``answer`` (the right one's index), for accuracy."""


class Study(FrozenModel):
    """A study: which parts are knocked out, and by which numbers the damage is told."""

    name: str = ""
    about: str = ""
    model: str = ""
    """Where the command line names none."""
    seed: int = 0
    dtype: str = "auto"
    data: Data = Data()
    strategies: tuple[Step, ...] = Field(min_length=1)
    """Each a strategy by name; all other keys are its options."""
    metrics: tuple[Step, ...] = Field((Step(use="perplexity"),), min_length=1)
    """``perplexity``, ``refusal``, ``first_token_kl``, ``accuracy``, each with its options."""
    batch: int = Field(0, ge=0)
    """Tokens a pass, at most; 0: as the machine likes it."""
    output: str = ""
    """A folder, where the command line names none."""
