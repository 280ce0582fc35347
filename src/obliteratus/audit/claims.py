"""What an audit says, in sentences. Each claims only what its numbers tell from chance, and says where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from math import isinf

import torch

from obliteratus.audit.asked import LEVEL, find_returns
from obliteratus.audit.doses import Matched
from obliteratus.audit.removal_cost import HALF, TWENTIETH, RemovalCost, summarize_cost
from obliteratus.audit.results import ROOM, AuditReport, MatchedEdits
from obliteratus.core.results import Score
from obliteratus.judge.own_words import fisher_chance
from obliteratus.verify.intervals import paired_share_change

GOAL_WORDS = {HALF: "one half", TWENTIETH: "one in twenty"}
FOUND, RANDOM, SHUFFLED = "found direction", "random direction", "shuffled labels"


# ------------------------------------------------------------------------------------------- numbers
def format_number(value: float) -> str:
    """Return a number with two significant digits, without an exponent from 0.0001 on."""
    if isinf(value):
        return "∞"
    if value == 0 or abs(value) < 1e-4:
        return f"{value:.1g}" if value else "0"
    return f"{float(f'{value:.2g}'):g}"


def format_interval(score: Score) -> str:
    """Return ``0.0043 (0.0031 to 0.0062)``, or the value alone where there is no interval."""
    ends = f" ({format_number(score.low)} to {format_number(score.high)})" if score.has_interval else ""
    return f"{format_number(score.value)}{ends}"


def format_percent(score: Score) -> str:
    """Return ``98 % (86 to 100)``."""
    ends = f" ({100 * score.low:.0f} to {100 * score.high:.0f})" if score.has_interval else ""
    return f"{100 * score.value:.0f} %{ends}"


def format_ratio(score: Score) -> str:
    """Return a ratio of perplexities, which is near 1: ``0.997 (0.992 to 1.001)``."""
    ends = f" ({score.low:.3f} to {score.high:.3f})" if score.has_interval else ""
    return f"{score.value:.3f}{ends}"


def format_cost(cost: RemovalCost) -> str:
    """Return the cost with its interval in nats, or above what it lies."""
    if not cost.reached:
        return f"above {format_number(cost.tried)}"
    if isinf(cost.kl.high):
        return f"{format_number(cost.kl.value)} (at least {format_number(cost.kl.low)})"
    return format_interval(cost.kl)


# -------------------------------------------------------------------------------------------- headline
def describe_headline(report: AuditReport) -> str:
    """Return the number to compare between models in a sentence; that nothing is claimed where there is no behavior."""
    name, half, most = report.behavior, report.cost, report.cost_to(TWENTIETH)
    if not report.shows_behavior or half is None or most is None:
        return f"Nothing is claimed: {report.presence.against}."
    if not half.reached:
        above = format_number(half.tried)
        return f"Cost of removal above {above} nats: no method tried brings {name} down to one half of what it was."
    return (
        f"Cost of removal {format_cost(half)} nats: the least KL at which one half of {name} is left, by {half.best}. "
        f"One in twenty: {format_cost(most)}."
    )


def describe_costs(report: AuditReport) -> str:
    """Return what the goals cost."""
    assert report.unedited is not None, "asked for only with the behavior"
    parts = [f"{format_cost(cost)} nats to {GOAL_WORDS[cost.goal]}{by_method(cost)}" for cost in report.least]
    before, n = format_percent(report.unedited.rate), report.unedited.rate.n
    shown = f"The unedited model shows {report.behavior} on {before} of {n} prompts."
    return f"{shown} Down from there: {', '.join(parts)}.{describe_perplexity(report)}"


def describe_perplexity(report: AuditReport) -> str:
    """Return the least ratio of perplexities at one in twenty, as a further sentence; '' if there is none."""
    ratios = {} if report.perplexity is None else report.perplexity.ratios
    reached = {name: found[f"{TWENTIETH:g}"] for name, found in ratios.items() if f"{TWENTIETH:g}" in found}
    if not reached:
        return ""
    name = min(reached, key=lambda method: reached[method].value)
    return f" The least perplexity there, edited ÷ unedited, is {format_ratio(reached[name])} by {name}."


def by_method(cost: RemovalCost) -> str:
    """Return the method of a cost that was reached."""
    return f" by {cost.best}" if cost.best and cost.reached else ""


def describe_seeds(report: AuditReport) -> str:
    """Return how far the cost depends on the prompts that an edit is fitted on; '' if that was not measured."""
    if len(report.seeds) < 2:
        return ""
    assert report.unedited is not None, "asked for only with the behavior"
    costs = [summarize_cost(curve, report.unedited, HALF) for curve in report.seeds.values()]
    listed = ", ".join(format_number(cost.kl.value) for cost in costs)
    return (
        f"{report.base_method} fitted on all fit prompts and on random halves of them costs {listed} nats to one "
        "half; the interval above covers this."
    )


# ------------------------------------------------------------------------------------------- controls
def pool(edits: Sequence[Matched], name: str) -> list[Matched]:
    """Return the edits whose name begins so."""
    return [edit for edit in edits if edit.name.startswith(name)]


def compare_controls(controls: MatchedEdits) -> float | None:
    """Return p that the control that removes most removes as much as the found direction.

    Fisher's exact test, one-sided, times the number of controls. None if they could not be measured.
    """
    found, others = pool(controls.edits, FOUND), [e for e in controls.edits if not e.name.startswith(FOUND)]
    if not found or not others:
        return None
    shown = found[0].dose.shown
    least = min(others, key=lambda edit: sum(edit.dose.shown)).dose.shown
    return min(1.0, len(others) * fisher_chance(sum(least), len(least), sum(shown), len(shown)))


def is_specific(report: AuditReport) -> bool | None:
    """Return whether the found direction removes more than controls at the same KL; None if that was not measured."""
    p = None if report.controls is None else compare_controls(report.controls)
    return None if p is None else p <= LEVEL


def describe_controls(report: AuditReport) -> str:
    """Return what directions without knowledge do at the same KL."""
    controls = report.controls
    if controls is None:
        return ""
    p = compare_controls(controls)
    if p is None:
        return "The controls could not be measured."
    rates = []
    for name, plural in ((FOUND, "the found direction"), (RANDOM, "random directions"), (SHUFFLED, "shuffled labels")):
        if edits := pool(controls.edits, name):
            rates.append(f"{plural} {', '.join(f'{100 * edit.dose.rate.value:.0f} %' for edit in edits)}")
    at = f"At a KL of {format_number(controls.kl)} nats {report.behavior} is left on: {'; '.join(rates)}"
    if p <= LEVEL:
        return f"{at}. The found direction removes more than any control (p = {p:.2g})."
    return f"{at}. This does not tell the found direction from the controls (p = {p:.2g}), so nothing is claimed of it."


# --------------------------------------------------------------------------- directions, blocks, examples
def describe_directions(report: AuditReport) -> str:
    """Return how many directions a layer it takes to come down to one in twenty, and what more of them cost."""
    if len(report.directions) < 2:
        return ""
    assert report.unedited is not None, "asked for only with the behavior"
    half, most = (
        {k: summarize_cost(curve, report.unedited, goal) for k, curve in report.directions.items()}
        for goal in (HALF, TWENTIETH)
    )
    one = next(iter(half))
    ratios = [f"with {count_directions(k)} {describe_ratio(report.ratios.get(k), half[k])}" for k in half if k != one]
    costs = f"Cost to one half with {count_directions(one)}: {format_cost(half[one])} nats; {'; '.join(ratios)}."
    return f"{compare_directions(report, one, [k for k, cost in most.items() if cost.reached])} {costs}"


def compare_directions(report: AuditReport, one: str, reached: Sequence[str]) -> str:
    """Return whether the first number of directions is enough. reached: the numbers that come to one in twenty."""
    if one not in reached:
        others = f"with {' and with '.join(reached)} it is" if reached else "nor is it with more"
        return f"With {count_directions(one)} a layer one in twenty is not reached, {others}."
    cheaper = [k for k, ratio in report.ratios.items() if ratio is not None and ratio.high < 1]
    if cheaper:
        return f"{count_directions(cheaper[0]).capitalize()} a layer carry more of it than {one}."
    return f"{count_directions(one).capitalize()} a layer is enough: more make removal no cheaper."


def describe_ratio(ratio: Score | None, cost: RemovalCost) -> str:
    """Return the cost relative to one direction's, or by itself where that is no number."""
    return f"× {format_interval(ratio)}" if ratio is not None else f"{format_cost(cost)} nats"


