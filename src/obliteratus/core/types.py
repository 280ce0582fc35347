"""Define the nouns of the system: prompts, models, activations, directions and plans.

Of ours this module imports only smaller nouns and the shape annotations. The conventions for indices and shapes are:

* ``layer`` l counts decoder blocks from 0. A model has L = ``n_layers`` blocks.
* A *stream* index ℓ runs from 0 to L. Stream 0 is the residual stream that enters block 0 (the embeddings), stream ℓ
  is the residual stream that leaves block ℓ − 1, and stream L is the one after the last block, before the final norm.
  A writer in block l therefore writes into stream ℓ = l + 1.
* H (``width``) is the width of the residual stream, and k is the number of directions of a subspace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor, nn

from obliteratus.core import lines
from obliteratus.core.chat import DEFAULT_CHAT, ChatFormat, Turn
from obliteratus.core.errors import NothingMatchedError, UserError
from obliteratus.core.norms import NormRule
from obliteratus.core.probing import WriterContrast
from obliteratus.core.separation import Separation
from obliteratus.core.settings import expand_part
from obliteratus.core.shapes import Float, Int
from obliteratus.core.vectors import Vectors, stack_vectors
from obliteratus.core.views import Described, Plottable, Viewable

Role = Literal["writes", "reads"]
Layout = Literal["linear", "conv1d", "embedding", "stack", "stack_t"]
NormKind = Literal["rms", "rms+1", "layer"]


def digest_of(value: object) -> str:
    """Return a content hash of 16 hex digits for any value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------ prompts
@dataclass(frozen=True)
class Prompt:
    """One user turn, and what was said before it."""

    text: str
    category: str = ""
    """Free label. Rates are also reported by category."""
    split: str = ""
    """``fit``, ``search`` or ``report`` pins the prompt to that split. If empty, its wording and the seed decide."""
    system: str = ""
    """System turn. If empty, the chat template uses its own default."""
    history: tuple[Turn, ...] = ()
    """Turns of user and assistant before this one."""

    @property
    def context(self) -> tuple[str, ...]:
        """The system turn, and role and text of each turn before this one. Prompts with other contexts differ."""
        return self.system, *(part for turn in self.history for part in turn)


