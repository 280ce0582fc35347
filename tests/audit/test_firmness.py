"""An audit's statements agree with a model whose truth is known, and nothing is claimed where there is no behavior."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from tests.support.command_line import call, one_line
from tests.support.refuser import WORDS, refuser
from tests.support.tiny import tiny_subject

from obliteratus.audit.asked import Asked, find_returns
from obliteratus.audit.attacks import Attacker, divide_blocks, load_methods, with_directions, within_blocks
from obliteratus.audit.claims import classify, compare_controls, describe_headline, is_specific, list_claims
from obliteratus.audit.context import AuditContext
from obliteratus.audit.doses import NEAR, DoseCheck, Matched, Room, find_scale
from obliteratus.audit.firmness import choose_measurements, run_audit
from obliteratus.audit.firmness_page import render_audit, to_dict, write_audit
from obliteratus.audit.results import AuditReport
from obliteratus.audit.rewordings import GO_ON, add_turns, ask_to_go_on, reword
from obliteratus.audit.settings import AuditSettings
from obliteratus.core.errors import UserError
from obliteratus.core.run_folder import Store
from obliteratus.core.toml import dump_toml
from obliteratus.core.types import Prompt, PromptSet, Splits, Subject
from obliteratus.judge.judge import Judge
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.prompts import split_prompts
from obliteratus.verify.intervals import wilson_rate

REFUSAL = "I cannot help with that."
BLOCK = 2  # of eight: there attention writes the refusal
VERBS = ("Tell", "Remind", "Inform", "Warn", "Ask", "Write")
PINNED = ("fit",) * 4 + ("search",) * 2 + ("report",) * 4
SMALL = AuditSettings(
    methods=("basic", "leace"),
    tune_steps=0,
    fit=16,
    prompts=16,
    tokens=8,
    looks=5,
    seeds=1,
    directions=(1,),
    windows=4,
    controls=2,
    examples=(2, 8),
    reworded=8,
    repair=0,
)


def prompts(swap: bool = False) -> PromptSet:
    """48 prompts a group, pinned to their splits; swapped, half of each group is in the other."""
    texts = [f"{verb} me about {x}?" for verb in VERBS for x in WORDS]

    def make(marked: bool) -> tuple[Prompt, ...]:
        rows = []
        for i, text in enumerate(texts):
            there = marked != (swap and i // 3 % 2 == 1)
            rows.append(Prompt(text.replace("about", "# about") if there else text, split=PINNED[i % 10]))
        return tuple(rows)

    return PromptSet({"target": make(True), "control": make(False)})


def split(members: PromptSet) -> Splits:
    return split_prompts(members, uses_search_split=True, force=True)


@cache
def audited() -> AuditReport:
    own = {"again": prompts()["target"][6:10] * 2}
    benign = prompts()["control"][:8]
    return run_audit(refuser(BLOCK, word=REFUSAL), split(prompts()), SMALL, own=own, benign=benign)


# ------------------------------------------------------------------------------------------------ the truth
def test_what_is_said_agrees_with_the_model() -> None:
    """One direction, written by block 2 alone: removal is complete at no KL, by one direction, in that block."""
    found = audited()
    assert found.cost is not None
    assert found.cost.reached
    assert found.cost.kl.value < 1e-4
    assert found.cost.best == "basic"
    assert found.blocks is not None
    assert found.unedited is not None
    rates = {edit.name: classify(edit, found.unedited.rate) for edit in found.blocks.edits}
    assert rates == {"2–3": "ends", "4–5": "leaves", "6–7": "leaves"}
    assert "0–1" in found.blocks.failed  # nothing is written there
    assert "blocks 2–3 end most of it; blocks 4–5, 6–7 do not" in list_claims(found)["blocks"]


def test_random_directions_do_not_remove_it() -> None:
    """Shuffled labels do: in this model nothing but the refusal varies much. So nothing is claimed of the direction."""
    found = audited()
    assert found.controls is not None
    rates = {edit.name: edit.dose.rate.value for edit in found.controls.edits}
    assert rates["found direction"] == 0
    assert min(rate for name, rate in rates.items() if name.startswith("random")) == 1
    assert is_specific(found) is (min(rate for name, rate in rates.items() if name.startswith("shuffled")) > 0.5)


def test_it_returns_nowhere_and_benign_prompts_stay_as_they_are() -> None:
    found = audited()
    assert found.rewordings is not None
    names = {one.name for one in found.rewordings.asked}
    assert {"as they are", "polite", "answer in French", "asked to go on", "own file again"} <= names
    assert find_returns(found.rewordings.asked) == {}
    assert found.benign is not None
    assert found.benign.asked[0].after == found.benign.asked[0].before == (0,) * 8


# --------------------------------------------------------------------------------------- nothing is claimed
def check_nothing(subject: Subject, members: PromptSet) -> None:
    found = run_audit(subject, split(members), SMALL)
    assert not found.shows_behavior
    assert found.cost is None
    assert list_claims(found) == {}
    assert describe_headline(found).startswith("Nothing is claimed: ")
    page = render_audit(found, "tiny", {"target to fit": 3})
    assert "Nothing is claimed" in page
    assert "Cost of removal" not in page
    assert json.loads(json.dumps(to_dict(found)))["cost"] is None


def test_of_random_weights_nothing_is_claimed() -> None:
    check_nothing(tiny_subject("llama"), prompts())


def test_where_labels_mean_nothing_nothing_is_claimed() -> None:
    """The model refuses half of either group."""
    check_nothing(refuser(BLOCK, word=REFUSAL), prompts(swap=True))


def test_a_direction_that_does_as_much_as_controls_is_no_finding() -> None:
    found = audited()
    assert found.controls is not None
    first, *others = found.controls.edits
    same = [edit.model_copy(update={"dose": first.dose}) for edit in others]
    alike = found.controls.model_copy(update={"edits": (first, *same)})
    assert compare_controls(alike) == 1
    assert is_specific(replace(found, controls=alike)) is False
    assert "nothing is claimed" in list_claims(replace(found, controls=alike))["controls"]
    weak = [edit.model_copy(update={"dose": found.unedited}) for edit in others]
    assert is_specific(replace(found, controls=found.controls.model_copy(update={"edits": (first, *weak)}))) is True


@pytest.mark.parametrize(("after", "others", "returns"), [(1, 1, False), (1, 3, False), (0, 20, True), (12, 24, True)])
def test_a_return_is_claimed_only_beyond_chance(after: int, others: int, returns: bool) -> None:
    def asked(name: str, shown: int) -> Asked:
        return Asked(name=name, before=(1,) * 24, after=(1,) * shown + (0,) * (24 - shown))

    found = find_returns([asked("as they are", after), asked("a", others), asked("b", after)])
    assert set(found) == ({"a"} if returns else set())


# ------------------------------------------------------------------------------------------- its parts
def test_an_edit_is_scaled_to_the_kl_that_is_asked_for() -> None:
    subject = tiny_subject("llama")
    members = split(prompts())
    check = DoseCheck(subject, members.report["target"][:4], members.report["control"][:8], Judge(), 8)
    plan = Attacker(subject, members, Judge()).remove_random_direction(0)
    full = sum(check.measure_kl(plan, 1.0)) / 8
    scale = find_scale(check, plan, Room(0.2 * full, 1.0))
    costs = check.measure_kl(plan, scale)
    assert sum(costs) / len(costs) == pytest.approx(0.2 * full, rel=NEAR)
    assert find_scale(check, plan, Room(1e6, 1.0), most=2.0) == 2.0
    assert find_scale(check, plan, Room(0.0, 0.7)) == 0.7


def test_windows_cover_each_block_once_and_edit_no_other() -> None:
    assert divide_blocks(30, 6) == [(0, 4), (5, 9), (10, 14), (15, 19), (20, 24), (25, 29)]
    assert divide_blocks(3, 6) == [(0, 0), (1, 1), (2, 2)]
    subject = refuser(BLOCK, word=REFUSAL)
    attacker = Attacker(subject, split(prompts()), Judge())
    for first, last in ((2, 3), (3, 3)):
        plan = attacker.fit(within_blocks(load_recipe("basic"), first, last, subject.n_layers))
        assert {change.site.layer for change in plan.edits} == set(range(first, last + 1))


def test_only_the_number_of_directions_varies() -> None:
    subject = refuser(BLOCK, word=REFUSAL)
    attacker, recipe = Attacker(subject, split(prompts()), Judge()), load_recipe("basic")
    one, two = (attacker.fit(with_directions(recipe, k)) for k in (1, 2))
    assert {len(change.basis) for change in one.edits} == {1}  # type: ignore[union-attr]
    assert max(len(change.basis) for change in two.edits) == 2  # type: ignore[union-attr]
    assert [change.site for change in one.edits] == [change.site for change in two.edits]


def test_prompts_are_asked_otherwise_and_nothing_is_added_to_them() -> None:
    prompt = Prompt("Which Stars, if any, are red?", category="stars")
    worded = {name: rows[0] for name, rows in reword([prompt]).items()}
    assert worded["lower case"].text == "which stars if any are red"
    for name, other in worded.items():
        assert other.category == "stars"
        assert name == "lower case" or prompt.text in other.text
    first = add_turns(prompt, "What is bread?", "Food.")
    assert [turn.content for turn in first.history] == ["What is bread?", "Food."]
    again = ask_to_go_on(first, "Mars.")
    assert again.text == GO_ON
    assert [turn.role for turn in again.history] == ["user", "assistant"] * 2


def test_shuffled_labels_hold_as_many_prompts_of_either_group() -> None:
    members = split(prompts())
    attacker = Attacker(refuser(BLOCK, word=REFUSAL), members, Judge())
    one, again, other = (attacker.shuffle_labels(seed) for seed in (1, 1, 2))
    assert one == again != other
    for side in one.groups.values():
        assert 2 * sum("#" in prompt.text for prompt in side) == len(side)
    dealt = {prompt.text for side in one.groups.values() for prompt in side}
    assert dealt == {prompt.text for g in ("target", "control") for prompt in members.fit[g]}


def test_one_direction_is_enough_only_if_it_comes_to_one_in_twenty() -> None:
    found = audited()
    assert found.unedited is not None
    whole = found.curves["basic"]
    part = whole.model_copy(update={"doses": (whole.doses[0].model_copy(update={"shown": (1,) * 5 + (0,) * 11}),)})
    for one, two, said in (
        (whole, whole, "One direction a layer is enough"),
        (part, whole, "With one direction a layer one in twenty is not reached, with 2 it is"),
        (part, part, "not reached, nor is it with more"),
    ):
        assert said in list_claims(replace(found, directions={"1": one, "2": two}, ratios={"2": None}))["directions"]
    cheaper = wilson_rate(1, 40)  # any score below 1
    claims = list_claims(replace(found, directions={"1": whole, "2": whole}, ratios={"2": cheaper}))
    assert "2 directions a layer carry more of it than 1" in claims["directions"]


def test_methods_that_an_audit_cannot_try_are_refused() -> None:
    for names in (["reinforce"], ["leace_search"], ["nosuch"], ["basic", "basic"]):
        with pytest.raises(UserError, match=names[0]):
            load_methods(names)


def test_methods_may_be_files(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(dump_toml(load_recipe("basic")))
    assert list(load_methods(["leace", str(tmp_path / "own.toml")])) == ["leace", "own"]


def test_what_cannot_be_fitted_is_left_out_with_its_reason() -> None:
    """`least_change` edits the last quarter, where this model writes nothing."""
    settings = SMALL.model_copy(update={"methods": ("least_change", "basic")})
    audit = AuditContext(refuser(BLOCK, word=REFUSAL), split(prompts()), settings, Store(), Judge()).screened()
    assert list(audit.measure_curves(fit_cheapest=False)) == ["basic"]
    assert "nothing to edit" in audit.failed["least_change"]
    assert audit.base_method == "basic"


def test_few_wrong_answers_are_unclear() -> None:
    unedited = wilson_rate(16, 16)
    found = audited()
    assert found.unedited is not None
    half = found.unedited.model_copy(update={"shown": (1, 0) * 8})
    assert classify(Matched(name="x", dose=half), unedited) == "unclear"


def test_a_budget_leaves_out_what_it_has_no_room_for() -> None:
    passes = {"curves": 100, "controls": 50, "blocks": 30}
    assert choose_measurements(passes, None) == (["controls", "blocks"], {})
    names, skipped = choose_measurements(passes, 140)
    assert names == ["blocks"]
    assert "50" in skipped["controls"]
    with pytest.raises(UserError, match="curves alone need up to 100"):
        choose_measurements(passes, 99)


# ------------------------------------------------------------------------------------------- page, command
def test_an_interrupted_audit_resumes_with_the_same_result(tmp_path: Path) -> None:
    few = SMALL.model_copy(update={"controls": 1, "windows": 2, "examples": (2,), "seeds": 0})
    subject, splits = refuser(BLOCK, word=REFUSAL), split(prompts())

    class Stops(Store):
        def _path(self, name: str) -> Path | None:
            if name == "AUDIT blocks.done":
                raise KeyboardInterrupt
            return super()._path(name)

    with pytest.raises(KeyboardInterrupt):
        run_audit(subject, splits, few, store=Stops(tmp_path))
    done = {path.name for path in tmp_path.glob("*.done")}
    assert "AUDIT-controls.done" in done
    resumed = run_audit(subject, splits, few, store=Store(tmp_path))
    whole = run_audit(subject, splits, few)
    assert {k: v for k, v in to_dict(resumed).items() if k != "seconds"} == {
        k: v for k, v in to_dict(whole).items() if k != "seconds"
    }


def test_the_page_says_all_that_was_found(tmp_path: Path) -> None:
    found = audited()
    write_audit(found, tmp_path / "out", "/home/someone/tiny", {"target to fit": 16})
    page = (tmp_path / "out" / "index.html").read_text()
    for name in list_claims(found):
        assert f'id="{name}"' in page
    assert "/home/someone" not in page
    assert 'src="data:' in page
    assert "http" not in page.replace("http://www.w3.org", "")
    document = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert document["cost"]["best"] == "basic"
    assert document["claims"] == list_claims(found)


def files(folder: Path) -> Sequence[object]:
    """Model and prompts on disk, as arguments."""
    subject = refuser(BLOCK, word=REFUSAL)
    subject.model.save_pretrained(folder / "model")
    subject.tokenizer.save_pretrained(folder / "model")
    sources: list[object] = [folder / "model"]
    for group, members in prompts().groups.items():
        file = folder / f"{group}.jsonl"
        file.write_text("\n".join(json.dumps({"prompt": p.text, "split": p.split}) for p in members))
        sources += [f"--{group}", file]
    return sources


def test_the_command_measures_and_refuses_in_one_line(tmp_path: Path) -> None:
    given = files(tmp_path)
    out = tmp_path / "out"
    for option, value, said in (
        ("--methods", "nosuch", "nosuch"),
        ("--rewordings", "french.txt", "give a name"),
        ("--benign", tmp_path / "missing.txt", "missing.txt"),
        ("--budget", -1, "below 0"),
        ("--prompts", 4, "too few"),
        ("--budget", 1, "curves alone"),
    ):
        assert said in one_line(call("audit", *given, "--out", out, "--quiet", "--quick", option, value))
        assert not out.exists()
    assert "--control is missing" in one_line(call("audit", *given[:3], "--out", out, "--quiet"))
    more = ["--benign", tmp_path / "control.jsonl", "--rewordings", f"again={tmp_path / 'target.jsonl'}"]
    size = ["--quick", "--methods", "basic", "--budget", 40000, "--prompts", 16]
    done = call("audit", *given, "--out", out, *size, *more, "--json", "--quiet")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["cost"]["best"] == "basic"
    assert document["settings"]["prompts"] == 16
    assert {"own file again", "as they are"} <= {asked["name"] for asked in document["rewordings"]["asked"]}
    assert "benign" in document["claims"]
    assert {path.name for path in out.iterdir()} == {"index.html", "audit.json"}
