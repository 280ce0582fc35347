"""What a recipe costs, derived from its steps: a formula, a class, what memory it keeps. No number is written twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

from obliteratus.analyze import analyses
from obliteratus.causal import extractors
from obliteratus.core.cost import FREE, Answers, Cost, Training, Values, n_of
from obliteratus.core.registry import Registry
from obliteratus.core.settings import Excise, Recipe, Step
from obliteratus.excise.kl_budget import PROMPTS, STEPS
from obliteratus.excise.router_limit import STEPS as TRIED
from obliteratus.pipeline.recipe import dump_toml
from obliteratus.pipeline.run import CHECK_TOKENS, CHECKED
from obliteratus.search.run import CHECKED as MEMBERS
from obliteratus.tune.fit import EVERY, HELD
from obliteratus.tune.targets import OPENINGS
from obliteratus.verify import scorers

# What the classes, and the forecasts in docs/runtimes.md, are reckoned with: the organism's prompts to within a few.
REFERENCE: Values = {
    "N_fit": 512,
    "N_fit,target": 256,
    "N_fit,control": 256,
    "N_search": 256,
    "N_search,target": 112,
    "N_search,control": 144,
    "N_report": 160,
    "N_report,control": 96,
    "N_texts": 16,
    "L": 32,
}
# Tokens: a prompt's own, those that all prompts share (passed once, but with gradients each time), and a text's.
OWN, SHARED, TEXT = 40, 24, 80
# Work over that of one PROBE and the two VERIFYs, without which there is no run: up to a quarter more is not felt,
# and beyond four times a run of minutes is one of an hour.
CLASSES = {"low": 1.25, "moderate": 4.0}

# Options of [excise] that ask the model: what one pass with each costs, whatever its value.
EXCISE: dict[str, Cost] = {
    "kl_budget": Cost(n_of("search", "control", PROMPTS) * (2 + STEPS)),  # unedited, whole, and each bisection
}
ROUTERS = Cost(n_of("search", "control", PROMPTS) * (2 + TRIED))  # as they were, whole, and each bisection


def stage_costs(made: Recipe) -> dict[str, Cost]:
    """The most that each stage asks of the model in a whole run."""
    found = {
        "PROBE": Cost(n_of("fit")) * made.passes,
        "ANALYZE": _steps(analyses, made.analyze),
        "DISTILL": _steps(extractors, made.distill) * made.passes,
        "EXCISE": _excise(made.excise, bool(made.analyze)) * made.passes,
        "CHECK": Cost(answers=(Answers(CHECK_TOKENS, n_of("search", "target", CHECKED)),)) * (made.passes - 1),
        "TUNE": _tune(made),
        "SEARCH": _search(made),
        "VERIFY": _steps(scorers, made.verify) * 2,  # before and after
    }
    return {name: cost for name, cost in found.items() if cost}


def _steps(registry: Registry[Any], steps: Sequence[Step]) -> Cost:
    total, earlier = FREE, set()
    for step in steps:
        cost = registry[step.use].cost(registry.check(step.use, step.options))
        if cost.free_after not in earlier:
            total += cost
        earlier.add(step.use)
    return total


def _excise(excise: Excise, advised: bool) -> Cost:
    """advised: whether measurements may set a KL budget."""
    chosen = {*excise.model_dump(exclude_defaults=True), *(["kl_budget"] if advised else [])}
    routers = ROUTERS if "router" in excise.parts else FREE
    return reduce(add, (cost for name, cost in EXCISE.items() if name in chosen), routers)


def _search(made: Recipe) -> Cost:
    """First tokens for every trial, and the most: answers to target prompts for each, the longer check for ten."""
    if made.search is None:
        return FREE
    target, control = (n_of("search", group, made.search.prompts) for group in ("target", "control"))
    trial = Cost(target + control, (Answers(made.search.tokens, target),))
    longer = tuple(
        replace(a, prompts=target + control) for step in made.verify for a in _steps(scorers, [step]).answers
    )
    return trial * made.search.trials + Cost(answers=longer) * (1 + MEMBERS)  # and the unedited model


def _tune(made: Recipe) -> Cost:
    """The most answers and gradient steps; a look at search prompts every few of them.

    Target prompts are opened under two plans, and their answers gone on with from each length of opening, as long as
    they refuse.
    """
    how = made.tune
    if how is None:
        return FREE
    steps, held = how.steps * len(how.leads), n_of("search", "target", HELD) + n_of("search", "control", HELD)
    looks = held * (len(how.leads) + -(-steps // EVERY))
    target, control = (n_of("fit", g, how.prompts) + n_of("search", g, HELD) for g in ("target", "control"))
    begun, led = Answers(OPENINGS[-1], target, times=2), Answers(how.tokens, target, times=2 * len(OPENINGS))
    written = (Answers(how.tokens, control), begun, led)
    return Cost(looks, written, training=(Training(steps, 2 * how.batch, how.tokens),))


def total_cost(made: Recipe) -> Cost:
    """All stages together."""
    return reduce(add, stage_costs(made).values(), FREE)


def format_formula(made: Recipe) -> str:
    """For people: 2·N_fit forwards + …, behind ≤ where a run may stop earlier."""
    early = made.passes > 1 or made.search is not None or bool(total_cost(made).training)
    return ("≤ " if early else "") + str(total_cost(made))


def count_tokens(cost: Cost, values: Values = REFERENCE) -> float:
    """Tokens that pass through the model; one with gradients counts twice, for the way back."""
    count = OWN * cost.forwards.of(values) + TEXT * cost.texts.of(values)
    count += sum((OWN + a.tokens) * a.times * a.prompts.of(values) for a in cost.answers)
    return count + sum(2 * t.steps * t.prompts * (SHARED + OWN + t.tokens) for t in cost.training)


def relative_effort(made: Recipe) -> float:
    """Work at the reference, over that of one PROBE and two VERIFYs."""
    least = {"PROBE": Cost(n_of("fit")), "VERIFY": stage_costs(made)["VERIFY"]}
    return count_tokens(total_cost(made)) / sum(count_tokens(cost) for cost in least.values())


def cost_class(made: Recipe) -> str:
    """low, moderate or high: see `CLASSES`."""
    return next((name for name, most in CLASSES.items() if relative_effort(made) <= most), "high")


def memory_class(made: Recipe) -> tuple[str, str]:
    """The class (means, sketch, rows or gradients: the largest that is held beside the model) and its formula."""
    training = total_cost(made).training
    if training:
        held = max(training, key=lambda t: t.prompts * t.tokens)
        return "gradients", f"O({held.prompts}·tokens·L·H)"
    return {
        "rows": ("rows", "O(N_fit·L·H)"),
        "sketch": ("sketch", f"O({made.probe.sketch}·L·H)"),
        "moments": ("means", "O(L·H)"),
    }[made.probe.keep]


def describe_cost(made: Recipe) -> dict[str, Any]:
    """All of it as plain data."""
    kind, size = memory_class(made)
    return {
        "formula": format_formula(made),
        "stages": {name: str(cost) for name, cost in stage_costs(made).items()},
        "class": cost_class(made),
        "effort": round(relative_effort(made), 2),
        "memory": {"class": kind, "formula": size},
    }


COLUMNS = ["name", "what it does", "cost", "memory", "source"]


def table_row(made: Recipe) -> list[str]:
    """A line of the table of methods."""
    return [made.name, made.about, cost_class(made), memory_class(made)[0], ", ".join(made.cite)]


def annotate_recipe(made: Recipe) -> str:
    """The recipe as TOML, with what it costs in comments above."""
    kind, size = memory_class(made)
    head = [f"{made.name}: {format_formula(made)}", f"cost {cost_class(made)}, memory {kind}: {size}"]
    return "".join(f"# {line}\n" for line in head) + dump_toml(made)
