"""Define what a recipe can contain: plain data, validated as a whole when it is created."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from obliteratus.core.norms import NormRule
from obliteratus.core.separation import SplitBy


class FrozenModel(BaseModel):
    """Immutable plain data that refuses unknown keys, and names the new key for one that was renamed."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Old key → new key."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_renamed_keys(cls, data: Any) -> Any:
        for old, new in cls.RENAMED.items():
            if isinstance(data, Mapping) and old in data:
                raise ValueError(f"'{old}' is now called '{new}'")
        return data


class Step(BaseModel):
    """Name of a registered step. All keys but those declared here are options of the step."""

    model_config = ConfigDict(frozen=True, extra="allow")
    use: str
    when: Literal["always", "possible", "never"] = "always"
    """``possible`` leaves the step out, with a note, where the prompts lack a group that it needs; ``never`` always.
    Only distill and weigh steps can be left out. A search may try both."""

    @property
    def options(self) -> dict[str, Any]:
        """The options of the step."""
        return dict(self.model_extra or {})


def active_steps(steps: Sequence[Step | str]) -> tuple[Step, ...]:
    """Return the steps that are not left out. A name alone is a step without options."""
    named = (Step(use=step) if isinstance(step, str) else step for step in steps)
    return tuple(step for step in named if step.when != "never")


class Probe(FrozenModel):
    """Which activations PROBE collects."""

    position: int = Field(-1, ge=-64, le=-1)  # 64 reaches past the suffix of every chat template known
    """Token position, counted from the end of the templated prompt."""
    keep: Literal["rows", "sketch", "moments"] = "rows"
    """``rows`` keeps every prompt, ``moments`` only running means, ``sketch`` means and an approximate scatter."""
    sketch: int = Field(64, ge=64, le=4096)  # at least 64, which is more than the k of any step
    """Rows of a sketch. It is exact for groups of at most so many prompts."""


WRITERS = frozenset({"embed", "attn.out", "mlp.out", "expert.out", "shared.out"})
READERS = frozenset({"attn.in", "mlp.in", "router", "unembed"})
EXPERTS = ("expert.out", "shared.out")


def expand_part(part: str) -> tuple[str, ...]:
    """Return the parts of sites that a part in a recipe stands for: ``mlp.out`` includes all experts."""
    return (part, *EXPERTS) if part == "mlp.out" else (part,)


class Experts(FrozenModel):
    """How to edit routed experts one by one, from the activations of the prompts that were routed to each."""

    own: bool = False
    """Whether each expert loses the direction in which its own outputs differ between the groups. The fewer prompts
    were routed to an expert, the closer this direction is to that of the layer."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of each layer's experts (at least one) that are edited at full strength. The experts with the largest
    excess of target prompts over control prompts come first."""
    rest: float = Field(0.0, ge=-4.0, le=4.0)
    """Factor on the strength for all other experts. 0 leaves them alone."""
    blend: float = Field(0.0, ge=0, le=1)
    """Share of an edited expert's weights replaced by the mean of the unedited ones. Needs a share below 1."""

    @model_validator(mode="after")
    def _asks_something(self) -> Experts:
        if not self.own and self.share == 1:
            raise ValueError("experts changes nothing; set own=true or a share below 1, or leave experts out")
        if self.blend and self.share == 1:
            raise ValueError("experts.blend takes the mean of the experts that are not edited; set a share below 1")
        return self


