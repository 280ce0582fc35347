"""An unedited model against itself: no scorer and no rung finds a difference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.refuser import asked, refuser
from tests.support.searches import search_prompts

from obliteratus.core.settings import Step
from obliteratus.core.types import Plan, Prompt, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.judge.behavior import load_behavior
from obliteratus.judge.classifier import load_classifier
from obliteratus.judge.judge import Judge
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.verify import Measurement, measure, scorers
from obliteratus.verify.model_rung import ModelRung
from obliteratus.verify.scoring import ItemValues

WORD = "I cannot help with that."
SHORT = {"behavior": {"tokens": 8}}


@pytest.fixture(scope="module")
def subject() -> Subject:
    return refuser(word=WORD)


def prompts() -> PromptSet:
    """Twenty-four prompts a group, so that means have intervals."""
    groups = asked().groups
    return PromptSet({g: (*ps, *(Prompt(f"{p.text} Please", p.category) for p in ps)) for g, ps in groups.items()})


def steps(folder: Path) -> tuple[Step, ...]:
    """All registered scorers, those first whose answers others read."""
    questions = [{"prompt": f"What is {i} plus {i}?", "choices": ["Yes", "No"], "answer": i % 2} for i in range(20)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    options = SHORT | {"accuracy": {"labeled": str(folder / "questions.jsonl")}}
    names = sorted(scorers, key=lambda name: (name != "behavior", name))
    return tuple(Step(use=name, **options.get(name, {})) for name in names)


def judge_of(subject: Subject) -> Judge:
    behavior = load_behavior()
    assert behavior.classifier is not None
    rungs = {"classifier": load_classifier(behavior.classifier), "self": ModelRung(subject, behavior.question)}
    return Judge(behavior, rungs=rungs)


def measure_twice(subject: Subject, plan: Plan, folder: Path) -> tuple[Measurement, Measurement]:
    chosen, judge = steps(folder), judge_of(subject)
    before = measure(subject, prompts(), chosen, base=subject, judge=judge)
    with applied(subject, plan):
        return before, measure(subject, prompts(), chosen, before, base=subject, judge=judge)


def differs(item: ItemValues, base: ItemValues) -> bool:
    none, change = (1.0 if item.unit == "perplexity" else 0.0), item.change(base)
    return change.value != pytest.approx(none, abs=1e-6) or change.low > none or change.high < none


def test_nothing_differs(subject: Subject, tmp_path: Path) -> None:
    before, after = measure_twice(subject, Plan(), tmp_path)
    shared = before.items.keys() & after.items.keys()
    assert len(shared) >= 10
    assert [name for name in shared if differs(after.items[name], before.items[name])] == []
    divergences = {name: score.value for name, score in after.scores.items() if name.startswith("kl.")}
    assert divergences
    assert all(value == pytest.approx(0, abs=1e-6) for value in divergences.values())
    rungs = [[record["rungs"] for record in m.records if "rungs" in record] for m in (before, after)]
    assert rungs[0] == rungs[1]
    assert {"phrases", "classifier", "self"} <= set(rungs[0][0])


def test_an_edit_is_found(subject: Subject, tmp_path: Path) -> None:
    """Negative control: the refusal's direction is removed."""
    plan = run(load_recipe("basic", {"verify": [{"use": "behavior", "tokens": 6}]}), subject, search_prompts()).plan
    before, after = measure_twice(subject, plan, tmp_path)
    assert differs(after.items["refusal.target"], before.items["refusal.target"])
    assert after.items["refusal.target"].change(before.items["refusal.target"]).high < -0.2
