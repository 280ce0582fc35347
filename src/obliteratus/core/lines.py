"""The lines by which the nouns of `core.types` are shown. Any stands for these nouns, which import this module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def count_prompts(prompts: Any) -> str:
    """Return how many prompts each group has."""
    return ", ".join(f"{len(members)} {name}" for name, members in prompts.groups.items()) + " prompts"


def describe_splits(splits: Any) -> str:
    """Return how many prompts each part has."""
    parts = {"fit": splits.fit, "search": splits.search, "report": splits.report}
    return "; ".join(f"{name} {count_prompts(part).removesuffix(' prompts')}" for name, part in parts.items())


def describe_moments(moments: Any) -> str:
    """Return of how many prompts a group's statistics are, and what is kept of them."""
    streams, width = moments.mean.shape
    kept = "every prompt" if moments.rows is not None else "a sketch" if moments.sketch is not None else "the mean"
    return f"{moments.count} prompts, {streams} streams of width {width}, {kept} kept"


def name_place(site: Any) -> str:
    """Return where a site is, such as ``mlp.out of block 3``."""
    expert = "" if site.expert is None else f" expert {site.expert}"
    columns = "" if site.span is None else f" inputs {site.span[0]} to {site.span[1] - 1}"
    return f"{site.part}{expert}{columns} of block {site.layer}"


def describe_edit(edit: Any) -> str:
    """Return where an edit is, how strong it is, and of how many directions."""
    kind = "" if edit.norm == "none" else f", norm {edit.norm}"
    anchor = ", anchored" if edit.anchor is not None else ""
    oblique = ", oblique" if edit.covectors is not None else ""
    return f"{name_place(edit.site)}, strength {edit.strength:g}, k {len(edit.basis)}{oblique}{anchor}{kind}"


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
    strong = f", {_name_range('strength', strengths)}" if strengths else ""
    return f"{len(changes)} change{'s' if len(changes) > 1 else ''} in {_name_range('block', layers)} ({parts}){strong}"


def _name_range(what: str, values: Sequence[Any]) -> str:
    """Return ``strength 1``, or ``strengths 0.5 to 1`` of values that differ."""
    low, high = min(values), max(values)
    return f"{what} {low:g}" if low == high else f"{what}s {low:g} to {high:g}"
