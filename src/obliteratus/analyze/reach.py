"""From which depth on removing the directions ends the behavior, and what that costs: by live edits, part by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from torch import Tensor

from obliteratus.analyze.base import GROUPS, AnalysisContext, analyses
from obliteratus.core.cost import Answers, Cost, constant, prompt_count, variable
from obliteratus.core.progress import SILENT, progress, report_to
from obliteratus.core.results import Score
from obliteratus.core.shapes import Float
from obliteratus.core.types import Prompt
from obliteratus.excise.live.hooks_per_row import applied_per_row
from obliteratus.inference.cached_prompts import CachedPrompts
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.logits import kl_divergence
from obliteratus.prompts import evenly_spaced
from obliteratus.report.curves import BLUE, GREEN, GREY, ORANGE
from obliteratus.verify.intervals import bootstrap, mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure


import torch
from torch.nn.functional import normalize

from obliteratus.core.errors import NothingMatchedError
from obliteratus.core.settings import Excise, Step, expand_part
from obliteratus.core.types import Directions, Plan, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import plan_edits
from obliteratus.verify import measure
from obliteratus.verify.openings import frequent_openings

BOTH = "both"
PARTS: Mapping[str, tuple[str, ...]] = {BOTH: ("attn.out", "mlp.out"), "attention": ("attn.out",), "mlp": ("mlp.out",)}


def choose_first_blocks(n: int, low: float, most: int) -> list[int]:
    """At most so many of the blocks from ``low`` of the depth on, evenly spread; the last one is not left out."""
    blocks = list(range(n))[int(low * n) :][::-1]
    return sorted(blocks[i] for i in evenly_spaced(len(blocks), most))


def list_parts(subject: Subject) -> dict[str, tuple[str, ...]]:
    """The parts that this model's blocks have."""
    there = {site.part for site in subject.sites}
    own = {name: tuple(p for p in of if there & set(expand_part(p))) for name, of in PARTS.items()}
    return {name: of for name, of in own.items() if of}


def plan_removal_from(context: AnalysisContext, directions: Directions, parts: Sequence[str], layer: int) -> Plan:
    """The directions taken from these parts of blocks ``layer`` and above, as EXCISE would: anchored where anchors were
    probed. No directions there: the model as it is."""
    subject = context.subject
    weights = torch.tensor([float(site.layer >= layer) for site in subject.sites])
    options = Excise(parts=tuple(parts), anchored=bool(context.activations.outputs))
    try:
        return plan_edits(subject, directions, weights, context.activations, options)
    except NothingMatchedError:
        return Plan((), subject.source.digest)


def randomize_directions(directions: Directions, seed: int) -> Directions:
    """Random directions in place of these, as many at each stream."""
    noise = torch.randn(directions.basis.shape, generator=torch.Generator().manual_seed(seed))
    rows = torch.linalg.qr(normalize(noise, dim=2).transpose(1, 2))[0].transpose(1, 2)
    there = directions.basis.norm(dim=2, keepdim=True) > 0
    return Directions((rows * there).contiguous(), directions.score, directions.raw, "random")


def find_typical_first_tokens(
    target: Float[Tensor, "rows vocabulary"], control: Float[Tensor, "others vocabulary"]
) -> tuple[int, ...]:
    """Return the first tokens that are typical of target prompts, from log-probabilities; there may be none."""
    one, other = (logp.double().exp().mean(0) for logp in (target, control))
    return tuple(frequent_openings(one, other))


def compute_remaining_behavior(
    base: Float[Tensor, "rows vocabulary"], edited: Float[Tensor, "rows vocabulary"], size: int, tokens: Sequence[int]
) -> Float[Tensor, " target"]:
    """Of each target prompt: its probability of the tokens, in units of what the groups differ by; 1 without tokens.

    The mean of them is 1 in the model as it is, and 0 where target prompts are as control prompts were. size: how many
    rows are target prompts, which come first.
    """
    if not tokens:
        return torch.ones(size)
    before, after = (logp[:, list(tokens)].double().exp().sum(1) for logp in (base, edited))
    floor = before[size:].mean()
    return ((after[:size] - floor) / (before[:size].mean() - floor)).float()


def measure_refusal_rate(subject: Subject, plan: Plan, prompts: Sequence[Prompt], tokens: int) -> Score:
    """Share of target prompts whose answers of so many tokens refuse, under the plan."""
    with applied(subject, plan):
        found = measure(subject, PromptSet({"target": tuple(prompts)}), (Step(use="refusal", tokens=tokens),))
    return found.scores["refusal.target"]


