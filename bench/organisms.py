"""Which organisms constants may be chosen on, and opening any of them by name with its prompts.

A name is that of an organism (`astronomy`, `astronomy@0.65`), or a model and a behavior that comes with prompts of its
own (`base:disclaimer`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from bench.common import SMOKE_PROMPTS, open_organism, take_prompts
from obliteratus.core.settings import Recipe
from obliteratus.core.types import PromptSet, Subject
from obliteratus.judge.behavior import load_behavior
from obliteratus.prompts import load_prompts
from obliteratus.verify import Measurement
from obliteratus.weights.organism import CHOOSING

ASTRONOMY, TWO_TOPICS = "astronomy", "gardening-railways"
KEEPING = (TWO_TOPICS, "clocks-ships")  # organisms that refuse two topics
Role = Literal["choosing", "reported"]


@dataclass
class Organism:
    """A model organism with its prompts, and the baselines that its rows share, by groups of prompts."""

    subject: Subject
    prompts: PromptSet
    behavior: str = "refusal"
    known: dict[str, dict[str, Measurement]] = field(default_factory=dict)

    def share_baseline(self, prompts: PromptSet) -> dict[str, Measurement]:
        """Return the baseline of all rows with these groups of prompts, which the first one of them fills."""
        return self.known.setdefault(" ".join(prompts.groups), {})


def find_role(name: str) -> Role:
    """Return whether settings were chosen on the organism, of which a share of the adapter is a variant."""
    return "choosing" if name.partition("@")[0] in CHOOSING else "reported"


@cache
def load_organism(name: str, quick: bool, smoke: bool) -> Organism:
    """Return the organism, opened once. The topic that the one with two of them should keep is the group keep."""
    model, _, behavior = name.partition(":")
    if behavior:
        head = load_behavior(behavior).head
        prompts = load_prompts(head.target, head.control, keep=head.keep or None)
    else:
        source = f"organism:{model.partition('@')[0]}"
        prompts = load_prompts(source, source, keep=source if name in KEEPING else None)
    return Organism(open_organism(model), shorten(prompts, quick, smoke), behavior or "refusal")


def choose_prompts(prompts: PromptSet, recipe: Recipe) -> PromptSet:
    """Return the prompts without those to keep, unless the method is made for them.

    To end one refusal and keep another is a harder task than to end one, which other programs are not given.
    """
    keeps = "keep" in recipe.needs
    return PromptSet({name: members for name, members in prompts.groups.items() if keeps or name != "keep"})


def halve_report_prompts(prompts: PromptSet) -> PromptSet:
    """Return the prompts with only every second report prompt."""
    groups = {}
    for name, members in prompts.groups.items():
        report = [p for p in members if p.split == "report"]
        groups[name] = (*(p for p in members if p.split != "report"), *report[::2])
    return PromptSet(groups)


def shorten(prompts: PromptSet, quick: bool, smoke: bool) -> PromptSet:
    """Return the prompts of a --quick or --smoke run."""
    if smoke:
        return take_prompts(prompts, SMOKE_PROMPTS)
    return halve_report_prompts(prompts) if quick else prompts
