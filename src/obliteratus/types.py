"""The nouns of the system. This module imports nothing of ours but the shape annotations.

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
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from obliteratus.shapes import Float, Int

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

    def module(self, path: str) -> nn.Module:
        module: nn.Module = self.model.get_submodule(path)
        return module

    @property
    def device(self) -> torch.device:
        """Where prompts enter the model."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device


# -------------------------------------------------------------------------------------- activations
@dataclass(frozen=True)
class Moments:
    """What is known of one group's stream: its mean, and the prompts themselves where they were kept."""

    count: int
    mean: Float[Tensor, "streams width"]
    """fp32, accumulated in fp64."""
    rows: Float[Tensor, "prompts streams width"] | None = None
    """Every prompt's stream, fp32; None where only running moments were kept."""


@dataclass(frozen=True)
class Routed:
    """What one group's prompts did in one stack of experts, at one position of each prompt."""

    count: Int[Tensor, " experts"]
    """Prompts for which the expert was among the chosen ones."""
    prompts: int
    """All of them."""
    mean: Float[Tensor, "experts width"]
    """What it put out for those, on average, before routing weighs it; fp32, zeros where there are none."""
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
    """Some inputs of a writer silenced: x_j ← 0, for neurons of the MLP."""

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


Change = Edit | Mask | Shift | Blend


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


# ------------------------------------------------------------------------------------------- recipe
class Frozen(BaseModel):
    """Plain data: unknown keys are refused, nothing changes after it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Step(BaseModel):
    """A registered step by name; all other keys are its options."""

    model_config = ConfigDict(frozen=True, extra="allow")
    use: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Probe(Frozen):
    """Which activations to take."""

    position: int = Field(-1, ge=-64, le=-1)  # 64 reaches past the suffix of every chat template known
    """Token, counted from the end of the templated prompt."""
    keep: Literal["rows", "moments"] = "rows"
    """``rows`` keeps every prompt (SVD needs them), ``moments`` only running means: O(layers × width) memory."""


WRITERS = frozenset({"embed", "attn.out", "mlp.out", "expert.out", "shared.out"})
READERS = frozenset({"attn.in", "mlp.in", "router", "unembed"})
EXPERTS = ("expert.out", "shared.out")


def asked(part: str) -> tuple[str, ...]:
    """The parts of sites that a recipe's part stands for: ``mlp.out`` is all that the feed-forward half writes, so a
    recipe edits the experts of a model that has some in place of a dense MLP, or beside one."""
    return (part, *EXPERTS) if part == "mlp.out" else (part,)


class Experts(Frozen):
    """Routed experts each by itself, from what PROBE saw of the prompts that were routed to it."""

    own: bool = False
    """Each expert loses the direction in which its own outputs differ between the groups; the fewer prompts it was
    given, the more of the layer's direction is in it."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of each layer's experts (at least one) that are edited in full: those to which target prompts are routed
    most, beyond control prompts."""
    rest: float = Field(0.0, ge=-4.0, le=4.0)
    """× the strength, of all others; 0 leaves them alone."""
    blend: float = Field(0.0, ge=0, le=1)
    """Share of the edited experts' weights that becomes the mean of the others'; needs a share below 1."""

    @model_validator(mode="after")
    def _asks_something(self) -> Experts:
        if not self.own and self.share == 1:
            raise ValueError("experts asks for nothing; set own=true or a share below 1, or leave experts out")
        if self.blend and self.share == 1:
            raise ValueError("experts.blend takes the mean of the experts that are not edited; set a share below 1")
        return self


class Excise(Frozen):
    """How the directions become edits."""

    parts: tuple[str, ...] = ("attn.out", "mlp.out")
    """Writers (attn.out, mlp.out, embed) and, if wanted, readers (attn.in, mlp.in, router, unembed). mlp.out takes
    experts in; expert.out and shared.out alone are the routed and the shared ones."""
    strength: float = Field(1.0, ge=-4.0, le=4.0)  # beyond 4 the stream is noise on every model tried
    norm: NormRule = "none"
    anchored: bool = False
    """Keep what the control group has along Q (y ← y − sQQᵀ(y − μ)); needs a bias to bake."""
    heads: float | None = Field(None, gt=0, le=1)
    """Edit only this share of each layer's attention heads (at least one), those that write most along Q, and leave
    attention's bias alone; None edits all of attention's output. Other parts are edited whole."""
    experts: Experts | None = None
    """None edits all routed experts alike, through their weighted sum. A model without experts has no use for it."""
    neurons: float | None = Field(None, gt=0, le=0.2)  # a fifth of an MLP is no longer a few neurons
    """Silence at most this share of each layer's MLP neurons: those that write most of the groups' difference,
    scored on the model before any removal. First pass only."""
    steer: float = Field(0.0, ge=-4.0, le=4.0)
    """Add −steer × the groups' difference along Q at the clearest layer that is edited, for every token; below 0 it
    adds the behaviour. In lengths of that difference. First pass only; needs a bias to bake."""
    kl_budget: float | None = Field(None, gt=0)
    """Weaken the whole plan until the first answer token's mean KL on search control prompts is at most this, nats."""

    @model_validator(mode="after")
    def _fit_together(self) -> Excise:
        if unknown := set(self.parts) - WRITERS - READERS:
            raise ValueError(f"'{min(unknown)}' names no part; known: {', '.join(sorted(WRITERS | READERS))}")
        reads = READERS & set(self.parts)
        writes = set(self.parts) - READERS
        if self.experts is not None and not {"mlp.out", "expert.out"} & set(self.parts):
            raise ValueError("experts needs the part expert.out or mlp.out, which parts leaves out; add it")
        if self.heads is not None and "attn.out" not in self.parts:
            raise ValueError("heads needs the part attn.out, which parts leaves out; add it, or leave heads out")
        if self.heads is not None and self.anchored:
            raise ValueError("heads and anchored exclude each other, an anchor being no head's; set only one")
        if (self.neurons is not None or self.steer) and "mlp.out" not in self.parts:
            raise ValueError("neurons and steer need the part mlp.out, which parts leaves out; add it")
        if self.strength > 1 and reads and writes:
            raise ValueError(
                "a strength above 1 on writers and readers is a change of basis that undoes itself; "
                "keep only the writers, or a strength of at most 1"
            )
        return self