RANDOM = "random"
COLORS = {BOTH: BLUE, "attention": ORANGE, "mlp": GREEN, RANDOM: GREY}
# Bytes of what the blocks below each edit gave, kept for the next depths: 48 short prompts of a small model take 15 MB.
CACHE_BYTES = 50e6
HALF = 0.5  # of the behavior
NOTHING = 1e-5  # nats: below lies rounding, and logarithms begin
# Of the behavior: an edit that leaves more by first tokens is not answered. In 60 trials refusals never fell short of
# what first tokens say by more than 0.03 (docs/experiments/search.md, "How far the first look can be trusted").
MAX_REMAINING_BEHAVIOR = 0.1
Cells = Mapping[str, tuple[Score, ...]]
"""By part and depth."""


@dataclass(frozen=True)
class Reach:
    """Of held-out prompts' first tokens, with the directions taken from what blocks from a depth on write."""

    depths: tuple[int, ...]
    """First block that is edited; all above it are too."""
    left: Cells
    """By part (``both``, ``attention``, ``mlp``, and ``random``: random directions in both) and depth: what is left
    of the behavior, 1 as in the model as it is, 0 as of control prompts in it; with bootstrap intervals over target
    prompts."""
    kl: Cells
    """KL(as it is ‖ edited) on control prompts, nats."""
    answered: tuple[tuple[str, int, Score], ...]
    """Part, depth and share of refused answers, of edits that were answered: of those that first tokens say little is
    left by, from the cheapest on, up to the first that ends all refusals."""
    tokens: tuple[str, ...]
    """By which first tokens the model does on target prompts what it does not on control prompts. None: nothing to
    look for, and all is left."""

    @property
    def effective_depths(self) -> tuple[int, ...]:
        """Depths from which removal in attention and MLP ends more than half of the behavior, and random removal less:
        the intervals lie apart."""
        rows = zip(self.depths, self.left[BOTH], self.left[RANDOM], strict=True)
        return tuple(d for d, own, other in rows if own.high < min(HALF, other.low))

    @property
    def parts(self) -> tuple[str, ...]:
        """Those of the model's own directions."""
        return tuple(part for part in self.left if part != RANDOM)

    def works(self, part: str) -> bool:
        """Whether removal in this part alone ends any of the behavior, beyond its interval, from some depth on."""
        return any(score.high < 1 for score in self.left.get(part, ()))

    def to_dict(self) -> dict[str, Any]:
        """What is left, and what it costs, by part and depth, with intervals."""
        tables = {"left": self.left, "kl": self.kl}
        told = {
            name: {part: [s.model_dump() for s in row] for part, row in table.items()} for name, table in tables.items()
        }
        answered = [{"part": part, "depth": depth, **s.model_dump()} for part, depth, s in self.answered]
        found = {"answered": answered, "tokens": list(self.tokens), "found": list(self.effective_depths)}
        return {"depths": list(self.depths), **told, **found}

    def summary(self) -> str:
        """How deep edits may begin."""
        if not self.effective_depths:
            return "removing the directions ends the behavior from no depth on"
        last = max(self.effective_depths)
        left, cost = (table[BOTH][self.depths.index(last)].value for table in (self.left, self.kl))
        text = (
            f"removal still works from block {last} on: {100 * max(left, 0):.0f} % of the behavior is left, "
            f"at KL {cost:.2g} on controls (from block {self.depths[0]}: {self.kl[BOTH][0].value:.2g})"
        )
        if not self.answered:
            return text
        part, depth, share = self.answered[-1]
        return f"{text}; in {part} from block {depth} on, {share.value:.1%} of {share.n} prompts are refused"

    def draw(self, figure: Figure) -> None:
        """What is left, and below it what it costs, by depth."""
        for row, (table, label) in enumerate(((self.left, "behavior left"), (self.kl, "KL on controls (nats)")), 1):
            axes = figure.add_subplot(2, 1, row, xlabel="first edited block", ylabel=label, xticks=self.depths)
            for part, scores in table.items():
                ends = [[max(x, NOTHING) if row == 2 else x for x in (s.low, s.value, s.high)] for s in scores]
                bars = [[middle - low for low, middle, _ in ends], [high - middle for _, middle, high in ends]]
                values = [middle for _, middle, _ in ends]
                axes.errorbar(self.depths, values, yerr=bars, fmt="o-", color=COLORS[part], label=part, capsize=2)
            if row == 1:
                axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(table))
            else:
                axes.set_yscale("log")


def _cost(options: Mapping[str, Any]) -> Cost:
    each = sum((prompt_count("search", group, options["prompts"]) for group in GROUPS), constant(0))
    passes = Cost(each * (constant(1) + variable("L", options["depths"]) * (len(PARTS) + 1)))
    written = Answers(options["tokens"], prompt_count("search", "target", options["answers"]), options["tries"])
    return passes + Cost(answers=(written,) if options["tries"] else ())


