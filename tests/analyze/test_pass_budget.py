"""Forward passes: what is estimated is what analyses ask, and a budget takes in the cheapest."""

from __future__ import annotations

import itertools

import pytest
from tests.support.contexts import stars_and_dishes
from tests.support.tiny import tiny_subject

from obliteratus.analyze.pass_budget import estimate_passes, formula_values, split_by_budget
from obliteratus.analyze.run import run_analysis, select_analyses
from obliteratus.core.cost import FREE, Answers, Cost, Training, Values, constant, prompt_count
from obliteratus.core.progress import Reporter, report_to
from obliteratus.prompts import split_prompts


def values(n: int = 24, seed: int = 0) -> Values:
    fit, held, _ = split_prompts(stars_and_dishes(n), seed, force=True)
    return formula_values(fit, held, tiny_subject("llama").n_layers)


class Notes(Reporter):
    """Everything that was told, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, title: str, text: str) -> None:
        self.told.append(f"{title}: {text}")


def test_estimates_are_the_formulas_with_this_model_and_these_prompts() -> None:
    fit, held, _ = split_prompts(stars_and_dishes(), 0, force=True)
    n, layers = {g: (len(fit[g]), len(held[g])) for g in fit.groups}, tiny_subject("llama").n_layers
    passes = estimate_passes(select_analyses(["geometry", "decomposition", "positions", "entanglement"]), values())
    assert passes == {
        "decomposition": n["target"][1] + n["control"][1],
        "entanglement": min(8, n["control"][1]) * (1 + 20 * layers),
        "geometry": 0,
        "positions": n["target"][1] + n["control"][1],
    }


def test_a_cost_counts_answers_and_gradient_steps_as_passes() -> None:
    cost = Cost(prompt_count("fit"), (Answers(5, constant(3), 2),), constant(4), (Training(10, 2, 7),))
    assert cost.count_passes({"N_fit": 100}) == 100 + 6 * 3 * 2 + 4 + 2 * 10 * 2
    assert FREE.count_passes({}) == 0


@pytest.mark.parametrize("name", ["decomposition", "entanglement", "patching", "positions", "repair", "tuned_lens"])
def test_an_estimate_is_what_an_analysis_asks(name: str) -> None:
    """Counted where the model is entered. Of few and short prompts, the prefix that they share, which is passed by
    itself, and checks that it may be shared are up to half as much again; what early stops save is up to half."""
    subject, passed = tiny_subject("llama"), []
    subject.model.base_model.register_forward_pre_hook(
        lambda m, a, k: passed.append(k["input_ids"].shape[0]), with_kwargs=True
    )
    total = values()["N_fit"] + estimate_passes(select_analyses([name]), values())[name]
    run_analysis(subject, stars_and_dishes(), select_analyses([name]))
    assert 0.5 * total <= sum(passed) <= 1.5 * total


def test_everything_is_told_before_anything_runs() -> None:
    notes = Notes()
    with report_to(notes):
        run_analysis(
            tiny_subject("llama"), stars_and_dishes(), select_analyses(["geometry", "positions", "tuned_lens"])
        )
    probe, *each, free, total = [line for line in notes.told if line.startswith("cost")]
    passes, shared = (
        estimate_passes(select_analyses(["geometry", "positions", "tuned_lens"]), values()),
        values()["N_fit"],
    )
    assert probe == f"cost: probe: {shared} forward passes"
    assert each == [f"cost: {name}: at most {passes[name]}" for name in ("positions", "tuned_lens")]
    assert free == "cost: none more for geometry"
    together = shared + sum(passes.values())
    assert total == f"cost: together at most {together} forward passes of one prompt each"
    assert next(line for line in notes.told if not line.startswith("prompts")) == probe
    assert not any("N_" in line or "·" in line for line in notes.told)


def test_a_budget_takes_in_the_cheapest_and_tells_what_it_leaves() -> None:
    passes = {"a": 30, "b": 0, "c": 10, "d": 25}
    chosen = {budget: split_by_budget(passes, budget)[0] for budget in (0, 10, 64, 65)}
    assert chosen == {0: ["b"], 10: ["b", "c"], 64: ["b", "c", "d"], 65: ["a", "b", "c", "d"]}  # their order stays
    assert split_by_budget(passes, 40)[1] == {"a": "needs up to 30 forward passes, and 5 of the budget of 40 are left"}
    assert split_by_budget(passes, 65)[1] == {}


def test_more_budget_never_runs_fewer() -> None:
    passes = estimate_passes(select_analyses([]), values())
    kept = [set(split_by_budget(passes, n)[0]) for n in range(0, sum(passes.values()) + 50, 50)]
    assert all(one <= two for one, two in itertools.pairwise(kept))
    assert kept[0] == {name for name, count in passes.items() if not count}
    assert kept[-1] == set(passes)