class Excise(FrozenModel):
    """How the directions become edits of the weights."""

    parts: tuple[str, ...] = ("attn.out", "mlp.out")
    """Writers (attn.out, mlp.out, embed) and optionally readers (attn.in, mlp.in, router, unembed). mlp.out includes
    all experts; expert.out stands for the routed experts alone and shared.out for the shared ones."""
    strength: float = Field(1.0, ge=-4.0, le=4.0)  # beyond 4 the stream was noise on every model tried
    """1 removes, 0.7 removes partly, 2 reflects, 0 does nothing, and values below 0 amplify."""
    norm: NormRule = "none"
    """Lengths that the edit keeps: those of the weight's ``columns``, its ``rows``, the ``whole``, or ``none``.
    ``unit_rows`` keeps those of rows too, and projects the matrix with rows of length 1, as Heretic does;
    ``unit_rows_rank_3`` keeps the three largest singular values of that change, as Heretic does by default."""
    anchored: bool = False
    """Whether to keep the control group's mean μ along Q: y ← y − sQQᵀ(y − μ). Baking it needs a bias."""
    least_change: bool = False
    """Whether each writer loses the groups' difference through covectors that read least of what it writes at all
    positions of control prompts: y ← y − sBᵀA y, with A the smallest by its mean square there of those that remove as
    much of the groups' mean difference. Of readers nothing changes."""
    own_difference: bool = False
    """Whether each writer of least change gets a second edit, which removes its own mean difference between the groups
    instead of what the stream's direction shows of it. `Tune.balance` decides how strong each of the two is."""
    heads: float | None = Field(None, gt=0, le=1)
    """Share of each layer's attention heads (at least one) to edit, those that write most along Q. The bias of
    attention is then left alone. None edits all heads. Other parts are edited as a whole."""
    experts: Experts | None = None
    """How to edit routed experts one by one. None edits them alike, through their weighted sum."""
    neurons: float | None = Field(None, ge=0, le=0.2)  # more than a fifth of an MLP is no longer a few neurons
    """Largest share of each layer's MLP neurons to mask (at least one): those that write most of the groups'
    difference, scored on the unedited model. 0 masks none. Only the first pass masks neurons."""
    steer: float = Field(0.0, ge=-4.0, le=4.0)
    """Add −steer times the groups' difference along Q at every token, at the edited layer with the best score. Values
    below 0 add the behavior. Only the first pass steers, and baking it needs a bias."""
    where_possible: tuple[Literal["neurons", "steer"], ...] = ()
    """Which of these settings are left out, with a note, on a model that cannot have them, instead of refused.
    ``experts`` always is."""
    kl_budget: float | None = Field(None, gt=0)
    """Weaken the plan until the mean KL of first answer tokens on search control prompts is at most this (nats)."""

    @model_validator(mode="after")
    def _exclude_each_other(self) -> Excise:
        if self.heads is not None and self.anchored:
            raise ValueError("heads and anchored exclude each other, since an anchor belongs to no head; set only one")
        if self.heads is not None and self.least_change:
            raise ValueError("heads and least_change exclude each other: covectors are of whole layers; set only one")
        if self.anchored and self.least_change:
            raise ValueError(
                "anchored and least_change exclude each other: with least_change hardly anything is read on control "
                "prompts, so there is no mean to keep; set only one"
            )
        if self.own_difference and not self.least_change:
            raise ValueError(
                "own_difference is a second edit of least change; set least_change too, or own_difference to false"
            )
        return self

    @model_validator(mode="after")
    def _fit_together(self) -> Excise:
        if unknown := set(self.parts) - WRITERS - READERS:
            raise ValueError(f"'{min(unknown)}' names no part; the parts are {', '.join(sorted(WRITERS | READERS))}")
        reads = READERS & set(self.parts)
        writes = set(self.parts) - READERS
        if self.experts is not None and not {"mlp.out", "expert.out"} & set(self.parts):
            raise ValueError("experts needs the part expert.out or mlp.out, which parts leaves out; add it")
        if self.heads is not None and "attn.out" not in self.parts:
            raise ValueError("heads needs the part attn.out, which parts leaves out; add it, or leave heads out")
        if self.norm == "unit_rows_rank_3" and "embed" in self.parts:
            raise ValueError("norm unit_rows_rank_3 is for attn.out and mlp.out; take embed out of parts")
        if (self.neurons or self.steer) and "mlp.out" not in self.parts:
            raise ValueError("neurons and steer need the part mlp.out, which parts leaves out; add it")
        if self.strength > 1 and reads and writes:
            raise ValueError(
                "a strength above 1 on writers and readers is a change of basis that undoes itself; "
                "keep only the writers, or a strength of at most 1"
            )
        return self


class Range(FrozenModel):
    """Values to try: from ``low`` to ``high`` (whole numbers if both are), or one of ``choices``."""

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    """Whether to sample evenly on a logarithmic scale. Needs ``low`` > 0."""
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
        """All choices, or both ends of the range."""
        return self.choices or (self.low, self.high)


