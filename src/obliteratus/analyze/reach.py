"""How deep edits may begin and still end the behavior, and what that costs on control prompts; by live edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.analyze.answer_check import (
    CHECKED_TOKENS,
    MOST_LOOPING,
    AnswerCheck,
    AnsweredEdit,
    is_fluent,
)
from obliteratus.analyze.base import GROUPS, AnalysisContext, analyses
from obliteratus.analyze.samples import LEVEL
from obliteratus.analyze.significance import LEAST_PAIRS, contrast_within_pairs
from obliteratus.core.cost import Answers, Cost, constant, prompt_count, variable
from obliteratus.core.errors import NothingMatchedError
from obliteratus.core.progress import SILENT, progress, report_to
from obliteratus.core.results import Score
from obliteratus.core.settings import Excise, expand_part
from obliteratus.core.shapes import Float
from obliteratus.core.types import Directions, Plan, Subject
from obliteratus.excise.live.hooks_per_row import applied_per_row
from obliteratus.excise.plan import plan_edits
from obliteratus.inference.cached_prompts import CachedPrompts
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.logits import kl_divergence
from obliteratus.prompts import pick_evenly
from obliteratus.report.curves import BLUE, GREEN, GREY, ORANGE, Figure
from obliteratus.verify.intervals import mean_score
from obliteratus.verify.openings import frequent_openings

BOTH, RANDOM = "both", "random"
PARTS: Mapping[str, tuple[str, ...]] = {BOTH: ("attn.out", "mlp.out"), "attention": ("attn.out",), "mlp": ("mlp.out",)}
COLORS = {BOTH: BLUE, "attention": ORANGE, "mlp": GREEN, RANDOM: GREY}
# Bytes of outputs of the blocks below each edit, cached for the next depths: 48 short prompts of a small model take
# 15 MB.
CACHE_BYTES = 50e6
HALF = 0.5  # of the behavior
NEGLIGIBLE_SHARE = 1e-3  # of the behavior: less is rounding of probabilities
NEGLIGIBLE_KL = 1e-5  # nats: a smaller KL is rounding; plots on a log scale begin here
# Answers are generated only under edits that leave at most this share of the behavior by first tokens. In 60 trials
# refusals never fell short of what first tokens say by more than 0.03 (docs/experiments/search.md, "How far the first
# look can be trusted").
MAX_REMAINING_BEHAVIOR = 0.1
Cells = Mapping[str, tuple[Score, ...]]
"""Scores by part and depth."""


# ------------------------------------------------------------------------------------------------- the result
@dataclass(frozen=True)
class Reach:
    """Effects on held-out prompts' first tokens of removing the directions from all blocks from a depth on."""

    depths: tuple[int, ...]
    """First edited block; all blocks above it are edited too."""
    remaining: Cells
    """Share of the behavior that remains, by part and depth: 1 as in the original model, 0 as on control prompts.
    Parts: ``both``, ``attention``, ``mlp``, and ``random`` (random directions in both). Bootstrap intervals over
    target prompts."""
    kl: Cells
    """KL(original ‖ edited) on control prompts, nats."""
    answered: tuple[AnsweredEdit, ...]
    """The edits under which answers were generated: those that leave little by first tokens, cheapest first, up to the
    first that ends the behavior in fluent answers; and if there is none, those that leave least."""
    tokens: tuple[str, ...]
    """First tokens that the model typically gives on target prompts and not on control prompts. Without any, first
    tokens say nothing of the behavior, and all of it remains by them."""
    effective_depths: tuple[int, ...]
    """Depths from which removal in attention and MLP leaves less than half of the behavior, and less than random
    removal leaves, both beyond chance over all depths."""
    working: frozenset[str]
    """Parts in which removal ends some of the behavior, beyond chance over all parts and depths."""
    unedited_degenerate: Score | None = None
    """Share of the unedited model's answers to the same control prompts that are empty or loops; None where no edit had
    enough of them to ask."""

    def is_fluent(self, edit: AnsweredEdit) -> bool:
        """Return whether at most 0.05 more of the answers, or two, were degenerate than of the unedited model's."""
        return is_fluent(edit, self.unedited_degenerate)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts edited along the model's own directions."""
        return tuple(part for part in self.remaining if part != RANDOM)

    def works(self, part: str) -> bool:
        """Return whether removal in this part alone ends any of the behavior, beyond chance, at some depth."""
        return part in self.working

    def to_dict(self) -> dict[str, Any]:
        """Return what remains and what it costs, by part and depth, with intervals."""
        tables = {
            name: {part: [s.model_dump() for s in row] for part, row in table.items()}
            for name, table in (("left", self.remaining), ("kl", self.kl))
        }
        answered = [
            {"part": e.part, "depth": e.depth, **e.shown.model_dump(), "degenerate": _dump(e.degenerate)}
            for e in self.answered
        ]
        found = {"answered": answered, "tokens": list(self.tokens), "found": list(self.effective_depths)}
        found |= {"unedited_degenerate": _dump(self.unedited_degenerate)}
        return {"depths": list(self.depths), "level": LEVEL, **tables, **found}

    def summary(self) -> str:
        """Return how deep edits may begin, and what that costs."""
        if not self.effective_depths:
            n = self.remaining[BOTH][0].n
            few = f"; fewer than {LEAST_PAIRS} show nothing" if n < LEAST_PAIRS else ""
            return self._add_answers(
                f"removing the directions ends the behavior from no depth on ({n} prompts, level {LEVEL:g}{few})"
            )
        last = max(self.effective_depths)
        remaining, cost = (table[BOTH][self.depths.index(last)].value for table in (self.remaining, self.kl))
        text = (
            f"removal still works from block {last} on: {100 * max(remaining, 0):.0f} % of the behavior remains, "
            f"at KL {cost:.2g} on controls (from block {self.depths[0]}: {self.kl[BOTH][0].value:.2g})"
        )
        return self._add_answers(text)

    def _add_answers(self, text: str) -> str:
        """Return the text with what was found in the answers under the last edit."""
        if not self.answered:
            return text
        edit = self.answered[-1]
        text += f"; in {edit.part} from block {edit.depth} on, {edit.shown.value:.1%} of {edit.shown.n} prompts show it"
        return text if edit.degenerate is None else f"{text}, and {edit.degenerate.value:.1%} of answers are degenerate"

    def draw(self, figure: Figure) -> None:
        """Draw what remains, and below it what it costs, by depth."""
        plots = ((self.remaining, "behavior remaining"), (self.kl, "KL on controls (nats)"))
        for row, (table, label) in enumerate(plots, 1):
            axes = figure.add_subplot(2, 1, row, xlabel="first edited block", ylabel=label, xticks=self.depths)
            for part, scores in table.items():
                ends = [[max(x, NEGLIGIBLE_KL) if row == 2 else x for x in (s.low, s.value, s.high)] for s in scores]
                bars = [[middle - low for low, middle, _ in ends], [high - middle for _, middle, high in ends]]
                values = [middle for _, middle, _ in ends]
                axes.errorbar(self.depths, values, yerr=bars, fmt="o-", color=COLORS[part], label=part, capsize=2)
            if row == 1:
                axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(table))
            else:
                axes.set_yscale("log")