class Range(Frozen):
    """What one value may be: from ``low`` to ``high``, whole numbers where both are; or one of ``choices``."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    """Even over the logarithm; needs ``low`` > 0."""
    choices: tuple[Any, ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        if self.choices and (self.low, self.high, self.log) != (None, None, False):
            raise ValueError("give low and high, or choices, not both")
        if not self.choices and (self.low is None or self.high is None or self.low >= self.high):
            raise ValueError(f"give choices, or low below high (got low {self.low}, high {self.high})")
        if self.log and self.low is not None and self.low <= 0:
            raise ValueError(f"log needs low above 0 (got {self.low})")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """All choices, or the two ends."""
        return self.choices or (self.low, self.high)


class Search(Frozen):
    """Which values of a recipe a search may change, how often it tries, and what it makes small."""

    trials: int = Field(ge=1)
    sampler: Literal["tpe", "gp", "nsga2"] = "tpe"
    minimise: tuple[str, ...] = Field(("refusal.target", "kl.first_token.mean"), min_length=1)
    """Score names. More than one: a Pareto front. A name behind a minus is made large: ``-refusal.keep``."""
    prompts: int = Field(48, ge=8)
    """Search prompts of each group that a trial sees; a search split may hold fewer."""
    tokens: int = Field(32, ge=4, le=4096)
    """Of each answer in a trial. Members of the front are checked with the answers of ``verify``."""
    margin: float = Field(0.1, ge=0, le=1)
    """How far below its first-token estimate a trial's refusal rate may turn out to lie: a trial gets answers only
    if, that much better than estimated, it would still enter the front."""
    worth: float = Field(0.5, ge=0, le=1)
    """Of the unedited model's refusals of target prompts, the share that a trial may leave and still be answered,
    where they are to be few. 1: the front reaches to the unedited model, for twice the answers."""
    control_margin: float = Field(0.05, ge=0, le=1)
    """A trial is feasible whose share of refused control prompts exceeds the unedited model's by at most this."""
    space: dict[str, Range] = Field(min_length=1)
    """By path into the recipe, as in ``--set``: ``weigh.0.peak``. A path that another's choice has removed (the
    choice of ``distill`` may drop a step) is left out of that trial."""

    @model_validator(mode="after")
    def _cheap(self) -> Search:
        for path in self.space:
            if path.split(".")[0] not in ("distill", "weigh", "excise"):
                raise ValueError(f"space '{path}': only distill, weigh and excise can differ between trials")
        return self


