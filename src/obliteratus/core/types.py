"""The nouns of the system: prompts, models, activations, directions, plans.

This module imports nothing of ours but the shape annotations and the sketch that stands for rows.

Indices and shapes, written down once:

* ``layer`` l counts decoder blocks from 0; there are L = ``n_layers`` of them.
* A *stream* index ℓ runs from 0 to L: ℓ = 0 is the stream that enters block 0 (the embeddings), ℓ is the
  stream that leaves block ℓ − 1, and ℓ = L is the raw stream after the last block, before the final norm.
  A writer in block l therefore writes into stream ℓ = l + 1.
* H (``width``) is the width of the residual stream; k the number of directions of a subspace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from obliteratus.core.shapes import Float, Int

Role = Literal["writes", "reads"]
Layout = Literal["linear", "conv1d", "embedding", "stack", "stack_t"]
NormRule = Literal["none", "columns", "rows", "whole"]
NormKind = Literal["rms", "rms+1", "layer"]


def digest_of(value: object) -> str:
    """A short content hash (16 hex digits) of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ prompts
@dataclass(frozen=True)
class Prompt:
    """One user turn."""

    text: str
    category: str = ""
    """Free label; rates are also reported by category."""
    split: str = ""
    """``fit``, ``search`` or ``report`` pins the prompt there; empty lets the seed decide."""
    system: str = ""
    """System turn; empty leaves the template's own default."""


@dataclass(frozen=True)
class PromptSet:
    """Contrasting prompts: always the groups ``target`` and ``control``; optional ``bypass`` and ``keep``."""

    groups: Mapping[str, tuple[Prompt, ...]]

    def __getitem__(self, group: str) -> tuple[Prompt, ...]:
        return self.groups[group]

    @property
    def digest(self) -> str:
        """Content hash over all groups, texts, categories and pins."""
        return digest_of({g: [[p.text, p.category, p.split, p.system] for p in ps] for g, ps in self.groups.items()})

    def split(self, seed: int = 0) -> tuple[PromptSet, PromptSet, PromptSet]:
        """Disjoint (fit, search, report). Which part a prompt falls into depends on its text and the seed
        alone, so adding prompts or changing their order moves no other prompt by more than one place."""
        parts = {name: {g: _part(ps, name, seed) for g, ps in self.groups.items()} for name in SPLITS}
        return PromptSet(parts["fit"]), PromptSet(parts["search"]), PromptSet(parts["report"])


SPLITS = ("fit", "search", "report")
# Directions converge within some hundred prompts, while an interval on a rate shrinks only with √n:
# hence a quarter for the report. Searching needs less than either.
FRACTIONS = {"fit": 0.60, "search": 0.15, "report": 0.25}


def _part(prompts: Sequence[Prompt], name: str, seed: int) -> tuple[Prompt, ...]:
    pinned = tuple(p for p in prompts if p.split == name)
    loose = sorted((p for p in prompts if not p.split), key=lambda p: digest_of([seed, p.system, p.text]))
    fit = round(len(loose) * FRACTIONS["fit"])
    search = fit + round(len(loose) * FRACTIONS["search"])
    bounds = {"fit": (0, fit), "search": (fit, search), "report": (search, len(loose))}
    return pinned + tuple(loose[slice(*bounds[name])])


# -------------------------------------------------------------------------------------------- model
@dataclass(frozen=True)
class Site:
    """One editable matrix. Its role is declared by the architecture table, never guessed from a shape."""

    path: str
    """Module path inside the model, e.g. ``model.layers.3.mlp.down_proj``."""
    layer: int
    """Decoder block; −1 for embeddings, L for the unembedding."""
    part: str
    """A name in `WRITERS` or `READERS`. ``attn.out`` is what a block's mixer writes, be it attention, a convolution, a
    delta net or a state space; ``mlp.out`` the dense MLP's, ``expert.out`` the routed and ``shared.out`` the shared
    experts'. See `asked`."""
    role: Role
    """``writes`` into the residual stream (edited at its output) or ``reads`` it (edited at its input)."""
    layout: Layout
    """How the weight is stored: ``linear`` [out, in], ``conv1d`` [in, out], ``embedding`` [rows, width]; all experts in
    one tensor: ``stack`` [experts, out, in], ``stack_t`` [experts, in, out]."""
    gain: str | None = None
    """Path of the norm that stands between this matrix and the stream, if one does."""
    norm: NormKind = "rms"
    """That norm's form: ``rms`` (gain w), ``rms+1`` (gain 1 + w, Gemma), ``layer`` (gain w, and centres)."""
    expert: int | None = None
    """Which expert of a stack alone is meant; None is all of them."""
    span: tuple[int, int] | None = None
    """Columns (start, stop) of W as [out, in], where only what these inputs write is edited: those of one head."""
    weight: str = "weight"
    """The matrix's own name inside the module."""
    bias: str = "bias"
    """Its bias's, if it has one."""

    @property
    def parameter(self) -> str:
        """Where the matrix is in the model: what tells sites apart, for one module may hold two."""
        return f"{self.path}.{self.weight}"

    @property
    def stacked(self) -> bool:
        return self.layout in ("stack", "stack_t")

    @property
    def stream(self) -> int:
        """Index ℓ of the stream that this site writes into, or reads from."""
        return self.layer + 1 if self.role == "writes" else max(self.layer, 0)