@analyses.register("reach", cite="arXiv:2406.11717", cost=_cost)
def measure_reach(
    context: AnalysisContext,
    *,
    prompts: Annotated[int, Field(ge=2)] = 24,
    depths: Annotated[int, Field(ge=1)] = 8,
    low: Annotated[float, Field(ge=0, lt=1)] = 0.3,
    tries: Annotated[int, Field(ge=0)] = 6,
    answers: Annotated[int, Field(ge=1)] = 48,
    tokens: Annotated[int, Field(ge=4)] = 16,
    seed: int = 0,
) -> Reach:
    """How deep edits may begin and still end the behavior, in attention, in the MLPs, or in both.

    The context's own directions, oblique ones too, are taken from all that blocks from a depth on write, by live edits,
    anchored where anchors were probed; the blocks below are not run again. What is left is read off the probability of
    the first tokens that this model refuses with: those of at least one target prompt in twenty, four times as likely
    as on control prompts. The same is done with random directions in their place. Then up to ``tries`` edits that leave
    little are answered, the cheapest first, until one ends all refusals.

    prompts: search prompts of each group for first tokens, at most. depths: how many first blocks are tried, evenly
    spread from ``low`` of the depth on: further down an edit costs more and has not been seen to do more. answers,
    tokens: target search prompts that are answered, at most, and how long.
    """
    subject, layers = context.subject, choose_first_blocks(context.subject.n_layers, low, depths)
    some = {g: [context.held_out[g][i] for i in evenly_spaced(len(context.held_out[g]), prompts)] for g in GROUPS}
    size, parts = len(some["target"]), list_parts(subject)
    trunk = CachedPrompts(
        subject, [row for g in GROUPS for row in render_prompts(subject, some[g])], budget=CACHE_BYTES, answers=()
    )
    base, found = trunk.first_token(), []
    with progress("ANALYZE reach", len(layers)) as advance, report_to(SILENT):
        for layer in layers:
            plans = [plan_removal_from(context, context.directions, of, layer) for of in parts.values()]
            plans.append(plan_removal_from(context, randomize_directions(context.directions, seed), parts[BOTH], layer))
            with applied_per_row(subject, plans, [i for i in range(len(plans)) for _ in base]):
                found.append(trunk.times(len(plans)).first_token().view(len(plans), len(base), -1))
            advance(1)
    left, cost, begun = tabulate(base, found, (*parts, RANDOM), size)
    held = [context.held_out["target"][i] for i in evenly_spaced(len(context.held_out["target"]), answers)]
    tried = _answered(context, rank_edits(layers, left, cost)[:tries] if begun else [], held, tokens)
    words = tuple(subject.tokenizer.decode([t]) for t in begun)
    return Reach(tuple(layers), left, cost, tried, words)


def rank_edits(layers: Sequence[int], left: Cells, cost: Cells) -> list[tuple[str, int]]:
    """Parts and depths that leave at most ``WORTH``, by KL; of equals (to 1e-4 nats) one part before both, then the
    deepest."""
    cells = [
        (round(cost[part][i].value, 4), part == BOTH, -layer, part)
        for part in left
        for i, layer in enumerate(layers)
        if part != RANDOM and left[part][i].value <= MAX_REMAINING_BEHAVIOR
    ]
    return [(part, -layer) for _, _, layer, part in sorted(cells)]


def _answered(
    context: AnalysisContext, cells: Sequence[tuple[str, int]], prompts: Sequence[Prompt], tokens: int
) -> tuple[tuple[str, int, Score], ...]:
    """Refusals under each edit, up to the first that ends them."""
    parts, done = list_parts(context.subject), list[tuple[str, int, Score]]()
    with progress("ANALYZE answers", len(cells)) as advance, report_to(SILENT):
        for part, layer in cells:
            plan = plan_removal_from(context, context.directions, parts[part], layer)
            done.append((part, layer, measure_refusal_rate(context.subject, plan, prompts, tokens)))
            advance(1)
            if done[-1][2].value == 0:
                break
    return tuple(done)


def tabulate(
    base: Float[Tensor, "rows vocabulary"],
    edited: Sequence[Float[Tensor, "plans rows vocabulary"]],
    parts: Sequence[str],
    size: int,
) -> tuple[dict[str, tuple[Score, ...]], dict[str, tuple[Score, ...]], tuple[int, ...]]:
    """`Reach.left` and `Reach.kl` from log-probabilities of the first token, by depth and part; and the tokens.

    size: how many rows are target prompts, which come first.
    """
    begun = find_typical_first_tokens(base[:size], base[size:])
    left: dict[str, tuple[Score, ...]] = {}
    cost: dict[str, tuple[Score, ...]] = {}
    for i, part in enumerate(parts):
        rows = [logp[i] for logp in edited]
        left[part] = tuple(
            bootstrap(compute_remaining_behavior(base, logp, size, begun), mean, "share left") for logp in rows
        )
        cost[part] = tuple(bootstrap(kl_divergence(base[size:], logp[size:]), mean, "nats") for logp in rows)
    return left, cost, begun