class Tune(Frozen):
    """The plan that EXCISE made, its strengths and directions fitted by gradients through the model.

    Small are made, in nats a token: KL(base ‖ edited) on control prompts' first token and own answers; ``coherence`` ×
    the same on target prompts' answers once they have begun; and ``weight`` × what the opening of non-refusing answers
    to target prompts lacks to lead what the model would say instead.
    """

    what: Literal["both", "strengths", "directions"] = "both"
    leads: tuple[float, ...] = Field((1.0,), min_length=1)
    """By how many nats each token of an answer's opening is to be likelier than what the untouched model would say in
    its place; from there on nothing pulls but KL. From gentle to thorough: each gives a plan, begun at the one before
    it, and the last is the method's."""
    weight: float = Field(4.0, ge=0)
    """× what openings lack of the lead."""
    coherence: float = Field(2.0, ge=0)
    """× KL(base ‖ edited) of target prompts' answers once they have begun: degenerate answers cost there."""
    sparsity: float = Field(0.0, ge=0)
    """× mean |strength|: sites that nothing needs drop out of the plan."""
    steps: int = Field(60, ge=1, le=1000)
    """Of each lead, at most."""
    patience: int = Field(20, ge=5)
    """Steps without gain on search prompts after which a lead ends."""
    lr: float = Field(0.01, gt=0, le=1)
    """A step's change of a strength, and of a direction's entries in units of their mean size."""
    batch: int = Field(12, ge=1, le=256)
    """Prompts of each group in a step."""
    prompts: int = Field(128, ge=8)
    """Fit prompts of each group that are answered for it, at most."""
    tokens: int = Field(18, ge=6, le=256)
    """Of each answer."""

    @model_validator(mode="after")
    def _ordered(self) -> Tune:
        if any(lead < 0 for lead in self.leads) or list(self.leads) != sorted(self.leads):
            raise ValueError(f"leads run from gentle to thorough, rising, none below 0 (got {list(self.leads)})")
        return self


class Recipe(Frozen):
    """A method. Plain data: a search result is again a recipe, without ``search``."""

    name: str = ""
    about: str
    cite: tuple[str, ...] = ()
    seed: int = 0
    passes: int = Field(1, ge=1, le=8)  # later passes find nothing; see EXPERIMENTS.md
    probe: Probe = Probe()
    distill: tuple[Step, ...] = Field(min_length=1)
    weigh: tuple[Step, ...] = (Step(use="all"),)
    excise: Excise = Excise()
    tune: Tune | None = None
    verify: tuple[Step, ...] = (Step(use="refusal"), Step(use="first_token_kl"), Step(use="perplexity"))
    analyze: tuple[Step, ...] = ()
    """Measurements of the model that change this recipe before it runs."""
    search: Search | None = None

    @property
    def searched(self) -> bool:
        """Whether search prompts choose something, so that none of their groups may be empty."""
        return bool(self.search or self.tune or self.excise.kl_budget or "router" in self.excise.parts)

    @model_validator(mode="after")
    def _one_pass(self) -> Recipe:
        if self.passes > 1 and self.excise.strength > 1:
            raise ValueError("a strength above 1 in a second pass turns the first one's reflection back; set passes=1")
        if self.passes > 1 and self.search is not None:
            raise ValueError("a search tries one pass at a time; set passes=1")
        if self.tune is not None and (self.passes > 1 or self.search is not None or self.excise.kl_budget is not None):
            raise ValueError("tune fits the plan of one pass by itself; leave out search and kl_budget, set passes=1")
        if self.tune is not None and (self.excise.norm != "none" or self.excise.heads is not None):
            raise ValueError("tune passes gradients through whole edits; set excise.norm none, leave excise.heads out")
        if self.tune is not None and (reads := READERS & set(self.excise.parts)):
            raise ValueError(f"tune fits what writers lose; take {', '.join(sorted(reads))} out of excise.parts")
        return self


# ---------------------------------------------------------------------------------------------- run
class Score(Frozen):
    """A measured number, never without its interval and sample size."""

    value: float
    low: float
    high: float
    """95 % interval."""
    n: int
    unit: str


class Run(Frozen):
    """What was done and what came of it: `run.json`. Report, card and `--json` read this and nothing else."""

    version: int = 1
    status: Literal["running", "done"] = "running"
    recipe: Recipe
    source: dict[str, str]
    prompts: dict[str, Any]
    """Digest and number of prompts by split and group, thinking mode, prompt files."""
    before: dict[str, Score] = {}
    after: dict[str, Score] = {}
    coverage: dict[str, Any] = {}
    passes: tuple[dict[str, Any], ...] = ()
    """What each pass found and did."""
    search: dict[str, Any] = {}
    """Of a search: the study, its trials, the front, and which member this is."""
    seconds: dict[str, float] = {}
    saved: dict[str, Any] = {}
    """Form, files and the outcome of the re-score."""
    versions: dict[str, str] = {}
