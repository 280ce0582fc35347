"""`obliteratus analyze`: one probe, one page, the numbers beside it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from tests.support.tiny import tiny, tiny_subject, tiny_tokenizer
from typer.testing import CliRunner

from obliteratus.analyze import analyses
from obliteratus.analyze.pass_budget import estimate_passes, formula_values, split_by_budget
from obliteratus.analyze.run import analyze_subject, select_analyses
from obliteratus.cli.app import app
from obliteratus.core.cost import FREE, Answers, Cost, Training, Values, constant, prompt_count
from obliteratus.core.errors import UserError
from obliteratus.core.progress import Reporter, report_to
from obliteratus.core.types import Prompt, PromptSet
from obliteratus.report.html import anchor

QUICK = ["geometry", "decomposition", "lens", "certificate"]


def files(folder: Path) -> list[str]:
    """Arguments for two files of prompts."""
    texts = {"target": "Tell me about star {}.", "control": "How do I cook dish {}?"}
    for group, text in texts.items():
        (folder / f"{group}.txt").write_text("\n".join(text.format(i) for i in range(24)))
    return [x for group in texts for x in (f"--{group}", str(folder / f"{group}.txt"))]


def test_the_command_writes_a_page_and_the_numbers(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    asked = ["analyze", str(tmp_path / "model"), *files(tmp_path), "--out", str(tmp_path / "out"), "--quiet"]
    done = CliRunner().invoke(app, [*asked, "--only", ",".join(QUICK), "--json"])
    assert done.exit_code == 0, done.output
    saved = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert saved.keys() == set(QUICK) == json.loads(done.stdout).keys()
    page = (tmp_path / "out" / "index.html").read_text()
    assert all(f'id="{anchor(name)}"' in page for name in QUICK)
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 2
    assert "in use" in again.output


def test_a_name_that_is_none_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["analyze", "nowhere", *files(tmp_path), "--out", str(tmp_path / "out"), "--only", "geometri"]
    )
    assert done.exit_code == 2
    assert "did you mean 'geometry'" in done.output


class Notes(Reporter):
    """Everything that was told, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, title: str, text: str) -> None:
        self.told.append(f"{title}: {text}")


def asked(n: int = 24) -> PromptSet:
    groups = {"target": "Tell me about star {}.", "control": "How do I cook dish {}?"}
    return PromptSet({g: tuple(Prompt(text.format(i)) for i in range(n)) for g, text in groups.items()})


# -------------------------------------------------------------------------------------------- what it costs
def values(n: int = 24, seed: int = 0) -> Values:
    fit, held, _ = asked(n).split(seed)
    return formula_values(fit, held, tiny_subject("llama").n_layers)


def test_estimates_are_the_formulas_with_this_model_and_these_prompts() -> None:
    fit, held, _ = asked().split(0)
    n, layers = {g: (len(fit[g]), len(held[g])) for g in fit.groups}, tiny_subject("llama").n_layers
    passes = estimate_passes(select_analyses(["geometry", "decomposition", "positions", "entanglement"]), values())
    assert passes == {
        "decomposition": n["target"][0] + n["control"][0],
        "entanglement": min(16, n["control"][1]) * (1 + 5 * layers),
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
    analyze_subject(subject, asked(), select_analyses([name]))
    assert 0.5 * total <= sum(passed) <= 1.5 * total


def test_everything_is_told_before_anything_runs() -> None:
    notes = Notes()
    with report_to(notes):
        analyze_subject(tiny_subject("llama"), asked(), select_analyses(["geometry", "positions", "tuned_lens"]))
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
    assert notes.told[0] == probe
    assert not any("N_" in line or "·" in line for line in notes.told)


# ------------------------------------------------------------------------------------------------ a budget
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


def test_the_command_with_a_budget(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model = ["analyze", str(tmp_path / "model"), *files(tmp_path), "--out", str(tmp_path / "out"), "--quiet"]
    done = CliRunner().invoke(app, [*model, "--only", "geometry,repair,positions", "--budget", "40"])
    assert done.exit_code == 0, done.output
    saved = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert saved.keys() == {"geometry", "positions", "skipped"}
    assert saved["skipped"].keys() == {"repair"}
    assert "of the budget of 40 are left" in saved["skipped"]["repair"]
    assert "repair  skipped: needs up to" in done.stdout
    assert saved["skipped"]["repair"] in (tmp_path / "out" / "index.html").read_text()


def test_a_budget_below_nothing_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["analyze", "nowhere", *files(tmp_path), *out, "--budget", "-1"])
    assert done.exit_code == 2
    assert "budget: -1 is below 0; give 0" in done.output
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="budget: -1"):
        analyze_subject(tiny_subject("llama"), asked(), select_analyses(["geometry"]), budget=-1)


# ------------------------------------------------------------------------------------------------ together
def test_all_analyses_share_one_probe() -> None:
    found = analyze_subject(
        tiny_subject("llama"), asked(), select_analyses(["geometry", "separability", "positions"])
    ).findings
    assert list(found) == ["geometry", "positions", "separability"]
    with pytest.raises(UserError, match="has no prompt in the"):
        analyze_subject(tiny_subject("llama"), asked(2), select_analyses(["geometry"]))


def test_all_analyses_of_plain_prompts_but_those_that_need_more() -> None:
    """Asked for by name, an analysis that cannot work is an error; among all, it is left out and says why."""
    assert [step.use for step in select_analyses([])] == list(analyses)
    report = analyze_subject(tiny_subject("llama"), asked(), select_analyses([]), strict=False)
    assert set(report.findings) == set(analyses) - {"cones", "sae"}
    assert "needs at least 2 categories" in report.skipped["cones"]
    assert "too few to train on" in report.skipped["sae"]
    with pytest.raises(UserError, match="needs at least 2 categories"):
        analyze_subject(tiny_subject("llama"), asked(), select_analyses(["cones"]))