# ----------------------------------------------------------------------------------------------- the analysis
def _cost(options: Mapping[str, Any]) -> Cost:
    each = sum((prompt_count("search", group, options["prompts"]) for group in GROUPS), constant(0))
    passes = Cost(each * (constant(1) + variable("L", options["depths"]) * (len(PARTS) + 1)))
    if not options["tries"]:
        return passes
    # at most: none of the first edits is fluent, so as many others are checked, and the unedited model is asked too
    targets = Answers(options["tokens"], prompt_count("search", "target", options["answers"]), options["tries"] + 1)
    return passes + Cost(answers=(targets, Answers(CHECKED_TOKENS, each, options["tries"] + MOST_LOOPING + 1)))


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
    """Measure how deep edits may begin and still end the behavior: in attention, in the MLPs, or in both.

    Live edits remove the context's directions, oblique ones too, from all that blocks from a depth on write, as
    EXCISE would; the blocks below are not run again. What remains is read off the probability of the first tokens
    that the behavior begins with: those with at least 5 % on target prompts and four times as much as on control
    prompts. The same is done with random directions. Then answers are generated under up to ``tries`` edits that
    leave little, cheapest first, until one ends the behavior and answers stay fluent: at most 0.05 more of longer
    answers to target and control prompts are degenerate than of the unedited model's to controls. If there is none,
    answers are generated under up to as many edits that leave least by first tokens (without typical first tokens,
    under those that reach deepest), so that the best fluent one is known.

    Whether removal works is tested prompt by prompt with sign flips, which takes six prompts: where it does nothing,
    any depth is called effective, or any part working, in at most 5 % of cases each.

    prompts: the most search prompts of each group for first tokens. depths: how many first blocks are tried, evenly
    spaced from ``low`` of the depth on; edits that begin lower cost more and have not been seen to do more. answers,
    tokens: the most target search prompts that are answered, and the length of their answers.
    """
    subject, layers = context.subject, choose_first_blocks(context.subject.n_layers, low, depths)
    chosen = {g: pick_evenly(context.held_out[g], prompts) for g in GROUPS}
    size, parts = len(chosen["target"]), list_parts(subject)
    ids = [row for g in GROUPS for row in render_prompts(subject, chosen[g])]
    cached = CachedPrompts(subject, ids, budget=CACHE_BYTES, answers=())
    base, edited = cached.first_token(), []
    with progress("ANALYZE reach", len(layers)) as advance, report_to(SILENT):
        for layer in layers:
            plans = [plan_removal_from(context, context.directions, names, layer) for names in parts.values()]
            plans.append(plan_removal_from(context, randomize_directions(context.directions, seed), parts[BOTH], layer))
            with applied_per_row(subject, plans, [i for i in range(len(plans)) for _ in base]):
                edited.append(cached.repeat(len(plans)).first_token().view(len(plans), len(base), -1))
            advance(1)
    remaining, cost, openings = tabulate(base, edited, (*parts, RANDOM), size)
    plan_of = partial(_plan_part, context)
    check = AnswerCheck(context, plan_of, pick_evenly(context.held_out["target"], answers), chosen, tokens)
    ranked, others = rank_edits(layers, remaining, cost), rank_by_effect(layers, remaining)
    if not openings:  # first tokens say nothing, so answers must: the strongest edits first
        ranked, others = [], [(BOTH, layer) for layer in layers]
    with progress("ANALYZE answers", 2 * tries) as advance, report_to(SILENT):
        worth_trying = bool(openings) or (tries > 0 and check.shows_behavior())
        answered = check.find_fluent_edit(ranked, others, tries if worth_trying else 0, advance)
    words = tuple(subject.tokenizer.decode([t]) for t in openings)
    left = {
        part: torch.stack([compute_remaining_behavior(base, logp[i], size, openings) for logp in edited], 1)
        for i, part in enumerate((*parts, RANDOM))
    }
    found = find_effective_depths(left, layers), find_working_parts(left)
    return Reach(tuple(layers), remaining, cost, answered, words, *found, check.unedited_degenerate)


