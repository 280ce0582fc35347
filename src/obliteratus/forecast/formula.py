"""What a recipe costs, derived from its steps: the formula, the cost class and the memory class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

from obliteratus.analyze import analyses
from obliteratus.causal import extractors
from obliteratus.core.cost import FREE, Answers, Cost, Training, Values, prompt_count
from obliteratus.core.pareto import MAX_CHECKED
from obliteratus.core.registry import Registry
from obliteratus.core.settings import Recipe, Search, Step, Tune, active_steps
from obliteratus.excise import kl_budget, router_limit
from obliteratus.pipeline.stages import CHECK_PROMPTS, CHECK_TOKENS
from obliteratus.probe.contrasts import PROMPTS
from obliteratus.tune.fit import CHECK_EVERY, HELD_OUT_PROMPTS, SCALES
from obliteratus.tune.search_check import CHECKED_PROMPTS
from obliteratus.tune.targets import OPENING_LENGTHS
from obliteratus.tune.weakest import MOST_LOOKS
from obliteratus.verify import scorers
from obliteratus.verify.behavior import behavior_tokens
from obliteratus.verify.presence import MOST_ANSWERED

# Prompt and layer counts that the classes and docs/runtimes.md are computed with: close to the organism's own.
REFERENCE: Values = {
    "N_fit": 512,
    "N_fit,target": 256,
    "N_fit,control": 256,
    "N_search": 256,
    "N_search,target": 112,
    "N_search,control": 144,
    "N_report": 160,
    "N_report,target": 64,
    "N_report,control": 96,
    "N_texts": 16,
    "L": 32,
}
# Tokens of a prompt beyond the shared prefix, of that prefix (run once, but in every gradient step), and of a text.
OWN, SHARED, TEXT = 40, 24, 80
# Work relative to the answers before the edit, one PROBE and two VERIFYs, which every run needs. A quarter more is not
# noticed; more than four times as much turns a run of minutes into one of an hour.
CLASSES = {"low": 1.25, "moderate": 4.0}


def _bisection_cost(steps: int) -> Cost:
    """Return the cost of first tokens unedited, with the whole edit, and at each bisection step."""
    return Cost(prompt_count("search", "control", kl_budget.CHECK_PROMPTS) * (2 + steps))


# What an option of [excise] costs in each pass, whatever its value.
EXCISE_COSTS = {"kl_budget": _bisection_cost(kl_budget.BISECTION_STEPS)}
ROUTER_COST = _bisection_cost(router_limit.BISECTION_STEPS)


def stage_costs(recipe: Recipe) -> dict[str, Cost]:
    """Return the most that each stage of a run asks of the model; stages that ask nothing are left out."""
    check = Cost(answers=(Answers(CHECK_TOKENS, prompt_count("search", "target", CHECK_PROMPTS)),))
    tokens = behavior_tokens(recipe.verify)
    on_search = Answers(tokens, prompt_count("search", "target", CHECK_PROMPTS))
    costs = {
        "ANSWERS": _screening_cost(recipe),
        "PROBE": _probe_cost(recipe) * recipe.passes,
        "ANALYZE": _add_steps(analyses, recipe.analyze),
        "DISTILL": _add_steps(extractors, recipe.distill) * recipe.passes,
        "EXCISE": _excise_cost(recipe) * recipe.passes,
        "CHECK": check * (recipe.passes - 1),
        "TUNE": _tune_cost(recipe.tune) if recipe.tune else FREE,
        "SEARCH": _search_cost(recipe.search, recipe.verify) if recipe.search else FREE,
        "VERIFY search prompts": Cost(answers=(on_search,)) if recipe.uses_search_split else FREE,
        "VERIFY": _add_steps(scorers, recipe.verify) * 2,  # before and after
    }
    return {name: cost for name, cost in costs.items() if cost}


def _screening_cost(recipe: Recipe) -> Cost:
    """Return the cost of answering fit prompts before the edit."""
    target, control = (prompt_count("fit", group, MOST_ANSWERED) for group in ("target", "control"))
    return Cost(answers=(Answers(behavior_tokens(recipe.verify), target + control),))


def _add_steps(registry: Registry[Any], steps: Sequence[Step]) -> Cost:
    total, earlier = FREE, set()
    for step in active_steps(steps):
        cost = registry[step.use].cost(registry.check(step.use, step.options))
        if cost.free_after not in earlier:
            total += cost
        earlier.add(step.use)
    return total


def _excise_cost(recipe: Recipe) -> Cost:
    options = set(recipe.excise.model_dump(exclude_defaults=True))
    if recipe.analyze:  # measurements may set a KL budget
        options.add("kl_budget")
    costs = [cost for name, cost in EXCISE_COSTS.items() if name in options]
    return reduce(add, costs, ROUTER_COST if "router" in recipe.excise.parts else FREE)


def _search_cost(search: Search, verify: Sequence[Step]) -> Cost:
    """Return the cost if every trial answers all target prompts, and the most plans of the front are checked."""
    target, control = (prompt_count("search", group, search.prompts) for group in ("target", "control"))
    trial = Cost(target + control, (Answers(search.tokens, target),))
    measured = _add_steps(scorers, verify)
    here = {"N_report": target + control, "N_report,target": target, "N_report,control": control}
    check = Cost(
        answers=tuple(replace(a, prompts=a.prompts.substitute(here)) for a in measured.answers),
        texts=measured.texts.substitute(here),
    )
    return trial * search.trials + check * (1 + MAX_CHECKED)  # 1: the unedited model


def _tune_cost(tune: Tune) -> Cost:
    """Return the cost if no answer and no gradient step is left out.

    Target prompts are answered briefly under two plans. Each of these openings, cut to every length, is then
    continued for as long as the model refuses.
    """
    groups = ("target", "control")
    held_out = [prompt_count("search", group, HELD_OUT_PROMPTS) for group in groups]
    target, control = (prompt_count("fit", g, tune.prompts) + n for g, n in zip(groups, held_out, strict=True))
    looks = 2 + -(-tune.steps // CHECK_EVERY) + len(SCALES)  # at the unedited model, the start, and while fitting
    looks = max(looks, 1 + MOST_LOOKS)  # without steps: at the unedited model and other strengths
    passes = looks * (held_out[0] + held_out[1] + prompt_count("search", "control", CHECKED_PROMPTS["control"]))
    openings = Answers(OPENING_LENGTHS[-1], target, times=2)
    continued = Answers(tune.tokens, target, times=2 * len(OPENING_LENGTHS))
    watched = Answers(max(0, tune.watch - tune.tokens), target)
    judged = Answers(max(tune.watch, tune.tokens), prompt_count("search", "target", CHECKED_PROMPTS["target"]), looks)
    answers = (Answers(tune.tokens, control), openings, continued, watched, judged)
    balance = Training(1, 2 * tune.prompts, tune.tokens)
    steps = Training(tune.steps, 2 * tune.batch, tune.tokens)
    return Cost(passes, answers, training=(steps, balance) if tune.balance else (steps,))


def total_cost(recipe: Recipe) -> Cost:
    """Return the cost of all stages together."""
    return reduce(add, stage_costs(recipe).values(), FREE)


def format_formula(recipe: Recipe) -> str:
    """Return the total as text, such as ``2·N_fit forwards + …``, after ≤ if the run may stop earlier."""
    total = total_cost(recipe)
    may_stop = recipe.passes > 1 or recipe.search is not None or bool(total.training)
    return ("≤ " if may_stop else "") + str(total)


def count_tokens(cost: Cost) -> float:
    """Return the tokens that pass through the model at `REFERENCE`; a token with gradients counts twice."""
    count = OWN * cost.forwards.evaluate(REFERENCE) + TEXT * cost.texts.evaluate(REFERENCE)
    count += sum((OWN + a.tokens) * a.times * a.prompts.evaluate(REFERENCE) for a in cost.answers)
    return count + sum(2 * t.steps * t.prompts * (SHARED + OWN + t.tokens) for t in cost.training)


def _probe_cost(recipe: Recipe) -> Cost:
    """Return the cost of PROBE: all fit prompts, and some of either group again for contrasts."""
    every = Cost(prompt_count("fit"))
    again = [Cost(prompt_count("fit", group, PROMPTS)) for group in ("target", "control")]
    return sum(again, every) if recipe.excise.least_change else every


def relative_effort(recipe: Recipe) -> float:
    """Return the work at `REFERENCE` relative to the answers before the edit, one PROBE and the two VERIFYs."""
    least = Cost(prompt_count("fit")) + _screening_cost(recipe) + stage_costs(recipe)["VERIFY"]
    return count_tokens(total_cost(recipe)) / count_tokens(least)


def cost_class(recipe: Recipe) -> str:
    """Return ``low``, ``moderate`` or ``high``, as `CLASSES` defines them."""
    return next((name for name, limit in CLASSES.items() if relative_effort(recipe) <= limit), "high")


def memory_class(recipe: Recipe) -> tuple[str, str]:
    """Return what takes most memory beside the model (means, sketch, rows or gradients), and its size as a formula."""
    training = total_cost(recipe).training
    if training:
        largest = max(training, key=lambda t: t.prompts * t.tokens)
        return "gradients", f"O({largest.prompts}·tokens·L·H)"
    return {
        "rows": ("rows", "O(N_fit·L·H)"),
        "sketch": ("sketch", f"O({recipe.probe.sketch}·L·H)"),
        "moments": ("means", "O(L·H)"),
    }[recipe.probe.keep]


def describe_cost(recipe: Recipe) -> dict[str, Any]:
    """Return everything that is known of a recipe's cost as plain data."""
    kind, size = memory_class(recipe)
    return {
        "formula": format_formula(recipe),
        "stages": {name: str(cost) for name, cost in stage_costs(recipe).items()},
        "class": cost_class(recipe),
        "effort": round(relative_effort(recipe), 2),
        "memory": {"class": kind, "formula": size},
    }