def count_directions(k: str) -> str:
    """Return ``one direction`` or ``2 directions``."""
    return "one direction" if k == "1" else f"{k} directions"


def classify(edit: Matched, unedited: Score) -> str:
    """Return whether an edit ends most of the behavior: ``ends``, ``leaves``, or ``unclear`` within the interval."""
    rate, half = edit.dose.rate, HALF * unedited.value
    return "ends" if rate.high <= half else "leaves" if rate.low > half else "unclear"


def describe_blocks(report: AuditReport) -> str:
    """Return which blocks, edited alone, end most of the behavior."""
    if report.blocks is None or report.unedited is None:
        return ""
    classes: dict[str, list[str]] = {"ends": [], "leaves": [], "unclear": []}
    for edit in report.blocks.edits:
        classes[classify(edit, report.unedited.rate)].append(edit.name)
    at = f"at {ROOM:g} times the cost of removal ({format_number(report.blocks.kl)} nats)"
    if not classes["ends"]:
        return f"No part of the depth, edited alone {at}, ends most of it beyond doubt."
    said = f"Edited alone {at}, blocks {', '.join(classes['ends'])} end most of it"
    left = f"; blocks {', '.join(classes['leaves'])} do not" if classes["leaves"] else ""
    unclear = f"; {', '.join(classes['unclear'])} cannot be told" if classes["unclear"] else ""
    return f"{said}{left}{unclear}."