@dataclass(frozen=True, repr=False)
class PromptSet(Viewable):
    """Contrasting groups of prompts: always ``target`` and ``control``; ``bypass``, ``keep`` and ``benign`` at will."""

    groups: Mapping[str, tuple[Prompt, ...]]
    dropped: int = field(default=0, compare=False)
    """Duplicates that were left out of the groups."""
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Group → where its prompts come from; a data set on the hub with its revision."""

    def __post_init__(self) -> None:
        """Take texts for prompts. Raises UserError for groups that are neither."""
        for group, members in self.groups.items():
            if isinstance(members, str) or not all(isinstance(member, str | Prompt) for member in members):
                raise UserError(f"prompts: the group '{group}' is no list of texts or prompts: {str(members)[:60]}")
        plain = {g: tuple(Prompt(p) if isinstance(p, str) else p for p in ps) for g, ps in self.groups.items()}
        object.__setattr__(self, "groups", plain)

    def __getitem__(self, group: str) -> tuple[Prompt, ...]:
        return self.groups[group]

    @property
    def digest(self) -> str:
        """Content hash of the texts, categories, splits and earlier turns of all groups."""
        return digest_of({g: [[p.text, p.category, p.split, *p.context] for p in ps] for g, ps in self.groups.items()})

    describe = lines.count_prompts


@dataclass(frozen=True, repr=False)
class Splits(Described):
    """Disjoint parts of a prompt set, each with the same groups. Iterating gives fit, search and report."""

    fit: PromptSet
    """Directions are fitted on these prompts."""
    search: PromptSet
    """Searches, tuning and budgets choose on these prompts."""
    report: PromptSet
    """Reported scores are measured on these prompts and on no others."""
    digest: str
    """Digest of the whole prompt set."""
    separation: Separation | None = None
    """How far apart the parts are. None if the parts were not made by `split_prompts`."""

    def __iter__(self) -> Iterator[PromptSet]:
        return iter((self.fit, self.search, self.report))

    describe = lines.describe_splits


SPLITS = ("fit", "search", "report")


# -------------------------------------------------------------------------------------------- model
@dataclass(frozen=True)
class Site:
    """One editable matrix. The architecture table declares its role; nothing is guessed from a shape."""

    path: str
    """Module path inside the model, e.g. ``model.layers.3.mlp.down_proj``."""
    layer: int
    """Number of the decoder block. −1 stands for the embeddings and L for the unembedding."""
    part: str
    """A name from `settings.WRITERS` or `settings.READERS`.

    ``attn.out`` is the output matrix of the block's mixer (attention, convolution, delta net or state space),
    ``mlp.out`` that of the dense MLP, ``expert.out`` that of the routed experts, and ``shared.out`` that of the shared
    experts. See `settings.expand_part`."""
    role: Role
    """``writes``: edited at its output, which enters the residual stream. ``reads``: edited at its input."""
    layout: Layout
    """How the weight is stored: ``linear`` [out, in], ``conv1d`` [in, out], ``embedding`` [rows, width], or all experts
    in one tensor as ``stack`` [experts, out, in] or ``stack_t`` [experts, in, out]."""
    gain: str | None = None
    """Module path of the norm between this matrix and the residual stream, or None if there is none."""
    norm: NormKind = "rms"
    """Form of that norm: ``rms`` (gain w), ``rms+1`` (gain 1 + w, as in Gemma) or ``layer`` (gain w, centers)."""
    expert: int | None = None
    """Number of the only expert of a stack that is meant. None stands for all of them."""
    span: tuple[int, int] | None = None
    """Columns (start, stop) of W as [out, in] if only these inputs are edited, such as those of one attention head."""
    weight: str = "weight"
    """Name of the weight parameter inside the module."""
    bias: str = "bias"
    """Name of the bias parameter inside the module. The module need not have one."""

    @property
    def parameter(self) -> str:
        """Full parameter name in the model. It identifies a site, since one module may hold two matrices."""
        return f"{self.path}.{self.weight}"

    @property
    def stacked(self) -> bool:
        """Whether the parameter holds the matrices of all experts."""
        return self.layout in ("stack", "stack_t")

    @property
    def stream(self) -> int:
        """Index ℓ of the residual stream that this site writes into or reads from."""
        return self.layer + 1 if self.role == "writes" else max(self.layer, 0)


@dataclass(frozen=True)
class Source:
    """Where a model was loaded from."""

    id: str
    revision: str = ""
    quantization: str = ""
    dtype: str = ""
    digest: str = ""
    """Hash of the architecture and of a sample of every writer. A plan with another digest is refused."""
    base: str = ""
    """Full-precision checkpoint that was quantized on loading, or empty. The digest is that of this checkpoint."""


@dataclass(frozen=True)
class Coverage:
    """How many values of the backbone's matrices the architecture table accounts for. Vectors are not counted."""

    writers: int
    readers: int
    inner: int
    """Values of matrices that the table declares to stand between readers and writers, such as convolutions."""
    unclaimed: int
    paths: tuple[str, ...]
    """Matrices that the table does not know, each of which could be a missed writer."""

    @property
    def share(self) -> float:
        """Share (0–1) of writing values that are known if every unclaimed matrix is a missed writer."""
        return self.writers / max(self.writers + self.unclaimed, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and `share` as plain data for JSON."""
        return {**asdict(self), "paths": list(self.paths), "share": self.share}


@dataclass(frozen=True, repr=False)
class Subject(Viewable):
    """A loaded model, its tokenizer, and the sites that can be edited in it."""

    model: Any  # transformers.PreTrainedModel: its own annotations are too loose to help
    tokenizer: Any
    sites: tuple[Site, ...]
    n_layers: int
    width: int
    layers: str
    """Module path of the list of decoder blocks."""
    source: Source
    coverage: Coverage
    """What the architecture table knows of the model's matrices."""
    chat: ChatFormat = DEFAULT_CHAT
    """How prompts are rendered. It is recorded in the run."""
    offloaded: Any = None
    """The `weights.offload.OffloadedWeights` if the weights stay on disk, or None if they are in memory."""

    def module(self, path: str) -> nn.Module:
        """Return the submodule at a path."""
        module: nn.Module = self.model.get_submodule(path)
        return module

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings, where token ids have to be."""
        table = self.model.get_input_embeddings()
        device: torch.device = table._hf_hook.execution_device if table.weight.is_meta else table.weight.device
        return torch.device(device)

    describe = lines.describe_subject


# -------------------------------------------------------------------------------------- activations
@dataclass(frozen=True)
class Sketch:
    """Scatter of one group of prompts about its mean, approximated by a few rows for each stream."""

    rows: Float[Tensor, "streams rows width"]
    """R, fp32. RᵀR approximates the scatter matrix Σ(x − μ)(x − μ)ᵀ from below."""
    lost: Float[Tensor, " streams"]
    """Largest amount by which RᵀR can fall short of the scatter along any unit direction. 0 means exact."""
    total: Float[Tensor, " streams"]
    """Exact trace of the scatter matrix."""

    @property
    def error(self) -> Float[Tensor, " streams"]:
        """Upper bound (0–1) of the missing scatter as a share of the largest scatter along any direction."""
        most = torch.linalg.matrix_norm(self.rows, ord=2).square() + self.lost
        share: Tensor = self.lost / most.clamp(min=torch.finfo(most.dtype).tiny)
        return share


@dataclass(frozen=True, repr=False)
class Moments(Described):
    """Statistics of one group: the mean of its residual streams, and either all rows, a sketch of them, or neither."""

    count: int
    mean: Float[Tensor, "streams width"]
    """fp32, accumulated in fp64."""
    rows: Float[Tensor, "prompts streams width"] | None = None
    """Residual streams of every prompt, fp32. None if only running moments were kept."""
    categories: tuple[str, ...] = ()
    """Category of each prompt. Empty if they were not kept."""
    sketch: Sketch | None = None

    describe = lines.describe_moments


@dataclass(frozen=True)
class RoutingStatistics:
    """Routing statistics of one group of prompts in one stack of experts."""

    share: Float[Tensor, " experts"]
    """Share of a prompt's own tokens that are routed to the expert, averaged over prompts. Own tokens are those up to
    the probed position, without the prefix that all prompts share."""
    variance: Float[Tensor, " experts"]
    """Variance of that share over prompts."""
    prompts: int
    count: Int[Tensor, " experts"]
    """Number of prompts whose token at the probed position was routed to the expert."""
    mean: Float[Tensor, "experts width"]
    """Mean output of the expert for those prompts, before the routing weight; fp32, zeros if there are none."""
    square: Float[Tensor, " experts"]
    """Mean squared length of these outputs."""

    @property
    def noise(self) -> Float[Tensor, " experts"]:
        """Expected squared error of `mean`: variance of the outputs over n − 1. Infinite for fewer than 2 prompts."""
        n = self.count.to(self.mean)
        spread = (self.square - self.mean.square().sum(1)).clamp(min=0)
        return torch.where(n > 1, spread / (n - 1), torch.inf)


@dataclass(frozen=True, repr=False)
class Activations(Plottable):
    """Residual streams at one position of every prompt, by group, with any module statistics that were requested."""

    groups: Mapping[str, Moments]
    position: int
    """Token position, counted from the end of the templated prompt. −1 is the last token."""
    outputs: Mapping[str, Float[Tensor, " width"]] = field(default_factory=dict)
    """Site path → mean output of that writer over the control group. These are the anchors μ."""
    inputs: Mapping[str, Mapping[str, Float[Tensor, " in"]]] = field(default_factory=dict)
    """Group → site path → mean input of that writer, which says how active each of its neurons is."""
    digest: str = ""
    routed: Mapping[str, Mapping[str, RoutingStatistics]] = field(default_factory=dict)
    """Path of a stack of experts → group → routing statistics."""
    contrasts: Mapping[str, WriterContrast] = field(default_factory=dict)
    """Site path → contrast of that writer's outputs between the groups."""

    def __getitem__(self, group: str) -> Moments:
        if group not in self.groups:
            known = ", ".join(self.groups) or "none"
            raise UserError(f"activations: there is no group '{group}'; the groups are {known}")
        return self.groups[group]

    describe = lines.describe_activations


@dataclass(frozen=True, repr=False)
class Directions(Plottable):
    """Orthonormal rows for each stream index. A stream in which nothing was found has rows of zeros and score 0."""

    basis: Float[Tensor, "streams k width"]
    score: Float[Tensor, " streams"]
    """Share (0–1) of the groups' mean length that is difference along the basis. All methods use this unit."""
    raw: Float[Tensor, " streams"]
    """The extractor's own measure of strength."""
    unit: str
    """Unit of ``raw``."""
    trace: tuple[str, ...] = ()
    """Names of the steps that made the directions."""
    covectors: Float[Tensor, "streams k width"] | None = None
    """A, with A·basisᵀ = I, for an oblique projection x ← x − s·basisᵀ(A x) as in LEACE. None stands for A = basis, the
    orthogonal projection."""
    origin: tuple[int, float] | None = None
    """Of one direction that a step chose for all streams: the stream that it comes from, and the length there of the
    difference that was normalized. None if each stream has its own."""

    def __post_init__(self) -> None:
        if self.basis.ndim != 3:
            raise UserError(f"directions: the basis has shape {[*self.basis.shape]}; it must be [streams, k, width]")
        gram = self.basis.double() @ self.basis.double().mT
        eye = torch.diag_embed((gram.diagonal(dim1=-2, dim2=-1) > 0.5).double())
        if not torch.allclose(gram, eye, atol=1e-4):  # fp32 rows are orthonormal to about 1e-6
            raise ValueError("directions must be orthonormal rows, or rows of zeros where nothing was found")
        if self.covectors is not None and not torch.allclose(
            self.covectors.double() @ self.basis.double().mT, eye, atol=1e-3
        ):  # covectors grow with the spread of the groups, and so does their rounding
            raise ValueError("covectors must give 1 on their own direction and 0 on the others")

    @classmethod
    def from_vectors(cls, vectors: Vectors, subject: Subject | None = None) -> Directions:
        """Return vectors of one's own as directions, orthonormal at each stream, with their order and signs kept.

        vectors: a tensor or array [width] (the same at all streams), [streams, width] or [streams, k, width]; vectors
        by block, of what that block leaves; or a file of these: safetensors, whose names hold the block's number, or a
        control vector in GGUF, as repeng and llama.cpp have it. subject: the model, which is needed for a single vector
        and for vectors by block, and against which all others are checked.

        ``raw`` is the length that the first vector of each stream had, and ``score`` is 1 where there is one, since
        nothing was measured. Raises UserError for vectors that do not fit, hold NaN, are zero or depend on each other.

        >>> ob.Directions.from_vectors({3: torch.ones(32), -1: torch.eye(32)[:2]}, subject)
        <Directions: 2 in each of 9 streams of width 32, by from_vectors; clearest at stream 4, score 1.000>
        """
        basis, lengths = stack_vectors(vectors, None if subject is None else (subject.n_layers, subject.width))
        return cls(basis, lengths.gt(0).float(), lengths, LENGTH, ("from_vectors",))

    describe = lines.describe_directions


LENGTH = "‖v‖"
"""Unit of the raw score of directions that were given."""


# --------------------------------------------------------------------------------------------- plan
class Scalable(Described):
    """Base class of changes."""

    def scaled(self, factor: float) -> Any:
        """Return the change at so many times its strength. One without a strength stays as it is."""
        return self


@dataclass(frozen=True, repr=False)
class Edit(Scalable):
    """Edit along a subspace: y ← y − s·Bᵀ(A(y − μ)) at a writer's output, or x likewise at a reader's input.

    B has orthonormal rows, and A is B unless covectors are given. The gain of a norm between the site and the residual
    stream is already folded in.
    """

    site: Site
    basis: Float[Tensor, "k width"]
    """B."""
    strength: float
    """s: 1 removes, 0.7 removes partly, 2 reflects, 0 does nothing, and values below 0 amplify."""
    norm: NormRule = "none"
    """Norm rule, for writers only."""
    anchor: Float[Tensor, " width"] | None = None
    """μ, whose component along B is kept. None stands for the origin."""
    covectors: Float[Tensor, "k width"] | None = None
    """A, with A Bᵀ = I in an oblique projection. None stands for A = B, an orthogonal one."""

    def __post_init__(self) -> None:
        if self.basis.ndim != 2:
            raise UserError(f"{self.site.path}: the basis has shape {[*self.basis.shape]}; it must be [k, width]")

    @property
    def along(self) -> Float[Tensor, "k width"]:
        """A: the covectors if there are any, else the basis."""
        return self.basis if self.covectors is None else self.covectors

    def scaled(self, factor: float) -> Edit:
        """Return the edit with its strength multiplied."""
        return replace(self, strength=factor * self.strength)

    describe = lines.describe_edit


@dataclass(frozen=True, repr=False)
class Mask(Scalable):
    """Set some inputs of a writer to zero: neurons of an MLP or expert, or the columns of an attention head."""

    site: Site
    neurons: Int[Tensor, " n"]
    """Columns of W as [out, in]."""

    def describe(self) -> str:
        """Return where it is, and how many inputs it masks."""
        return f"{len(self.neurons)} inputs of {lines.name_place(self.site)}"


@dataclass(frozen=True, repr=False)
class Shift(Scalable):
    """Add a constant vector to a writer's output at every token (permanent steering): y ← y + v."""

    site: Site
    vector: Float[Tensor, " width"]

    def scaled(self, factor: float) -> Shift:
        """Return the shift with its vector multiplied."""
        return replace(self, vector=factor * self.vector)

    def describe(self) -> str:
        """Return where it is, and how long its vector is."""
        return f"{lines.name_place(self.site)}, length {float(self.vector.norm()):.3g}"


@dataclass(frozen=True, repr=False)
class Blend(Scalable):
    """Blend one expert with others before its edits: W ← (1 − share)·W + share · mean of the donors, bias likewise."""

    site: Site
    donors: Int[Tensor, " n"]
    """Numbers of experts of the same stack."""
    share: float
    weight: Float[Tensor, "out in"] | None = None
    """Mean weight of the donors. Executors read it from the model; a plan does not hold it."""
    bias: Float[Tensor, " out"] | None = None

    def scaled(self, factor: float) -> Blend:
        """Return the blend with its share multiplied."""
        return replace(self, share=factor * self.share)

    def describe(self) -> str:
        """Return where it is, and what is blended."""
        return f"{lines.name_place(self.site)}, {self.share:.0%} of {len(self.donors)} donors"


@dataclass(frozen=True, repr=False)
class ZeroOutput(Scalable):
    """Set a writer's output, bias included, to zero. For a stack this is every expert, or the one of the site."""

    site: Site
    outputs: Int[Tensor, " n"] | None = None
    """Output coordinates to set to zero. None stands for all."""

    def describe(self) -> str:
        """Return where it is, and how many outputs become zero."""
        return f"{'all' if self.outputs is None else len(self.outputs)} outputs of {lines.name_place(self.site)}"


Change = Edit | Mask | Shift | Blend | ZeroOutput


@dataclass(frozen=True, repr=False)
class Plan(Plottable):
    """All changes to make to a model. Executors accept nothing else, and apply the changes of one site in order."""

    edits: tuple[Change, ...] = ()
    model: str = ""
    """``Source.digest`` of the model that the plan was made for."""

    def __add__(self, other: Plan) -> Plan:
        """Return the plan that makes the changes of this one and then those of the other, on the same model."""
        if self.edits and other.edits and self.model != other.model:
            raise UserError(
                f"plans of two models cannot be added (digests {self.model} and {other.model}); make both on one model"
            )
        return Plan(self.edits + other.edits, other.model or self.model)

    def scaled(self, factor: float) -> Plan:
        """Return the plan at so many times its strength: 0.5 removes half of what 1 does, and −1 adds it instead.

        Strengths, shifts and shares of blends are multiplied. Masks and outputs set to zero have no strength and stay.
        Raises UserError for a factor that is not finite.

        >>> plan.scaled(0.5)
        <Plan: 12 changes in blocks 2 to 7 (attn.out, mlp.out), strength 0.5>
        """
        if not isfinite(factor):
            raise UserError(f"plan.scaled({factor}): give a finite number")
        return replace(self, edits=tuple(change.scaled(factor) for change in self.edits))

    def only(self, layers: int | Collection[int] | None = None, parts: str | Collection[str] | None = None) -> Plan:
        """Return the plan with the changes of these blocks and parts alone. None stands for all.

        layers: numbers of blocks, −1 for the embeddings. parts: such as ``attn.out``; ``mlp.out`` includes experts.
        Raises UserError for a part that the plan does not edit, and if nothing is left.

        >>> plan.only(layers=range(4), parts="mlp.out")
        <Plan: 2 changes in blocks 2 to 3 (mlp.out), strength 1>
        """
        wanted = [parts] if isinstance(parts, str) else parts
        edited = {change.site.part for change in self.edits}
        for part in wanted or ():
            if edited.isdisjoint(expand_part(part)):
                raise NothingMatchedError(f"plan.only: nothing of '{part}' is edited; the plan edits {_list(edited)}")
        kept = None if wanted is None else {name for part in wanted for name in expand_part(part)}
        blocks = {layers} if isinstance(layers, int) else layers
        left = [
            change
            for change in self.edits
            if (blocks is None or change.site.layer in blocks) and (kept is None or change.site.part in kept)
        ]
        if not left:
            known = {str(change.site.layer) for change in self.edits}
            raise NothingMatchedError(
                f"plan.only: nothing is left; the plan edits {_list(edited)} of blocks {_list(known)}"
            )
        return replace(self, edits=tuple(left))

    def by_site(self) -> dict[str, tuple[Change, ...]]:
        """Group the changes by `Site.parameter`, in their order."""
        names = dict.fromkeys(e.site.parameter for e in self.edits)
        return {name: tuple(e for e in self.edits if e.site.parameter == name) for name in names}

    def describe(self) -> str:
        """Return it in a few words."""
        return lines.describe_plan(self.edits, Edit)


def _list(names: Collection[str]) -> str:
    return ", ".join(sorted(names, key=lambda name: (len(name), name))) or "nothing"
