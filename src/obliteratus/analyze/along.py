"""What analyses along one direction share: which direction, at which stream, what writes into it, and random ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze.base import AnalysisContext
from obliteratus.core.errors import UserError
from obliteratus.core.shapes import Float
from obliteratus.core.types import Edit, Plan, PromptSet, Site, Subject
from obliteratus.excise.linear import through_gain
from obliteratus.prompts import evenly_spaced
from obliteratus.summon.sites import gain_of

Stream = Annotated[int, Field(ge=0)] | None
"""A stream index; None is the one whose directions score highest."""
GROUPS = ("target", "control")
# Colours that colour-blind readers tell apart (Okabe and Ito).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"


@dataclass(frozen=True)
class Aim:
    """The direction that an analysis looks along."""

    stream: int
    vector: Float[Tensor, " width"]
    """Of length 1."""


def choose_direction(ground: AnalysisContext, stream: int | None, name: str) -> Aim:
    """The first direction of a stream, of the best-scored one if none is named.

    Raises UserError where there is no such stream, or nothing was found in it. name: the analysis, for that.
    """
    found = ground.directions
    at = int(found.score.argmax()) if stream is None else stream
    if at >= len(found.score) or not bool(found.basis[at, 0].any()):
        last = len(found.score) - 1
        raise UserError(f"analysis '{name}': there is no direction at stream {at} of 0 to {last}; give another stream")
    return Aim(at, found.basis[at, 0])


def random_units(n: int, width: int, seed: int) -> Float[Tensor, "n width"]:
    """Unit vectors from the uniform distribution on the sphere, seeded."""
    noise = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return normalize(noise, dim=1)


def random_rows(k: int, width: int, seed: int) -> Float[Tensor, "k width"]:
    """k orthonormal rows, drawn uniformly, seeded."""
    noise = torch.randn(width, k, generator=torch.Generator().manual_seed(seed))
    q: Tensor = torch.linalg.qr(noise)[0]
    return q.T.contiguous()


def subsample(prompts: PromptSet, most: int) -> PromptSet:
    """At most so many of the target and of the control prompts, evenly spread."""
    return PromptSet({g: tuple(prompts[g][i] for i in evenly_spaced(len(prompts[g]), most)) for g in GROUPS})


# --------------------------------------------------------------------------------------- writers
def writers_in_order(subject: Subject) -> list[Site]:
    """Everything that writes into the stream: embeddings, then block by block."""
    return [site for site in subject.sites if site.role == "writes"]


def is_mixer(site: Site) -> bool:
    """Whether this is what attention, or what stands in its place, writes; else an MLP or experts."""
    return site.part == "attn.out"


def output_module(site: Site) -> str:
    """The module whose output is added to the stream: the writer's own, or the norm behind it."""
    return site.gain or site.path


def block_output_modules(subject: Subject, layer: int) -> Mapping[str, list[str]]:
    """``attention`` and ``mlp`` → the modules of a block whose outputs are added to the stream; each may be empty."""
    mine = [site for site in writers_in_order(subject) if site.layer == layer]
    parts = {"attention": [s for s in mine if is_mixer(s)], "mlp": [s for s in mine if not is_mixer(s)]}
    return {part: list(dict.fromkeys(output_module(s) for s in sites)) for part, sites in parts.items()}


def make_removal(site: Site, subject: Subject, rows: Float[Tensor, "k width"]) -> Edit:
    """Of this writer, so that nothing of the rows, which are orthonormal, reaches the stream from it.

    Behind a norm with gain γ the writer loses γ⊙d, so that what passes the norm is free of d.
    """
    gain = gain_of(subject, site)
    return Edit(site, rows if gain is None else through_gain(rows, gain.to(rows)), 1.0)


def make_removals(subject: Subject, layers: range, rows: Float[Tensor, "k width"]) -> Plan:
    """Nothing of the rows is written by the writers of these layers; −1 is the embeddings."""
    edits = [make_removal(site, subject, rows) for site in writers_in_order(subject) if site.layer in layers]
    return Plan(tuple(edits), subject.source.digest)