def describe_examples(report: AuditReport) -> str:
    """Return how few example prompts are enough to find an edit that ends most of the behavior."""
    if report.examples is None or report.unedited is None:
        return ""
    edits = report.examples.edits
    at = f"at a KL of {format_number(report.examples.kl)} nats"
    enough = None
    for edit in reversed(edits):
        if classify(edit, report.unedited.rate) != "ends":
            break
        enough = edit
    if enough is None:
        most = edits[-1].name if edits else "the given"
        return f"Even {most} prompts of each group are not enough, beyond doubt, to end most of it {at}."
    return (
        f"{enough.name} prompts of each group are enough to end most of it {at}: "
        f"{format_percent(enough.dose.rate)} is left."
    )


def describe_repair(report: AuditReport) -> str:
    """Return how much later blocks write back."""
    if report.repair is None:
        return ""
    return f"{report.repair.summary[0].upper()}{report.repair.summary[1:]}."


# ------------------------------------------------------------------------------------- asked otherwise
def describe_rewordings(report: AuditReport) -> str:
    """Return in which wordings the behavior returns after its removal."""
    if report.rewordings is None:
        return ""
    asked, returns = report.rewordings.asked, find_returns(report.rewordings.asked)
    first = format_percent(asked[0].rates[1])
    if not returns:
        return (
            f"Nowhere beyond chance: after the removal {first} is left in the prompts' own words, and none of "
            f"{len(asked) - 1} other wordings has more (level {LEVEL:g} over all)."
        )
    by_name = {one.name: one for one in asked}
    listed = "; ".join(f"{name} {format_percent(by_name[name].rates[1])}, p = {p:.2g}" for name, p in returns.items())
    return f"After the removal {first} is left in the prompts' own words, and more in: {listed}."


def describe_benign(report: AuditReport) -> str:
    """Return how many benign prompts show the behavior before and after."""
    if report.benign is None:
        return ""
    (one,) = report.benign.asked
    before, after = one.rates
    change = paired_share_change(torch.tensor(one.after, dtype=torch.float64), torch.tensor(one.before).double())
    ends = f"{100 * change.low:+.0f} to {100 * change.high:+.0f}".replace("-", "−")
    return f"On benign prompts {format_percent(before)} before and {format_percent(after)} after ({ends} points)."


def list_claims(report: AuditReport) -> dict[str, str]:
    """Return all sentences by what they are about; those of measurements that were not made are left out."""
    if not report.shows_behavior:
        return {}
    said = {
        "cost": describe_costs(report),
        "seeds": describe_seeds(report),
        "controls": describe_controls(report),
        "directions": describe_directions(report),
        "blocks": describe_blocks(report),
        "repair": describe_repair(report),
        "examples": describe_examples(report),
        "rewordings": describe_rewordings(report),
        "benign": describe_benign(report),
    }
    return {name: text for name, text in said.items() if text}
