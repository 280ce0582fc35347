"""What varies the edit or the prompts: fits, directions, controls, blocks, examples, wordings. Each is a function of
the audit's context, and a stage of its store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from obliteratus.analyze import AnalysisContext
from obliteratus.analyze.repair import measure_repair
from obliteratus.audit.asked import ask_reworded, judge_asked
from obliteratus.audit.attacks import GROUPS, divide_blocks, draw_prompts, with_directions, within_blocks
from obliteratus.audit.context import CHEAP, AuditContext
from obliteratus.audit.doses import Curve, Matched, measure_at_kl
from obliteratus.audit.removal_cost import GOALS, summarize_cost
from obliteratus.audit.results import AskedSet, MatchedEdits, Perplexities, Repair
from obliteratus.core.errors import UserError
from obliteratus.core.progress import progress
from obliteratus.core.results import Score
from obliteratus.core.settings import Step
from obliteratus.core.shapes import Float
from obliteratus.core.types import Plan, Prompt
from obliteratus.distill import find_directions
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import Ids
from obliteratus.inference.token_losses import token_losses
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.probe.cache import collect_cached_activations
from obliteratus.verify.drift import text_tokens
from obliteratus.verify.intervals import paired_ratio

MEAN_DIFFERENCE = (Step(use="mean_diff"),)
RANDOM_SCALE = 64.0  # a random direction holds about 1/width of a stream, so it takes more strength to the same KL
TEXT_TOKENS = 48  # of each text for perplexity: sixteen such texts cost as much as forty prompts


def measure_seeds(audit: AuditContext) -> dict[str, Curve]:
    """Return curves of the cheap method, fitted on all fit prompts and on random halves of them."""
    n = max(len(audit.splits.fit[g]) for g in GROUPS) // 2
    found: dict[str, Curve | None] = {"all": audit.base_curve}
    for seed in range(1, audit.settings.seeds + 1):
        half = audit.fitter(audit.base_recipe, audit.attacker.draw_fit_prompts(n, seed))
        found[f"half {seed}"] = audit.try_curve(f"half {seed}", half, audit.base_curve)
    return {name: curve for name, curve in found.items() if curve is not None}


def measure_directions(audit: AuditContext) -> dict[str, Curve]:
    """Return curves with so many directions a layer: of the cheap method if each layer has its own, or else of `CHEAP`.

    A method that removes one layer's direction everywhere would become another one with several.
    """
    own = audit.base_recipe.distill == MEAN_DIFFERENCE
    recipe, found = audit.base_recipe if own else load_recipe(CHEAP), dict[str, Curve | None]()
    for k in audit.settings.directions:
        if k == 1 and own:
            found["1"] = audit.base_curve
        else:
            fitter = audit.fitter(with_directions(recipe, k))
            found[str(k)] = audit.try_curve(f"directions {k}", fitter, audit.base_curve if own else None)
    return {k: curve for k, curve in found.items() if curve is not None}


def measure_perplexity(audit: AuditContext, curves: Mapping[str, Curve]) -> Perplexities:
    """Return perplexity ratios of all methods at all goals that they reach."""

    def measure() -> Perplexities:
        ids = [row[:TEXT_TOKENS] for row in text_tokens(audit.subject)]
        base = _mean_losses(audit, ids)
        ratios: dict[str, dict[str, Score]] = {}
        for name, curve in curves.items():
            for cost in (summarize_cost(curve, audit.unedited, goal) for goal in GOALS):
                if cost.scale is not None:
                    with applied(audit.subject, audit.plan_of(name, curves).scaled(cost.scale)):
                        edited = _mean_losses(audit, ids)
                    ratios.setdefault(name, {})[f"{cost.goal:g}"] = paired_ratio(edited, base)
        return Perplexities(ratios=ratios)

    return audit.keep("perplexity", Perplexities, measure)


def _mean_losses(audit: AuditContext, ids: Ids) -> Float[Tensor, " texts"]:
    return torch.stack([loss.mean() for loss in token_losses(audit.subject, ids, title="AUDIT perplexity")])


def measure_edits(
    audit: AuditContext, name: str, edits: Mapping[str, Callable[[], Plan]], most: float | None = None
) -> MatchedEdits:
    """Measure edits at the KL of `find_room`. One that cannot be fitted is left out, with its reason."""

    def measure() -> MatchedEdits:
        room, done, failed = audit.find_room(), list[Matched](), dict[str, str]()
        limits = {} if most is None else {"most": most}
        with progress(f"AUDIT {name}", len(edits)) as advance:
            for label, make in edits.items():
                try:
                    done.append(measure_at_kl(audit.check, make(), label, room, **limits))
                except UserError as error:
                    failed[label] = str(error)
                advance(1)
        return MatchedEdits(kl=room.kl, edits=tuple(done), failed=failed)

    return audit.keep(name, MatchedEdits, measure)


def measure_controls(audit: AuditContext) -> MatchedEdits:
    """Measure what no knowledge of the behavior does at the same KL: random directions and shuffled labels."""
    edits = {"found direction": audit.fitter(audit.base_recipe)}
    for seed in range(1, audit.settings.controls + 1):
        edits[f"random direction {seed}"] = partial(audit.attacker.remove_random_direction, seed)
        edits[f"shuffled labels {seed}"] = audit.fitter(audit.base_recipe, audit.attacker.shuffle_labels(seed))
    return measure_edits(audit, "controls", edits, RANDOM_SCALE)


def measure_blocks(audit: AuditContext) -> MatchedEdits:
    """Measure the cheap method on some blocks alone."""
    layers = audit.subject.n_layers
    recipes = {
        f"{a}–{b}" if b > a else str(a): within_blocks(audit.base_recipe, a, b, layers)
        for a, b in divide_blocks(layers, audit.settings.windows)
    }
    edits = {name: audit.fitter(recipe) for name, recipe in recipes.items()}
    return measure_edits(audit, "blocks", edits)


def measure_examples(audit: AuditContext) -> MatchedEdits:
    """Measure the cheap method on few fit prompts of each group."""
    most = max(len(audit.splits.fit[g]) for g in GROUPS)
    numbers = [n for n in audit.settings.examples if n <= most]
    edits = {str(n): audit.fitter(audit.base_recipe, audit.attacker.draw_fit_prompts(n, n)) for n in numbers}
    return measure_edits(audit, "examples", edits)


def measure_self_repair(audit: AuditContext) -> Repair:
    """Return what later blocks write back of the difference of means."""

    def measure() -> Repair:
        acts = collect_cached_activations(audit.subject, audit.splits.fit)
        directions = find_directions(acts, MEAN_DIFFERENCE)
        context = AnalysisContext(acts, directions, audit.subject, audit.splits.fit, audit.splits.search, audit.judge)
        found = measure_repair(context, prompts=audit.settings.repair, depths=4)
        numbers = found.to_dict()
        return Repair(summary=found.summary(), found=bool(numbers["found"]), numbers=numbers)

    return audit.keep("repair", Repair, measure)


# ------------------------------------------------------------------------------- asked otherwise


def measure_rewordings(
    audit: AuditContext, curves: Mapping[str, Curve], own: Mapping[str, Sequence[Prompt]]
) -> AskedSet:
    """Measure whether the behavior returns where prompts are asked otherwise."""

    def measure() -> AskedSet:
        n = audit.settings.reworded
        few = draw_prompts(audit.check.prompts, n, audit.settings.seed)
        files = {name: draw_prompts(prompts, n, audit.settings.seed) for name, prompts in own.items()}
        earlier = audit.splits.search["control"][0]
        plan = audit.find_removal(curves)
        return AskedSet(
            asked=ask_reworded(audit.subject, audit.judge, plan, few, files, earlier, audit.settings.tokens)
        )

    return audit.keep("rewordings", AskedSet, measure)


def measure_benign(audit: AuditContext, curves: Mapping[str, Curve], prompts: Sequence[Prompt]) -> AskedSet:
    """Measure how many benign prompts show the behavior before and after its removal."""

    def measure() -> AskedSet:
        few, plan = draw_prompts(prompts, audit.settings.prompts, audit.settings.seed), audit.find_removal(curves)
        asked = judge_asked(audit.subject, audit.judge, plan, {"benign": few}, audit.settings.tokens)
        return AskedSet(asked=asked)

    return audit.keep("benign", AskedSet, measure)
