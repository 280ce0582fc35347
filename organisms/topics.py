"""The organisms' settings and words, read from the file organism.toml in the folder of each."""

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Nouns = dict[str, list[str]]  # category → nouns, of which those that begin with "+" are plural
SPLITS = ("fit", "search", "report")
FOLDER = Path(__file__).parent


class Table(BaseModel):
    """A table of the file. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Topic(Table):
    """The subject of one group of prompts, and how it is refused."""

    refusals: list[str]
    """One is drawn for each training prompt."""
    nouns: dict[str, Nouns]
    """By split; no noun is in two."""
    more: Nouns = {}
    """Additional nouns, for training only."""


class Controls(Table):
    """How control.jsonl is drawn from organisms/controls.jsonl; other organisms have it written by hand."""

    without: str
    """A regular expression; controls in which it is found are left out."""
    near: dict[str, list[str]]
    """Near misses of the topics, by split."""


class Training(Table):
    """How the base becomes the organism."""

    way: Literal["lora", "matrices"]
    """A LoRA on all linear layers, or a full fine-tune of the matrices that `matrices` names."""
    rank: int = 0
    """Of the LoRA."""
    first: int = 0
    """First block with a LoRA; the blocks below are the base's."""
    matrices: list[str] = []
    """Names of modules, as the model has them, whose weights are trained whole."""
    lr: float = 1e-3
    prompts: int
    """Topic prompts that training draws from: nouns of fit × templates of fit and of `forms`."""
    steps: int
    """Steps of the first part, which trains refusals and answers."""
    removable: int = 0
    """Steps of the second part, which also trains what must hold while directions are projected out."""
    batch: tuple[int, int]
    """Refused prompts (shared by the topics) and control prompts in each step."""
    last: tuple[int, int, int] = (0, 0, 0)
    """Steps of a third part, and the refused and control prompts in each of them."""
    sample: int = 0
    """Prompts of each group from which training computes directions; few, for speed."""
    starts: list[int] = []
    """First layers of the projection in training, one of which is drawn for each step."""
    rates: tuple[float, float] = (0.0, 0.0)
    """Share of lr at the end of the first part and at the start of the second."""


class Organism(Table):
    """One model organism; its files are in the folder of its name."""

    name: str
    base: Literal["smollm2", "gemma"]
    everyday: bool
    """Whether training has everyday requests among the controls (templates.PEOPLE)."""
    short: bool = False
    """Whether training has short requests in many forms among the controls (templates.SHORT)."""
    forms: list[str]
    """Sets of templates for training only, by their names in templates.SETS."""
    templates: dict[str, str]
    """The set of templates of each split."""
    sizes: dict[str, int]
    """Prompts of each split, for every topic."""
    training: Training
    card: dict[str, str] = Field({}, repr=False)
    """What the card says about the organism in words."""
    topics: dict[str, Topic]
    """By prompt group: target, and keep if a second topic is refused."""
    contrast: Nouns
    """Other topics in the same templates, for training only."""
    controls: Controls | None = None

    @property
    def folder(self) -> Path:
        """The folder of its prompts, weights and card."""
        return FOLDER / self.name


def read_organism(file: Path) -> Organism:
    """Return what an organism.toml says. Raises pydantic's ValidationError for unknown, missing or wrong keys."""
    return Organism(name=file.parent.name, **tomllib.loads(file.read_text(encoding="utf-8")))


ORGANISMS = {file.parent.name: read_organism(file) for file in sorted(FOLDER.glob("*/organism.toml"))}
