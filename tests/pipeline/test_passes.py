"""run.json, the terminal and the model card say what each pass found, changed, left and cost."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.support.tiny import tiny_subject

from obliteratus.cli import scores, terminal
from obliteratus.core.results import Run
from obliteratus.core.run_folder import Store
from obliteratus.core.types import Plan, Prompt, PromptSet
from obliteratus.excise.kl_budget import limit_kl
from obliteratus.pipeline import run as pipeline
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.pipeline.stages import Stages
from obliteratus.prompts import split_prompts
from obliteratus.rebirth.model_card import make_pass_rows, render_model_card
from obliteratus.summon.coverage import summarize_plan_coverage

SHORT = [{"use": "behavior", "tokens": 4}]


def prompts(search: int = 3) -> PromptSet:
    parts = ["fit"] * 8 + ["search"] * search + ["report"] * 4
    target = tuple(Prompt(f"Tell me of boat {i}.", split=s) for i, s in enumerate(parts))
    control = tuple(Prompt(f"What is {i} plus {i}?", split=s) for i, s in enumerate(parts))
    return PromptSet({"target": target, "control": control})


def made(passes: int, search: int, store: Store | None = None, **changed: Any) -> tuple[Plan, Run]:
    overrides = {"passes": passes, "verify": SHORT, "excise.strength": 0.3, **changed}
    result = run(load_recipe("lean", overrides), tiny_subject("llama"), prompts(search), store, force=True)
    return result.plan, result.run


def test_passes_that_nothing_ends() -> None:
    """Without search prompts nothing is checked, and all passes are done."""
    store = Store()
    plan, found = made(2, 0, store)
    assert len(found.passes) == 2
    first, last = found.passes
    for number, entry in enumerate(found.passes, 1):
        assert entry["seconds"] == {s: store.seconds[f"{s} {number}"] for s in ("PROBE", "DISTILL", "EXCISE")}
        assert entry["remaining"] is None
        assert entry["best_layer"] == entry["best_stream"] - 1
        assert 0 < entry["edited_share"] < 1
    assert "ended" not in first
    assert last["ended"] == "all passes done"
    own = Plan(plan.edits[: first["edits"]], plan.model)
    assert first["edited_share"] == summarize_plan_coverage(tiny_subject("llama"), own)["edited_share"]


def test_a_check_that_ends_the_passes_is_told() -> None:
    """A tiny random model refuses nothing, so the first check finds refusals down."""
    store = Store()
    _, found = made(3, 3, store)
    (only,) = found.passes
    assert only["ended"] == "few enough search prompts show refusal"
    assert (only["remaining"]["value"], only["remaining"]["n"]) == (0.0, 3)
    assert only["seconds"]["CHECK"] == store.seconds["CHECK 2"]


def test_a_pass_that_finds_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stages, "check_rate", lambda *args: None)  # no check ends the passes
    monkeypatch.setattr(pipeline, "NOTHING_LEFT", 1e9)  # and no later pass finds enough
    _, found = made(3, 3)
    (only,) = found.passes
    assert only["ended"] == "nothing left to remove"
    assert only["remaining"] is None


def test_a_budget_that_is_spent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass costs all that is allowed; a second would cost more, and is not an error."""
    monkeypatch.setattr(Stages, "check_rate", lambda *args: None)
    plan, _ = made(1, 3)
    search = split_prompts(prompts(), 0, force=True).search["control"]
    cost = limit_kl(tiny_subject("llama"), Plan(), plan, search, 1e3)[2]
    again, found = made(3, 3, **{"excise.kl_budget": cost * (1 + 1e-6)})
    (only,) = found.passes
    assert only["ended"] == "the KL budget is spent"
    assert len(again.edits) == len(plan.edits)
    assert len(made(3, 3, **{"excise.kl_budget": 1e3})[1].passes) == 3  # negative control: nothing spends it


def test_enough_decides_when_passes_end() -> None:
    """A model that refuses nothing ends them even where none is enough."""
    assert len(made(3, 3, stop_below=0.0)[1].passes) == 1


def shown(found: Run, monkeypatch: pytest.MonkeyPatch) -> str:
    text = io.StringIO()
    monkeypatch.setattr(terminal, "results", Console(file=text, width=160))
    scores.show_run(found)
    return text.getvalue()


def carded(found: Run, monkeypatch: pytest.MonkeyPatch) -> str:
    return render_model_card(found.model_copy(update={"saved": {"form": "plan"}}))


@pytest.mark.parametrize("show", [shown, carded])
def test_people_see_several_passes_and_not_a_single_one(
    show: Callable[[Run, pytest.MonkeyPatch], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, two = made(2, 0)
    text = show(two, monkeypatch)
    assert "remaining" in text
    for row in make_pass_rows(two):
        assert all(cell in text for cell in row)
    assert "remaining" not in show(made(1, 0)[1], monkeypatch)


def test_a_resumed_run_tells_the_same(tmp_path: Path) -> None:
    _, whole = made(3, 3, Store(tmp_path))
    assert made(3, 3, Store(tmp_path))[1].passes == whole.passes