Left = Mapping[str, Float[Tensor, "prompts depths"]]
"""Share of the behavior that remains of each target prompt, by part."""


def find_effective_depths(left: Left, layers: Sequence[int]) -> tuple[int, ...]:
    """Return the depths at which removal in all parts leaves less than half, and less than random directions do."""
    own, n = left[BOTH], len(layers)
    contrast = contrast_within_pairs(torch.cat([HALF - own, left[RANDOM] - own], 1))
    found = {i for i in contrast.significant if float(contrast.value[i]) > 0}
    return tuple(layer for i, layer in enumerate(layers) if {i, i + n} <= found)


def find_working_parts(left: Left) -> frozenset[str]:
    """Return the parts in which removal ends more of the behavior than rounding, at any depth."""
    names = [(part, i) for part, values in left.items() if part != RANDOM for i in range(values.shape[1])]
    contrast = contrast_within_pairs(torch.stack([1 - left[part][:, i] for part, i in names], 1))
    return frozenset(names[i][0] for i in contrast.significant if float(contrast.value[i]) > NEGLIGIBLE_SHARE)


def rank_edits(layers: Sequence[int], remaining: Cells, cost: Cells) -> list[tuple[str, int]]:
    """Return the parts and depths that leave at most `MAX_REMAINING_BEHAVIOR`, cheapest first by KL.

    Of equal cost (to 1e-4 nats) one part comes before both, then the deepest comes first.
    """
    cells = [
        (round(cost[part][i].value, 4), part == BOTH, -layer, part)
        for part in remaining
        for i, layer in enumerate(layers)
        if part != RANDOM and remaining[part][i].value <= MAX_REMAINING_BEHAVIOR
    ]
    return [(part, -layer) for _, _, layer, part in sorted(cells)]


def rank_by_effect(layers: Sequence[int], remaining: Cells) -> list[tuple[str, int]]:
    """Return all parts and depths, those first that leave least; of equals, to 1e-2, the deepest."""
    cells = [
        (round(remaining[part][i].value, 2), -layer, part)
        for part in remaining
        for i, layer in enumerate(layers)
        if part != RANDOM
    ]
    return [(part, -layer) for _, layer, part in sorted(cells)]