KL_TARGETED = "kl.first_token.mean"  # the score that ``search.kl_target`` is about


class Search(FrozenModel):
    """Which values of a recipe a search changes, how many trials it makes, and what it minimizes."""

    RENAMED = {"minimise": "minimize", "worth": "max_remaining", "max_remaining_refusal": "max_remaining"}

    trials: int = Field(ge=1)
    sampler: Literal["tpe", "gp", "nsga2"] = "tpe"
    startup_trials: int = Field(10, ge=1, le=10_000)
    """Trials drawn at random before the sampler learns from them, of ``tpe`` and ``gp``. 10 is Optuna's default."""
    candidates: int = Field(24, ge=1, le=10_000)
    """Values that ``tpe`` draws for each trial, to take the most promising one (n_ei_candidates); Optuna's default."""
    kl_target: float = Field(0.0, ge=0)
    """Below this first-token KL in nats, a trial has nothing left to gain from a lower one: the sampler is told
    ``kl_target`` × the share of the behavior that remains on target prompts instead. So trials that do nothing are not
    what it looks for. 0 tells it the KL itself. The front is by KL in either case."""
    minimize: tuple[str, ...] = Field(("behavior.target", "kl.first_token.mean"), min_length=1)
    """Names of scores, in which ``behavior`` stands for the behavior's name. Several give a Pareto front. A name with a
    minus is maximized: ``-behavior.keep``."""
    prompts: int = Field(48, ge=8)
    """Most search prompts of each group that a trial measures."""
    tokens: int = Field(32, ge=4, le=4096)
    """Tokens of each answer in a trial. Members of the front are checked again with the answers of ``verify``."""
    margin: float = Field(0.1, ge=0, le=1)
    """How far a trial's rate of the behavior may lie below its first-token estimate, at least. The first five trials
    are all answered, and the largest distance seen in any answered trial counts if it is larger. Answers are generated
    only for trials that would still enter the front if they were this much better than estimated."""
    max_remaining: float = Field(0.5, ge=0, le=1)
    """Largest share of the unedited model's rate on target prompts that a trial may leave and still have answers
    generated. With 1 the front reaches to the unedited model, at twice the number of answers."""
    control_margin: float = Field(0.05, ge=0, le=1)
    """A trial is feasible if its rate on control prompts is at most this much above the unedited model's."""
    degenerate_margin: float = Field(0.05, ge=0, le=1)  # two of 48 prompts: fewer more are within chance
    """And if at most this much more of its answers are degenerate than of the unedited model's, to the same prompts or
    to control prompts, whichever are more, since a model that refuses does not loop. This holds for each group that is
    answered: target and keep prompts in a trial, control prompts too in the check of the front."""
    keep_margin: float = Field(1.0, ge=0, le=1)
    """And if its rate on keep prompts is at most this much below the unedited model's. 1 is no limit."""
    benign_margin: float = Field(1.0, ge=0, le=1)
    """And if its rate on benign prompts is at most this much above the unedited model's. 1 is no limit."""
    # Working edits of organisms have up to 2.1 times, one that fell apart 2.8 and 3.3 (docs/experiments/informed.md).
    fluency_limit: float = Field(2.5, ge=1)
    """A member of the front is feasible if the scorer ``fluency``, where it runs, finds the perplexity of its answers
    to target and to control prompts to be at most so many times that of the unedited model's control answers."""
    space: dict[str, Range] = Field(min_length=1)
    """Path into the recipe (as in ``--set``, such as ``weigh.0.peak``) → values to try. A trial leaves out a path
    that the choice of another path has removed, as a choice of ``distill`` may drop a step."""

    @model_validator(mode="after")
    def _takes_part(self) -> Search:
        """Refuse settings that the sampler or the objectives would ignore."""
        if self.sampler == "nsga2" and self.startup_trials != type(self).model_fields["startup_trials"].default:
            raise ValueError("startup_trials is for the samplers tpe and gp; leave it out, or take one of them")
        if self.sampler != "tpe" and self.candidates != type(self).model_fields["candidates"].default:
            raise ValueError("candidates is for the sampler tpe; leave it out, or set sampler to tpe")
        if self.kl_target and KL_TARGETED not in self.minimize:
            raise ValueError(f"kl_target is about {KL_TARGETED}; add that to minimize, or leave kl_target out")
        return self

    @model_validator(mode="after")
    def _cheap(self) -> Search:
        for path in self.space:
            if path.split(".")[0] not in ("distill", "weigh", "excise"):
                raise ValueError(f"space '{path}': only paths in distill, weigh and excise can be searched")
        return self


