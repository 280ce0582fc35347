"""What a recipe can say: plain data, checked as a whole when it is made."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from obliteratus.core.types import NormRule


class FrozenModel(BaseModel):
    """Plain data: unknown keys are refused, nothing changes after it is made."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Step(BaseModel):
    """A registered step by name; all other keys are its options."""

    model_config = ConfigDict(frozen=True, extra="allow")
    use: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Probe(FrozenModel):
    """Which activations to take."""

    position: int = Field(-1, ge=-64, le=-1)  # 64 reaches past the suffix of every chat template known
    """Token, counted from the end of the templated prompt."""
    keep: Literal["rows", "sketch", "moments"] = "rows"
    """``rows`` keeps every prompt, ``moments`` running means alone, ``sketch`` these and how each group spreads."""
    sketch: int = Field(64, ge=64, le=4096)  # rows, exact for as many prompts a group; k of any step is less


WRITERS = frozenset({"embed", "attn.out", "mlp.out", "expert.out", "shared.out"})
READERS = frozenset({"attn.in", "mlp.in", "router", "unembed"})
EXPERTS = ("expert.out", "shared.out")


def expand_part(part: str) -> tuple[str, ...]:
    """The parts of sites that a recipe's part stands for: ``mlp.out`` is all that the feed-forward half writes."""
    return (part, *EXPERTS) if part == "mlp.out" else (part,)


class Experts(FrozenModel):
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


class Excise(FrozenModel):
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


class Range(FrozenModel):
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


class Search(FrozenModel):
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


class Tune(FrozenModel):
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


class Recipe(FrozenModel):
    """A method. Plain data: a search result is again a recipe, without ``search``."""

    name: str = ""
    about: str
    cite: tuple[str, ...] = ()
    seed: int = 0
    passes: int = Field(1, ge=1, le=8)  # later passes find nothing; see docs/experiments/recipes.md
    enough: float = Field(0.05, ge=0, le=1)
    """Share of refused search target prompts at which no further pass is made."""
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
        return bool(self.analyze or self.search or self.tune or self.excise.kl_budget or "router" in self.excise.parts)

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