def _dump(score: Score | None) -> dict[str, Any] | None:
    return None if score is None else score.model_dump()


# ------------------------------------------------------------------------------------------------------ plans
def choose_first_blocks(n: int, low: float, most: int) -> list[int]:
    """Return at most ``most`` of the n blocks from ``low`` of the depth on, evenly spaced; the last is always in."""
    blocks = list(range(n))[int(low * n) :][::-1]
    return sorted(pick_evenly(blocks, most))


def list_parts(subject: Subject) -> dict[str, tuple[str, ...]]:
    """Return those of `PARTS` that this model's blocks have."""
    present = {site.part for site in subject.sites}
    own = {name: tuple(p for p in parts if present & set(expand_part(p))) for name, parts in PARTS.items()}
    return {name: parts for name, parts in own.items() if parts}


def plan_removal_from(context: AnalysisContext, directions: Directions, parts: Sequence[str], layer: int) -> Plan:
    """Return the plan that removes the directions from these parts of block ``layer`` and above, as EXCISE would.

    Edits are anchored where anchors were probed, and of least change where contrasts were. Without directions the plan
    is empty.
    """
    subject = context.subject
    weights = torch.tensor([float(site.layer >= layer) for site in subject.sites])
    acts = context.activations
    options = Excise(parts=tuple(parts), anchored=bool(acts.outputs), least_change=bool(acts.contrasts))
    try:
        return plan_edits(subject, directions, weights, acts, options)
    except NothingMatchedError:
        return Plan((), subject.source.digest)


def _plan_part(context: AnalysisContext, part: str, layer: int) -> Plan:
    return plan_removal_from(context, context.directions, list_parts(context.subject)[part], layer)


def randomize_directions(directions: Directions, seed: int) -> Directions:
    """Return random directions, as many at each stream as these."""
    noise = torch.randn(directions.basis.shape, generator=torch.Generator().manual_seed(seed))
    rows = torch.linalg.qr(normalize(noise, dim=2).transpose(1, 2))[0].transpose(1, 2)
    present = directions.basis.norm(dim=2, keepdim=True) > 0
    return Directions((rows * present).contiguous(), directions.score, directions.raw, "random")


# ---------------------------------------------------------------------------------------------- first tokens
def tabulate(
    base: Float[Tensor, "rows vocabulary"],
    edited: Sequence[Float[Tensor, "plans rows vocabulary"]],
    parts: Sequence[str],
    size: int,
) -> tuple[dict[str, tuple[Score, ...]], dict[str, tuple[Score, ...]], tuple[int, ...]]:
    """Return `Reach.remaining` and `Reach.kl` from first tokens' log-probabilities, and the tokens refused with.

    edited: for each depth, one plan for each of ``parts``. size: how many rows are target prompts, which come first.
    """
    openings = find_typical_first_tokens(base[:size], base[size:])
    remaining: dict[str, tuple[Score, ...]] = {}
    cost: dict[str, tuple[Score, ...]] = {}
    for i, part in enumerate(parts):
        rows = [logp[i] for logp in edited]
        remaining[part] = tuple(
            mean_score(compute_remaining_behavior(base, logp, size, openings), "share left") for logp in rows
        )
        cost[part] = tuple(mean_score(kl_divergence(base[size:], logp[size:]), "nats") for logp in rows)
    return remaining, cost, openings


def find_typical_first_tokens(
    target: Float[Tensor, "rows vocabulary"], control: Float[Tensor, "others vocabulary"]
) -> tuple[int, ...]:
    """Return the first tokens that are typical of target prompts, from log-probabilities; there may be none."""
    one, other = (logp.double().exp().mean(0) for logp in (target, control))
    return tuple(frequent_openings(one, other))


def compute_remaining_behavior(
    base: Float[Tensor, "rows vocabulary"], edited: Float[Tensor, "rows vocabulary"], size: int, tokens: Sequence[int]
) -> Float[Tensor, " target"]:
    """Return each target prompt's probability of the tokens, in units of the groups' difference; 1 without tokens.

    The mean is 1 for the original model, and 0 where target prompts behave as control prompts did. size: how many
    rows are target prompts, which come first.
    """
    if not tokens:
        return torch.ones(size)
    before, after = (logp[:, list(tokens)].double().exp().sum(1) for logp in (base, edited))
    floor = before[size:].mean()
    return ((after[:size] - floor) / (before[:size].mean() - floor)).float()