@dataclass(frozen=True)
class Source:
    """Where a model came from."""

    id: str
    revision: str = ""
    quantisation: str = ""
    dtype: str = ""
    digest: str = ""
    """Hash of architecture and a sample of every writer: a plan for another model is refused by it."""
    base: str = ""
    """The full-precision checkpoint that it was quantised from on loading; its digest is this one's."""


@dataclass(frozen=True)
class Subject:
    """A loaded model, its tokenizer, and the map of what can be edited in it."""

    model: Any  # transformers.PreTrainedModel: its own annotations are too loose to help
    tokenizer: Any
    sites: tuple[Site, ...]
    n_layers: int
    width: int
    layers: str
    """Module path of the list of decoder blocks."""
    source: Source
    thinking: bool = False
    """In which mode templates with a thinking switch are rendered; recorded in the run."""
    offloaded: Any = None
    """`summon.shelf.Shelf`: where the weights are, if they stay on disk; None where they are in memory."""

    def module(self, path: str) -> nn.Module:
        module: nn.Module = self.model.get_submodule(path)
        return module

    @property
    def device(self) -> torch.device:
        """Where prompts enter the model."""
        table = self.model.get_input_embeddings()
        device: torch.device = table._hf_hook.execution_device if table.weight.is_meta else table.weight.device
        return torch.device(device)


# -------------------------------------------------------------------------------------- activations
@dataclass(frozen=True)
class Sketch:
    """How one group's prompts spread about their mean, in few rows."""

    rows: Float[Tensor, "streams rows width"]
    """R, fp32: RᵀR stands for Σ(x − μ)(x − μ)ᵀ."""
    lost: Float[Tensor, " streams"]
    """That is never above, and along no direction further below than this; 0 where nothing had to be left out."""
    total: Float[Tensor, " streams"]
    """Its trace, exact."""

    @property
    def error(self) -> Float[Tensor, " streams"]:
        """`lost` over the spread along the direction of most: 0 to 1, at most."""
        most = torch.linalg.matrix_norm(self.rows, ord=2).square() + self.lost
        share: Tensor = self.lost / most.clamp(min=torch.finfo(most.dtype).tiny)
        return share


@dataclass(frozen=True)
class Moments:
    """What is known of one group's stream: its mean, and the prompts themselves where they were kept, or a sketch."""

    count: int
    mean: Float[Tensor, "streams width"]
    """fp32, accumulated in fp64."""
    rows: Float[Tensor, "prompts streams width"] | None = None
    """Every prompt's stream, fp32; None where only running moments were kept."""
    categories: tuple[str, ...] = ()
    """Each prompt's; empty where they were not kept."""
    sketch: Sketch | None = None


@dataclass(frozen=True)
class Routed:
    """What one group's prompts did in one stack of experts."""

    share: Float[Tensor, " experts"]
    """Share of a prompt's own tokens that have the expert among their chosen ones, the mean over prompts. Own tokens
    are those up to the position that is probed, without what all prompts of a probe begin with."""
    variance: Float[Tensor, " experts"]
    """The same share's variance over prompts."""
    prompts: int
    count: Int[Tensor, " experts"]
    """Prompts for which the expert was among the chosen ones at the position that is probed."""
    mean: Float[Tensor, "experts width"]
    """What it put out there for those, on average, before routing weighs it; fp32, zeros where there are none."""
    square: Float[Tensor, " experts"]
    """The mean squared length of that."""

    @property
    def noise(self) -> Float[Tensor, " experts"]:
        """The expected squared error of `mean`: its outputs' variance over their number; infinite for fewer than 2."""
        n = self.count.to(self.mean)
        spread = (self.square - self.mean.square().sum(1)).clamp(min=0)
        return torch.where(n > 1, spread / (n - 1), torch.inf)


@dataclass(frozen=True)
class Activations:
    """The stream at one position of every prompt, by group, plus the writers' mean outputs if wanted."""

    groups: Mapping[str, Moments]
    position: int
    """Token position, counted from the end of the templated prompt: −1 is the last."""
    outputs: Mapping[str, Float[Tensor, " width"]] = field(default_factory=dict)
    """Mean output of each writer (by site path) over the control group: the anchors μ."""
    inputs: Mapping[str, Mapping[str, Float[Tensor, " in"]]] = field(default_factory=dict)
    """Group → site path → mean input of that writer: how active each of its neurons is."""
    digest: str = ""
    routed: Mapping[str, Mapping[str, Routed]] = field(default_factory=dict)
    """Path of a stack of experts → group → what its prompts did there."""

    def __getitem__(self, group: str) -> Moments:
        return self.groups[group]