class Tune(FrozenModel):
    """Fit the strengths and directions of the plan from EXCISE by gradient descent through the model.

    The loss is the sum of KL(base ‖ edited) on first tokens and own answers of control prompts, ``coherence`` × the
    same KL on target prompts' answers after their opening, both in nats a token, and ``weight`` × a hinge loss in nats
    a prompt. The hinge loss adds up, over the tokens of the opening of an answer without the behavior that the unedited
    model would not write, by how much each falls short of being ``margin`` nats likelier than what that model would
    write. The weight follows the judge: it rises while answers to search prompts show the behavior on more than the
    recipe's ``stop_below``, and falls when they do not.
    """

    RENAMED = {"leads": "margin", "margins": "margin"}

    what: Literal["both", "strengths", "directions"] = "both"
    balance: bool = False
    """Whether to begin with the strengths that lower the behavior most for their KL, by one second-order step
    (`tune.balance`), instead of those of EXCISE."""
    margin: float = Field(1.0, ge=0)
    """Hinge margin in nats: how much likelier each token of an answer's opening should be than the token that the
    unedited model would write."""
    weight: float = Field(4.0, ge=0)
    """Factor on the hinge loss of openings in the first steps."""
    coherence: float = Field(2.0, ge=0)
    """Factor on KL(base ‖ edited) of target prompts' answers after their opening, where degenerate answers show."""
    sparsity: float = Field(0.0, ge=0)
    """Factor on the mean |strength| over the edits. It drops sites from the plan that contribute nothing."""
    steps: int = Field(60, ge=0, le=1000)
    """Most gradient steps. With 0 of them and ``balance`` only the strengths are set."""
    patience: int = Field(20, ge=10)
    """Stop after so many steps without a better plan, by the judge, the KL and the coherence of answers."""
    lr: float = Field(0.01, gt=0, le=1)
    """Learning rate: change of a strength in one step, and of a direction's entries in units of their mean size."""
    batch: int = Field(12, ge=1, le=256)
    """Prompts of each group in one step."""
    prompts: int = Field(128, ge=8)
    """Most fit prompts of each group for which answers are generated."""
    tokens: int = Field(18, ge=6, le=256)
    """Tokens of each answer."""
    watch: int = Field(48, ge=0, le=1024)
    """Tokens within which answers to target prompts are watched for the behavior's return. Where it comes back, the
    answer is fitted up to there. 48 are what VERIFY reads; 0 watches no further than ``tokens``."""


class JudgeSettings(FrozenModel):
    """What is looked for in answers, and who looks."""

    behavior: str | dict[str, Any] = "refusal"
    """Name of a behavior, a TOML file, or its table with ``name``. A file is read once, and its table kept."""
    phrases: str | dict[str, Any] = ""
    """TOML file of further phrases by language, or its table."""
    own_words: bool = True
    """Whether openings that many target answers of the unedited model share, unlike control answers, count too."""
    rungs: tuple[str, ...] = ("classifier",)
    """Who judges beside the phrases: ``classifier`` (where the behavior has one), ``self`` (the unedited model, asked
    yes or no), or the folder or hub id of a sequence classifier or of another chat model."""
    decides: str = "phrases"
    """The rung whose verdict counts: ``phrases``, one of ``rungs``, or ``endpoint``."""
    label: str = ""
    """The label of a sequence classifier that stands for the behavior. Empty: the one called like it, or the second
    of two."""
    url: str = ""
    """OpenAI-compatible endpoint that is asked about every answer, as the rung ``endpoint``. Answers leave the
    machine. The key is read from OBLITERATUS_JUDGE_KEY."""
    url_model: str = ""
    """The model to ask for there."""
    url_seconds: float = Field(30.0, gt=0, le=3600)
    """The longest that one request may take. An endpoint that hangs counts as down after four requests in a row."""

    @model_validator(mode="after")
    def _can_decide(self) -> JudgeSettings:
        if not self.url and (self.decides == "endpoint" or self.url_model):
            raise ValueError("an endpoint needs its URL; give --judge-url (url) and --judge-model (url_model)")
        known = ("phrases", *self.rungs, *(("endpoint",) if self.url else ()))
        if self.decides not in known:
            raise ValueError(f"decides '{self.decides}' is no rung; the rungs are {', '.join(known)}")
        return self


