"""Costs are derived from the steps, and are what a run really asks of the model: counted on tiny ones."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from contextlib import AbstractContextManager, nullcontext

import pytest
from rich.console import ConsoleDimensions
from tests.support.tiny import tiny_subject
from typer.testing import CliRunner

from obliteratus.causal.rdo import HELD_OUT_PROMPTS
from obliteratus.cli.app import app
from obliteratus.cli.terminal import results
from obliteratus.core.cost import FREE, Amount, Answers, Cost, Training, constant, prompt_count, variable
from obliteratus.core.progress import Advance, Reporter, report_to
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Prompt, PromptSet
from obliteratus.distill import extractors
from obliteratus.distill.steps import MODEL
from obliteratus.forecast import formula as costs
from obliteratus.forecast.costs import annotate_recipe, read_method
from obliteratus.forecast.formula import (
    CLASSES,
    cost_class,
    describe_cost,
    format_formula,
    memory_class,
    relative_effort,
    stage_costs,
    total_cost,
)
from obliteratus.pipeline.presets import list_methods
from obliteratus.pipeline.recipe import load_recipe, parse_recipe
from obliteratus.pipeline.run import run
from obliteratus.verify import scorers

SMALL = {"use": "behavior", "tokens": 4}


# --------------------------------------------------------------------------------------------- formulas
def test_a_variable_is_replaced_by_an_amount() -> None:
    found = (3 * prompt_count("report") + prompt_count("report", "control", 48) + variable("N_texts")).substitute(
        {
            "N_report": prompt_count("search", cap=96) + constant(2),
            "N_report,control": prompt_count("search", "control"),
        }
    )
    assert str(found) == "3·min(N_search, 96) + 6 + N_search,control + N_texts"


def test_an_amount_is_its_formula() -> None:
    found = (2 * prompt_count("fit") + constant(3)) * variable("L") + prompt_count("search", "target", 48) * 6
    assert str(found) == "2·L·N_fit + 3·L + 6·min(N_search,target, 48)"
    for n in (10, 100):
        values = {"N_fit": 7, "L": 5, "N_search,target": n}
        assert found.evaluate(values) == (2 * 7 + 3) * 5 + 6 * min(n, 48)
    with pytest.raises(KeyError):
        found.evaluate({"L": 5})
    assert not Amount()
    assert not prompt_count("fit") * 0


def test_costs_add_and_repeat() -> None:
    one = Cost(prompt_count("fit"), (Answers(48, prompt_count("report")),), training=(Training(200, 24, 16),))
    two = Cost(
        prompt_count("fit"), (Answers(16, prompt_count("search") + prompt_count("fit"), 3),), texts=variable("N_texts")
    )
    assert str((one + two) * 2) == (
        "4·N_fit forwards + 2·N_report × 48 tokens + (6·N_search + 6·N_fit) × 16 tokens"
        " + 400 gradient steps × 24 prompts + 2·N_texts texts"
    )
    assert one + FREE == one
    assert one
    assert not one * 0
    assert str(FREE) == "nothing"


def test_the_formulas_of_two_methods() -> None:
    read = "2·min(N_report,control, 32) + 2·N_texts + 6·min(N_report,target, 24) + 6·min(N_report,control, 24)"
    screened = "(min(N_fit,target, 128) + min(N_fit,control, 128)) × 48 tokens"
    verify = f"2·N_report × 48 tokens + ({read}) texts"
    assert format_formula(load_recipe("basic")) == f"N_fit forwards + {screened} + {verify}"
    several = f"≤ 3·N_fit forwards + {screened} + 2·min(N_search,target, 48) × 16 tokens"
    assert format_formula(load_recipe("whitened")) == f"{several} + {verify}"


def test_the_first_tokens_are_free_only_after_the_answers() -> None:
    alone = load_recipe("basic", {"verify": [{"use": "first_token_kl"}]})
    assert str(stage_costs(alone)["VERIFY"]) == "2·N_report,control forwards"
    behind = load_recipe("basic", {"verify": [SMALL, {"use": "first_token_kl"}]})
    assert str(stage_costs(behind)["VERIFY"]) == "2·N_report × 4 tokens"
    wrong = load_recipe("basic", {"verify": [{"use": "first_token_kl"}, SMALL]})
    assert "forwards" in str(stage_costs(wrong)["VERIFY"])


def test_steps_that_ask_the_model_say_what_and_others_nothing() -> None:
    for name in extractors:
        assert bool(extractors[name].cost(extractors.check(name, {}))) == (MODEL in extractors[name].needs), name
    assert {name for name in scorers if not scorers[name].cost(scorers.check(name, {}))} == {"style"}


def test_an_option_of_excise_can_cost_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `kl_budget` and its like need: one entry in a table."""
    monkeypatch.setitem(costs.EXCISE_COSTS, "heads", Cost(6 * prompt_count("search", "control", 48)))
    assert str(stage_costs(load_recipe("lean"))["EXCISE"]) == "12·min(N_search,control, 48) forwards"  # two passes
    assert "EXCISE" not in stage_costs(load_recipe("basic"))


