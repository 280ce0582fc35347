"""Runs, answers and exports on a tiny real model, through the command line's own runner, and without a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.refuser import asked, refuser
from tests.support.variants import vary

from obliteratus.cli.ui import make_runner, name_models
from obliteratus.core.chat import Turn
from obliteratus.core.errors import UserError
from obliteratus.excise.plan import load_plan, save_plan
from obliteratus.inference.stream import AnswerLimits
from obliteratus.serve.ui.pages import read_page, show_files, show_jobs, show_run
from obliteratus.serve.ui.paired_chat import PairedChat, Voice, converse
from obliteratus.serve.ui.requests import RunRequest
from obliteratus.serve.ui.workbench import Asked, Workbench
from obliteratus.serve.ui.workspace import Workspace

REFUSAL = "I cannot help with that."
QUESTION = "Tell me # about stars?"
FEW = AnswerLimits(tokens=4)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    folder = tmp_path_factory.mktemp("bench")
    subject = refuser(word=REFUSAL)
    subject.model.save_pretrained(folder / "refuser")
    subject.tokenizer.save_pretrained(folder / "refuser")
    space = Workspace.create(folder / "work")
    for group, prompts in vary(asked(), 3).groups.items():
        (space.root / "prompts" / f"{group}.txt").write_text("\n".join(prompt.text for prompt in prompts))
    made = Workbench(space, make_runner({}), name_models([str(folder / "refuser")]))
    yield made
    made.close()


def request_for(bench: Workbench, **changes: Any) -> RunRequest:
    prompts = {group: str(bench.workspace.path("prompts", f"{group}.txt")) for group in ("target", "control")}
    usual: dict[str, Any] = {"model": "refuser", "method": "lean", "form": "plan", **prompts}
    return RunRequest(**{**usual, **changes})


def finish(bench: Workbench, number: int) -> Any:
    return list(bench.queue.follow(number))[-1]


@pytest.fixture(scope="module")
def run(bench: Workbench) -> str:
    """A finished run."""
    state = finish(bench, bench.start_run(request_for(bench), "done"))
    assert state.status == "done", state.message
    return "done"


def talk(bench: Workbench, chat: PairedChat, strength: float, name: str = "done", member: int = 0) -> PairedChat:
    *_, (chat, _, wrong) = converse(bench, "tab", chat, Voice(name, member, strength, "", FEW))
    assert not wrong
    return chat


def answers(chat: PairedChat) -> tuple[str, ...]:
    return tuple(turns[-1].content for turns in (chat.base, chat.edited))


def test_both_models_answer_and_the_dial_answers_again(bench: Workbench, run: str) -> None:
    chat = talk(bench, PairedChat().ask(QUESTION), 1.0)
    before, after = answers(chat)
    assert before.startswith(REFUSAL)
    assert after.startswith("Y")
    assert chat.open == ()
    turned = talk(bench, chat.reopen(), 0.0)
    assert answers(turned) == (before, before)  # strength 0 is the unedited model
    assert len(turned.edited) == len(chat.edited)
    assert answers(talk(bench, turned.reopen(), 1.0)) == (before, after)
    further = talk(bench, chat.ask("Tell me about dust?"), 1.0)
    assert [turn.role for turn in further.edited] == ["user", "assistant"] * 2


def test_a_question_without_an_answer_leaves_no_trace(bench: Workbench, run: str) -> None:
    """A turn that is too long gets one line, and the conversation goes on."""
    chat = talk(bench, PairedChat().ask(QUESTION), 1.0)
    *_, (after, _, wrong) = converse(bench, "tab", chat.ask("long " * 200), Voice(run, limits=FEW))
    assert "too long" in wrong
    assert after == chat
    assert answers(talk(bench, after.ask(QUESTION), 1.0))[0].startswith(REFUSAL)


def test_a_new_answer_stops_the_one_before(bench: Workbench, run: str) -> None:
    endless = AnswerLimits(tokens=10**6)
    first = bench.start_answers("tab", run, 0, [Asked([Turn("user", QUESTION)], 0.0)], endless)
    other = bench.start_answers("another tab", run, 0, [Asked([Turn("user", QUESTION)], 1.0)], FEW)
    second = bench.start_answers("tab", run, 0, [Asked([Turn("user", QUESTION)], 1.0)], FEW)
    assert finish(bench, first).status == "stopped"
    assert finish(bench, other).status == "done"
    assert finish(bench, second).status == "done"


def test_a_model_without_a_plan_answers_as_itself(bench: Workbench) -> None:
    before, after = answers(talk(bench, PairedChat().ask(QUESTION), 2.0, "refuser"))
    assert before == after
    assert before.startswith(REFUSAL)


def test_one_model_is_in_memory(bench: Workbench, run: str) -> None:
    talk(bench, PairedChat().ask(QUESTION), 1.0)
    kept = bench.held.dial
    assert kept is not None
    talk(bench, PairedChat().ask(QUESTION), 1.0, "refuser")
    assert bench.held.dial is not None
    assert bench.held.dial.subject is kept.subject  # another plan of the same model loads nothing
    finish(bench, bench.start_run(request_for(bench), "second"))
    assert bench.held.dial is None  # a run opens its own


def test_members_of_a_front_are_talked_to_and_saved(bench: Workbench, run: str) -> None:
    folder = bench.workspace.path("runs", run)
    plan = load_plan(folder)
    save_plan(plan, folder / "front" / "2")
    save_plan(type(plan)(plan.edits[:0], plan.model), folder / "front" / "1")
    assert answers(talk(bench, PairedChat().ask(QUESTION), 1.0, member=1))[1].startswith(REFUSAL)
    assert answers(talk(bench, PairedChat().ask(QUESTION), 1.0, member=2))[1].startswith("Y")
    state = finish(bench, bench.start_export(run, 2, "plan"))
    assert state.status == "done", state.message
    saved = bench.workspace.path("exports", "done-member-2-plan")
    record = json.loads((saved / "run.json").read_text())
    assert record["search"]["member"] == 2
    assert record["after"] == {}  # scores of the run's own plan are not this one's
    assert len(load_plan(saved).edits) == len(plan.edits)
    with pytest.raises(UserError, match="has no member 3"):
        bench.start_export(run, 3, "plan")


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_plan_is_saved_in_other_forms(bench: Workbench, run: str, form: str) -> None:
    state = finish(bench, bench.start_export(run, 0, form))
    assert state.status == "done", state.message
    saved = bench.workspace.path("exports", f"done-{form}")
    assert (saved / ("model.safetensors" if form == "merged" else "adapter_model.safetensors")).is_file()
    assert "done" in show_files("exports", saved.name, saved)


def test_a_stop_in_the_middle_leaves_what_can_be_resumed(bench: Workbench) -> None:
    request = request_for(bench, method="leace_search", trials=10_000)
    number = bench.start_run(request, "long")
    for state in bench.queue.follow(number):
        if any(bar.title == "SEARCH" and bar.done for bar in state.bars):
            bench.queue.stop(number)
    assert finish(bench, number).status == "stopped"
    assert "Its finished stages are kept" in finish(bench, number).message
    assert "long" in bench.workspace.list_interrupted()
    assert "long" not in bench.workspace.list_runs()
    again = bench.resume_run("long")
    for state in bench.queue.follow(again):
        if any("restored" in note for note in state.notes):
            bench.queue.stop(again)
    assert finish(bench, again).status == "stopped"
    bench.discard_run("long")
    assert "long" not in bench.workspace.list_interrupted()


def test_a_stop_before_any_stage_leaves_nothing(bench: Workbench) -> None:
    number = bench.start_run(request_for(bench), "early")
    for state in bench.queue.follow(number):
        if state.bars or state.status == "running":
            bench.queue.stop(number)
    ended = finish(bench, number)
    assert ended.status == "stopped"
    kept = "early" in bench.workspace.list_interrupted()  # if a stage was quicker than the stop
    assert kept == ("kept: resume" in ended.message)
    assert kept == bool(list((bench.workspace.root / "runs").glob("early*")))


def test_what_cannot_work_is_refused_before_it_waits(bench: Workbench) -> None:
    before = len(bench.queue.states())
    for change in ({"model": "/etc"}, {"method": "fly"}, {"behavior": "none"}, {"changes": ("excise.strenght=1",)}):
        with pytest.raises(UserError):
            bench.start_run(request_for(bench, **change))
    with pytest.raises(UserError, match="choose a finished run"):
        bench.start_export("none", 0, "plan")
    with pytest.raises(UserError, match="choose an interrupted run"):
        bench.resume_run("none")
    assert len(bench.queue.states()) == before


def test_pages_tell_no_places_and_quote_what_they_show(bench: Workbench, run: str) -> None:
    """A run without a page of its own gets one; titles of jobs are no markup."""
    folder = bench.workspace.path("runs", run)
    place = str(bench.workspace.root)
    number = bench.queue.submit("<b>t</b>", "run", lambda job: f"see {place}/runs/x")
    finish(bench, number)
    strip = show_jobs(bench.queue.states())
    assert "<b>t</b>" not in strip
    assert "&lt;b&gt;t" in strip
    assert place not in strip
    assert 'sandbox="allow-scripts" src="page/done"' in show_run(run)
    assert place not in read_page(folder)
    saved = read_page(folder)
    (folder / "index.html").unlink()
    made = read_page(folder)  # of a run that an older version made
    (folder / "index.html").write_text(saved, encoding="utf-8")
    assert "before and after" in made
    assert place not in made
