"""The lines by which the nouns of `core.types` are shown. Any stands for these nouns, which import this module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def describe_subject(subject: Any) -> str:
    """Return a model's name and size."""
    source, sites = subject.source, len(subject.sites)
    kind = source.quantization or source.dtype
    return f"{source.id}, {subject.n_layers} blocks of width {subject.width} in {kind}, {sites} sites"


def describe_activations(acts: Any) -> str:
    """Return how many prompts of each group activations are of, and where they were read."""
    prompts = ", ".join(f"{moments.count} {name}" for name, moments in acts.groups.items())
    streams, width = next(iter(acts.groups.values())).mean.shape
    return f"{prompts} prompts at token {acts.position}, {streams} streams of width {width}"


def describe_directions(directions: Any) -> str:
    """Return how many directions there are, by which steps, and where they are clearest."""
    streams, k, width = directions.basis.shape
    best, steps = int(directions.score.argmax()), " → ".join(directions.trace) or "no step"
    where = f"clearest at stream {best}, score {float(directions.score[best]):.3f}"
    return f"{k} in each of {streams} streams of width {width}, by {steps}; {where}"


def describe_plan(changes: Sequence[Any], edit: type[Any]) -> str:
    """Return how many changes a plan has, in which blocks and parts, and how strong they are. edit: the type of
    those that have a strength."""
    if not changes:
        return "no changes"
    parts = ", ".join(dict.fromkeys(change.site.part for change in changes))
    layers = [change.site.layer for change in changes]
    strengths = [change.strength for change in changes if isinstance(change, edit)]
    strong = f", strengths {min(strengths):g} to {max(strengths):g}" if strengths else ""
    return f"{len(changes)} changes in blocks {min(layers)} to {max(layers)} ({parts}){strong}"