class Recipe(FrozenModel):
    """A method as plain data. The result of a search is again a recipe, without ``search``."""

    RENAMED = {"enough": "stop_below", "stop_below_refusal": "stop_below"}

    name: str = ""
    about: str
    """One sentence: what the method does."""
    cite: tuple[str, ...] = ()
    seed: int = 0
    """Of the split of prompts, and of everything random."""
    split_by: SplitBy = "wording"
    """What prompts of two different parts may not have in common: much ``wording``, or their ``category``."""
    needs: tuple[Literal["bypass", "keep", "benign"], ...] = ()
    """Groups of prompts, beside target and control, without which the method is another one."""
    passes: int = Field(1, ge=1, le=8)  # later passes find nothing; see docs/experiments/recipes.md
    """How often directions are found and edited at most, each time in the model that is edited so far."""
    stop_below: float = Field(0.05, ge=0, le=1)
    """No further pass is made once the model shows the behavior on at most this share of search target prompts."""
    judge: JudgeSettings = JudgeSettings()
    probe: Probe = Probe()
    distill: tuple[Step, ...] = Field(min_length=1)
    weigh: tuple[Step, ...] = (Step(use="all"),)
    excise: Excise = Excise()
    tune: Tune | None = None
    verify: tuple[Step, ...] = tuple(
        Step(use=name)
        for name in ("behavior", "first_token_kl", "continuation_kl", "perplexity", "fluency", "relevance", "style")
    )
    analyze: tuple[Step, ...] = ()
    """Analyses whose results change this recipe before it runs."""
    search: Search | None = None

    def __repr__(self) -> str:
        found, weighed = (" → ".join(s.use for s in active_steps(steps)) for steps in (self.distill, self.weigh))
        extra = "".join(f", {name}" for name in ("analyze", "tune", "search") if getattr(self, name))
        parts = ", ".join(self.excise.parts)
        return f"<Recipe: {self.name or 'without a name'}, {found}, weighed by {weighed}, on {parts}{extra}>"

    def __str__(self) -> str:
        return repr(self)

    @property
    def uses_search_split(self) -> bool:
        """Whether anything is chosen on search prompts, so that none of their groups may be empty."""
        return bool(self.analyze or self.search or self.tune or self.excise.kl_budget or "router" in self.excise.parts)

    @model_validator(mode="after")
    def _needs_all(self) -> Recipe:
        if left_out := [step.use for step in (*self.verify, *self.analyze) if step.when != "always"]:
            raise ValueError(f"only distill and weigh steps can be left out by 'when'; take it out of '{left_out[0]}'")
        return self

    @model_validator(mode="after")
    def _balance_removes(self) -> Recipe:
        if self.tune is not None and self.tune.balance and self.excise.strength <= 0:
            raise ValueError(
                "tune.balance sets strengths that end a behavior; to strengthen one, take a method without it, such as "
                "least_change"
            )
        return self

    @model_validator(mode="after")
    def _one_pass(self) -> Recipe:
        if self.passes > 1 and self.excise.strength > 1:
            raise ValueError("a strength above 1 in a second pass turns the first one's reflection back; set passes=1")
        if self.passes > 1 and self.search is not None:
            raise ValueError("a search tries one pass at a time; set passes=1")
        if self.tune is not None and (self.passes > 1 or self.search is not None or self.excise.kl_budget is not None):
            raise ValueError("tune fits the plan of a single pass; leave out search and kl_budget, and set passes=1")
        if self.tune is not None and (self.excise.norm != "none" or self.excise.heads is not None):
            raise ValueError(
                "tune supports neither norm rules nor heads; set excise.norm to none and leave excise.heads out"
            )
        if self.tune is not None and (reads := READERS & set(self.excise.parts)):
            raise ValueError(f"tune fits only writers; take {', '.join(sorted(reads))} out of excise.parts")
        return self