@dataclass(frozen=True)
class Directions:
    """Orthonormal rows per stream index. A stream in which nothing was found has rows of zeros, score 0."""

    basis: Float[Tensor, "streams k width"]
    score: Float[Tensor, " streams"]
    """How much of the two groups' stream is difference along the basis, 0–1; the same unit for all methods."""
    raw: Float[Tensor, " streams"]
    """The extractor's own strength."""
    unit: str
    """What ``raw`` is measured in."""
    trace: tuple[str, ...] = ()
    """The steps that made it."""
    covectors: Float[Tensor, "streams k width"] | None = None
    """What is measured of a stream along each row, where that is not the row itself: A with A·basisᵀ = I. The edit
    x ← x − s·basisᵀ(A x) is then an oblique projection (LEACE); None is the orthogonal one."""

    def __post_init__(self) -> None:
        gram = self.basis.double() @ self.basis.double().mT
        eye = torch.diag_embed((gram.diagonal(dim1=-2, dim2=-1) > 0.5).double())
        if not torch.allclose(gram, eye, atol=1e-4):  # fp32 rows are orthonormal to about 1e-6
            raise ValueError("directions must be orthonormal rows, or rows of zeros where nothing was found")
        if self.covectors is not None and not torch.allclose(
            self.covectors.double() @ self.basis.double().mT, eye, atol=1e-3
        ):  # covectors are long where groups spread much, and rounding grows with them
            raise ValueError("covectors must give 1 on their own direction and 0 on the others")


# --------------------------------------------------------------------------------------------- plan
@dataclass(frozen=True)
class Edit:
    """y ← y − s·Bᵀ(A(y − μ)) at a writer's output, x likewise at a reader's input. A is B unless given.

    Along a subspace B has orthonormal rows. Norm gains between the site and the stream are already folded in.
    """

    site: Site
    basis: Float[Tensor, "k width"]
    """B: what is taken off."""
    strength: float
    """1 removes, 0.7 removes partly, 2 reflects, 0 does nothing, below 0 amplifies."""
    norm: NormRule = "none"
    """For writers only: what a matrix reads has no length that its rules would keep."""
    anchor: Float[Tensor, " width"] | None = None
    """μ: what stays along B. None is the origin."""
    covectors: Float[Tensor, "k width"] | None = None
    """A: by what it is measured, with A Bᵀ = I. None is B: an orthogonal projection."""

    @property
    def along(self) -> Float[Tensor, "k width"]:
        """A."""
        return self.basis if self.covectors is None else self.covectors


@dataclass(frozen=True)
class Mask:
    """Some inputs of a writer silenced: x_j ← 0, for neurons of an MLP or of an expert, or whole heads of attention."""

    site: Site
    neurons: Int[Tensor, " n"]
    """Columns of W as [out, in]."""


@dataclass(frozen=True)
class Shift:
    """y ← y + v at a writer's output, for every token: permanent steering."""

    site: Site
    vector: Float[Tensor, " width"]


@dataclass(frozen=True)
class Blend:
    """W ← (1 − share)·W + share × the donors' mean, the bias likewise: for one expert of a stack, before its edits."""

    site: Site
    donors: Int[Tensor, " n"]
    """Experts of the same stack."""
    share: float
    weight: Float[Tensor, "out in"] | None = None
    """The donors' mean. Executors take it from the model; a plan holds none."""
    bias: Float[Tensor, " out"] | None = None


@dataclass(frozen=True)
class ZeroOutput:
    """y ← 0 at a writer's output, its bias too: the site does nothing any more. Of a stack, every expert or one."""

    site: Site
    outputs: Int[Tensor, " n"] | None = None
    """Only these coordinates; None is all."""


Change = Edit | Mask | Shift | Blend | ZeroOutput


@dataclass(frozen=True)
class Plan:
    """What to do to a model: the only thing that executors accept. Changes of one site apply in order."""

    edits: tuple[Change, ...] = ()
    model: str = ""
    """``Source.digest`` of the model that it was made for."""

    def __add__(self, other: Plan) -> Plan:
        if self.edits and other.edits and self.model != other.model:
            raise ValueError("plans for two different models cannot be joined")
        return Plan(self.edits + other.edits, other.model or self.model)

    def by_site(self) -> dict[str, tuple[Change, ...]]:
        """Changes grouped by `Site.parameter`, in their order."""
        names = dict.fromkeys(e.site.parameter for e in self.edits)
        return {name: tuple(e for e in self.edits if e.site.parameter == name) for name in names}