# ------------------------------------------------------------------------------------- against real runs
class Counting(Reporter):
    """Counts the work that each bar announces, by the stage in its title."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def bar(self, title: str, total: int) -> AbstractContextManager[Advance]:
        self.seen[title] += total
        return nullcontext(lambda done: None)


def counted(made: Recipe) -> tuple[Counter[str], dict[str, int | float]]:
    """What a run on a tiny model did, and the numbers of prompts that it had."""
    prompts = PromptSet(
        {
            "target": tuple(
                Prompt(f"Tell me of boat {i}.", split=s) for i, s in enumerate(["fit"] * 9 + ["report"] * 4)
            ),
            "control": tuple(
                Prompt(f"What is {i} plus {i}?", split=s) for i, s in enumerate(["fit"] * 8 + ["report"] * 5)
            ),
        }
    )  # without search prompts no pass is checked, and none is left out
    counting = Counting()
    with report_to(counting):
        run(made, tiny_subject("llama"), prompts, force=True)
    values = {"N_fit": 17, "N_fit,target": 9, "N_fit,control": 8, "N_report": 9, "N_report,control": 5, "N_texts": 16}
    return counting.seen, {**values, "N_report,target": 4, "N_search,target": 0}


@pytest.mark.parametrize(
    ("name", "passes"), [("basic", 1), ("two_directions", 1), ("lean", 2), ("spectral_cascade", 3)]
)
def test_a_run_does_what_its_formula_says(name: str, passes: int) -> None:
    made = load_recipe(name, {"passes": passes, "excise.strength": 0.05, "verify": [SMALL, {"use": "perplexity"}]})
    seen, values = counted(made)
    cost = total_cost(made)
    assert (
        sum(n for title, n in seen.items() if title.startswith("PROBE"))
        == cost.forwards.evaluate(values)
        == 17 * passes
    )
    assert (
        seen["VERIFY answers"] + seen["ANSWERS"]
        == sum(a.tokens * a.times * a.prompts.evaluate(values) for a in cost.answers)
        == (2 * 9 + 17) * 4
    )
    assert seen["VERIFY perplexity"] == cost.texts.evaluate(values) == 32


def test_first_tokens_are_counted_where_nothing_is_shared() -> None:
    made = load_recipe("basic", {"verify": [{"use": "first_token_kl"}]})
    seen, values = counted(made)
    assert seen["VERIFY first tokens"] == stage_costs(made)["VERIFY"].forwards.evaluate(values) == 10
    assert counted(load_recipe("basic", {"verify": [SMALL, {"use": "first_token_kl"}]}))[0]["VERIFY first tokens"] == 0


@pytest.mark.parametrize(
    ("name", "passes"), [("fluency", 2 * (2 + 2)), ("relevance", 4 * (2 + 2)), ("continuation_kl", 2 * 2), ("style", 0)]
)
def test_scorers_of_answers_read_them_as_often_as_they_say(name: str, passes: int) -> None:
    """Fluency and relevance read answers before and after the edit; the drift reads the base's own in both models."""
    step = {"use": name, "prompts": 2} if name != "style" else {"use": name}
    made = load_recipe("basic", {"verify": [SMALL, step]})
    seen, values = counted(made)
    titles = ("VERIFY fluency", "VERIFY relevance", "VERIFY continuations")
    read = sum(n for title, n in seen.items() if title in titles)
    assert stage_costs(made)["VERIFY"].texts.evaluate(values) == passes
    # Answers that show the behavior or loop, as some of this model's do, have no relevance that could be read.
    assert 0 < read < passes if name == "relevance" else read == passes
    assert seen["VERIFY answers"] == 2 * 9 * 4  # nothing more is generated


def test_rdo_does_what_its_formula_says() -> None:
    rdo = {"use": "rdo", "steps": 2, "tokens": 4, "batch": 3}
    made = load_recipe("rdo", {"distill": [{"use": "mean_diff"}, rdo], "verify": [SMALL]})
    seen, values = counted(made)
    asked = stage_costs(made)["DISTILL"]
    wrote = seen["rdo answers"] + seen["rdo refusals"] + seen["rdo own answers"]
    assert wrote == sum(a.tokens * a.times * a.prompts.evaluate(values) for a in asked.answers) == (9 + 2 * 8) * 4
    assert asked.training == (Training(seen["DISTILL rdo"], 9, 4),)
    assert asked.forwards.evaluate(values) == 3 * HELD_OUT_PROMPTS * 2 + 8  # at most: two looks, and own answers once


# ----------------------------------------------------------------------------------------------- classes
def test_the_classes_follow_the_work() -> None:
    assert relative_effort(load_recipe("basic")) == 1.0
    by_passes = [cost_class(load_recipe("basic", {"passes": n})) for n in (1, 4, 8)]
    assert by_passes == ["low", "moderate", "moderate"]
    assert cost_class(load_recipe("leace_search")) == "high"
    assert [cost_class(load_recipe(n)) for n in ("rdo", "heretic", "two_directions")] == ["high", "high", "low"]
    for name in list_methods():
        work, limits = relative_effort(load_recipe(name)), list(CLASSES.values())
        assert cost_class(load_recipe(name)) == ["low", "moderate", "high"][sum(work > limit for limit in limits)]


def test_memory_follows_from_what_is_kept() -> None:
    assert memory_class(load_recipe("basic")) == ("means", "O(L·H)")
    assert memory_class(load_recipe("basic", {"probe.keep": "rows"})) == ("rows", "O(N_fit·L·H)")
    assert memory_class(load_recipe("rdo", {"distill.1.batch": 5})) == ("gradients", "O(15·tokens·L·H)")


@pytest.mark.parametrize("name", list_methods())
def test_every_method_states_its_cost(name: str) -> None:
    found = describe_cost(load_recipe(name))
    assert {"PROBE", "VERIFY"} <= set(found["stages"])
    assert "N_fit" in found["formula"]
    assert "N_report × 48 tokens" in found["formula"].replace(")", "")
    assert read_method(name) == (load_recipe(name), found)
    again = parse_recipe(tomllib.loads(annotate_recipe(read_method(name))), name)
    assert again == load_recipe(name)  # comments do not make it another


# ------------------------------------------------------------------------------------------ command line
def call(*arguments: str) -> str:
    usual, results.size = results.size, ConsoleDimensions(600, 50)  # COLUMNS is read once, by whoever imports it first
    try:
        result = CliRunner().invoke(app, list(arguments))
    finally:
        results.size = usual
    assert result.exit_code == 0, result.output
    return result.stdout


def test_methods_lists_costs() -> None:
    listed = call("methods")
    assert all(word in listed for word in ("cost", "low", "moderate", "high"))
    shown = call("methods", "rdo")
    assert shown.startswith("# rdo: ≤ ")
    assert "# cost high, memory gradients" in shown
    document = json.loads(call("methods", "--json"))
    assert set(document) == set(list_methods())
    assert document["basic"]["cost"] == describe_cost(load_recipe("basic"))
    assert "ANALYZE" in document["informed"]["cost"]["stages"]
