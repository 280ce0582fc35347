"""A search on the tiny refuser: every trial is a live plan, the study outlives its workers, the front is real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import optuna
import pytest
import torch
from tests.support.refuser import asked, refuser

from obliteratus.core.errors import UserError
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe
from obliteratus.core.types import Prompt, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.search import SearchResult, StudyLocation, add_default_search, search, set_trial_count
from obliteratus.search.direction_cache import DirectionCache
from obliteratus.search.judge import TrialJudge, TrialVerdict, opening_probability
from obliteratus.search.optuna_study import SearchStudy
from obliteratus.search.run import pick_member, thin_front
from obliteratus.search.space import apply_values, sample_values, start_values
from obliteratus.search.storage import hide_password, open_storage
from obliteratus.search.trials import Trial, rebuild_plan
from obliteratus.verify import measure

REFUSAL = "I cannot help with that."


def prompts() -> PromptSet:
    """The twelve of each group of `asked`, in all three parts."""

    def pinned(p: Prompt, split: str) -> Prompt:
        return Prompt(f"{p.text} ({split})", split=split)

    groups = asked().groups
    return PromptSet(
        {g: tuple(pinned(p, split) for split in ("fit", "search", "report") for p in ps) for g, ps in groups.items()}
    )


def made(trials: int = 6, **search: Any) -> Recipe:
    """`basic` with a space of two values; the verify steps that the tiny model can answer."""
    space = {"excise.strength": {"low": 0.0, "high": 1.5}, "weigh.0.low": {"low": 0.0, "high": 0.9}}
    return load_recipe(
        "basic",
        {
            "weigh": [{"use": "middle", "low": 0.0, "high": 1.0}, {"use": "component", "embed": 0.03}],
            "excise.parts": ["attn.out", "mlp.out", "embed"],  # embeddings: else controls do not move at all
            "verify": [{"use": "refusal", "tokens": 6}, {"use": "first_token_kl"}],
            "search": {"trials": trials, "tokens": 4, "space": space, **search},
        },
    )


@pytest.fixture(scope="module")
def subject() -> Subject:
    return refuser(word=REFUSAL)


def searched(subject: Subject, chosen: Recipe, storage: str = "", pick: str = "knee") -> SearchResult:
    return search(chosen, subject, prompts(), Store(), StudyLocation(storage, "study"), pick)


def judge_of(subject: Subject, chosen: Recipe) -> tuple[DirectionCache, TrialJudge]:
    fit, held, _ = prompts().split(0)
    before = measure(subject, held, chosen.verify)
    return DirectionCache(subject, fit, chosen, Store()), TrialJudge(subject, held, chosen, before)


# ---------------------------------------------------------------------------------------------- search
def test_it_finds_what_ends_refusals_and_says_so(subject: Subject) -> None:
    found = searched(subject, made(10))
    assert found.run.before["refusal.target"].value == 1.0
    assert found.run.after["refusal.target"].value == 0.0
    best = found.front[0]
    assert best.scores["refusal.target"] == 0.0
    assert len(found.trials) == found.run.search["trials"] == 10
    for a in found.front:  # nothing in the front is dominated by any checked member
        assert not any(b.objectives < a.objectives and b.objectives[1] <= a.objectives[1] for b in found.front)


def test_the_model_is_as_it_was(subject: Subject) -> None:
    before = {name: p.clone() for name, p in subject.model.named_parameters()}
    searched(subject, made(3))
    assert all(torch.equal(p, before[name]) for name, p in subject.model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


def test_what_the_winner_measured_is_what_is_proved(subject: Subject) -> None:
    """Same values, same plan, same scores; another trial's plan gives others."""
    chosen = made(6)
    found = searched(subject, chosen)
    ground, judge = judge_of(subject, chosen)
    winner = found.front[found.picked].trial
    plan = rebuild_plan(winner, chosen, ground)
    for a, b in zip(plan.edits, found.plan.edits, strict=True):
        assert torch.equal(a.basis, b.basis)  # type: ignore[union-attr]
        assert a.strength == b.strength  # type: ignore[union-attr]
    assert judge.cheap(plan).scores["kl.first_token.mean"] == winner.scores["kl.first_token.mean"]
    others = [t for t in found.trials if t.values != winner.values]
    kls = {judge.cheap(rebuild_plan(t, chosen, ground)).scores["kl.first_token.mean"] for t in others}
    assert kls != {winner.scores["kl.first_token.mean"]}


def test_the_winner_is_a_recipe_that_runs(subject: Subject) -> None:
    from obliteratus.pipeline.run import run

    found = searched(subject, made(6))
    again = found.front[found.picked].recipe
    assert again.search is None
    _, proved, *_ = run(again, subject, prompts())
    assert {k: s.value for k, s in proved.after.items()} == {k: s.value for k, s in found.run.after.items()}


def test_every_recipe_can_be_searched(subject: Subject) -> None:
    plain = load_recipe("basic", {"verify": [{"use": "refusal", "tokens": 6}, {"use": "first_token_kl"}]})
    space = add_default_search(plain)
    assert space.search is not None
    assert {p.split(".")[-1] for p in space.search.space} == {"attn", "mlp", "low"}
    assert searched(subject, set_trial_count(space, 3)).trials[0].objectives[0] == 0.0  # begins as `basic` itself
    assert add_default_search(space) is space


# ---------------------------------------------------------------------------------------------- cascade
def test_only_what_may_win_is_answered(subject: Subject) -> None:
    """A dominated estimate gets no answers; a wide margin gives them to all that no front point beats in KL alone."""
    careful, greedy = (searched(subject, made(12, margin=m, max_remaining_refusal=1.0)) for m in (0.0, 1.0))
    assert not all(t.answered for t in careful.trials)
    assert sum(t.answered for t in greedy.trials) >= sum(t.answered for t in careful.trials)
    for t in careful.trials:
        if not t.answered:
            rivals = [o.objectives for o in careful.trials if o.answered and o.number < t.number]
            assert any(all(x <= y for x, y in zip(r, t.objectives, strict=True)) for r in rivals)


def test_the_margin_is_what_an_estimate_may_be_wrong_by(subject: Subject) -> None:
    known, front = {"refusal.target": 0.3, "kl.first_token.mean": 1.0}, [(0.25, 0.5)]
    assert judge_of(subject, made(margin=0.1))[1].may_enter(known, {}, front)
    assert not judge_of(subject, made(margin=0.01))[1].may_enter(known, {}, front)


def test_answers_end_when_their_refusals_shut_the_trial_out(subject: Subject) -> None:
    """Refusals seen so far only grow: a trial that they put behind the front is given up before its answers end."""
    ground, judge = judge_of(subject, made(max_remaining_refusal=1.0, margin=1.0))
    plan = ground.plan(apply_values(made(), {"excise.strength": 0.0, "weigh.0.low": 0.0}))  # refuses all
    whole, kl = judge.answered(plan), judge.cheap(plan).scores["kl.first_token.mean"]
    assert judge.judged(plan, []).scores == whole.scores
    behind = judge.judged(plan, [(0.5, kl)])  # by its first look alone the margin would let it in
    assert not behind.answered
    assert 0.5 < behind.scores["refusal.target"] <= whole.scores["refusal.target"] == 1.0
    assert judge.judged(plan, [(0.5, kl + 0.1)]).answered


def test_what_leaves_most_refusals_is_answered_only_to_begin_a_front(subject: Subject) -> None:
    ground, judge = judge_of(subject, made())
    plan = ground.plan(apply_values(made(), {"excise.strength": 0.0, "weigh.0.low": 0.0}))  # refuses all
    assert judge.judged(plan, []).answered
    assert not judge.judged(plan, [(0.0, 10.0)]).answered
    _, patient = judge_of(subject, made(max_remaining_refusal=1.0))
    assert patient.judged(plan, [(0.0, 10.0)]).answered


def test_the_estimate_is_the_rate_where_first_tokens_decide(subject: Subject) -> None:
    """Unedited: all refused; edited: none. On the tiny model the first token says it all."""
    ground, judge = judge_of(subject, made())
    chosen = apply_values(made(), {"excise.strength": 1.0, "weigh.0.low": 0.0})
    edited = judge.cheap(ground.plan(chosen)).scores
    none = judge.cheap(ground.plan(apply_values(made(), {"excise.strength": 0.0, "weigh.0.low": 0.0}))).scores
    assert none["refusal.target"] == pytest.approx(1.0, abs=0.02)
    assert edited["refusal.target"] == pytest.approx(0.0, abs=0.1)
    assert none["kl.first_token.mean"] == pytest.approx(0.0, abs=1e-6)


def test_began_is_the_sum_of_probabilities() -> None:
    logp = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
    assert opening_probability(logp, [0, 2]).tolist() == pytest.approx([0.75, 0.8])


def test_a_broken_model_is_worst_not_unknown(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    ground, judge = judge_of(subject, made())
    plan = ground.plan(apply_values(made(), {"excise.strength": 1.0, "weigh.0.low": 0.0}))
    broken = judge.cheap(plan).scores
    judge.base = judge.base.clone().fill_(float("nan"))
    assert judge.cheap(plan).scores["kl.first_token.mean"] == 100.0 > broken["kl.first_token.mean"]


def test_a_minus_makes_large(subject: Subject) -> None:
    _, judge = judge_of(subject, made(minimize=("refusal.target", "-refusal.control")))
    verdict = TrialVerdict({"refusal.target": 0.5, "refusal.control": 0.25}, False)
    assert judge.objectives(verdict) == (0.5, -0.25)
    assert judge.hoped(verdict.scores, {}) == pytest.approx((0.4, -0.35))
    assert judge.hoped(verdict.scores, {"refusal.target": 0.45}) == pytest.approx((0.45, -0.35))


def test_objectives_that_no_scorer_gives(subject: Subject) -> None:
    with pytest.raises(UserError, match=r"search\.minimize: 'perplexity\.ratio' is no score of a trial; there are: "):
        searched(subject, made(2, minimize=("refusal.target", "perplexity.ratio")))


def test_no_feasible_trial(subject: Subject) -> None:
    """All trials refuse more controls than allowed: a clear end, and the study keeps them."""
    chosen = made(3, control_margin=0.0)
    ground, judge = judge_of(subject, chosen)
    judge.excess = lambda scores: 0.5  # type: ignore[method-assign]
    from obliteratus.search.run import measure_front
    from obliteratus.search.trials import run_trials

    study = SearchStudy(open_storage(""), "s", chosen, {})
    trials = run_trials(study, chosen, ground, judge, 3)
    assert len(study.done) == 3
    with pytest.raises(UserError, match="none of 3 trials kept refusals of control prompts within"):
        measure_front(trials, chosen, ground, judge, StudyLocation("", "s"))


def test_nothing_to_search_for(subject: Subject) -> None:
    """Groups that are refused alike: no first token tells them apart."""
    same = PromptSet({"target": prompts()["control"], "control": prompts()["target"]})
    with pytest.raises(UserError, match="there is nothing to search for"):
        search(made(2), subject, same, Store(), StudyLocation("", "s"))


def test_weights_that_leave_no_layer_are_the_unedited_model(subject: Subject) -> None:
    chosen = made()
    ground, judge = judge_of(subject, chosen)
    empty = ground.plan(load_recipe("basic", {"weigh": [{"use": "skip_first", "n": 99}]}))
    assert empty.edits == ()
    assert judge.cheap(empty).scores["kl.first_token.mean"] == 0.0


# ---------------------------------------------------------------------------------------------- space
def test_paths_that_a_choice_removes_are_left_out() -> None:
    chosen = load_recipe("heretic")
    assert chosen.search is not None
    short = chosen.search.space["distill"].choices[0]

    def first(path: str, values: Any) -> Any:
        return values.choices[0] if path == "distill" else values.low

    def second(path: str, values: Any) -> Any:
        return values.choices[1] if path == "distill" else values.low

    assert "distill.1.at" not in sample_values(chosen, first)
    assert sample_values(chosen, second)["distill.1.at"] == 0.4
    assert [s.use for s in apply_values(chosen, sample_values(chosen, first)).distill] == [s["use"] for s in short]
    assert apply_values(chosen, sample_values(chosen, second)).distill[1].options["at"] == 0.4


def test_a_search_begins_where_the_recipe_stands() -> None:
    chosen = made()
    assert start_values(chosen) == {"excise.strength": 1.0, "weigh.0.low": 0.0}
    far = made(space={"excise.strength": {"low": 2.0, "high": 3.0}})
    assert start_values(far) == {}  # 1 is out of range: left to the sampler


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "at least 1 item"),
        ({"excise.strength": {"low": 2.0, "high": 1.0}}, "low below high"),
        ({"probe.position": {"low": -2, "high": -1}}, "only distill, weigh and excise can differ"),
        ({"excise.strenth": {"low": 0.0, "high": 1.0}}, "strenth"),
    ],
)
def test_spaces_that_cannot_be(space: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("basic", {"search": {"trials": 3, "space": space}})


# ---------------------------------------------------------------------------------------------- study
@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2"])
def test_a_resumed_study_goes_on_as_it_would_have(subject: Subject, sampler: str, tmp_path: Path) -> None:
    """Sixteen trials in one go, and ten (the eleventh lost) and six: the same values."""
    chosen = made(16, sampler=sampler)
    whole = searched(subject, chosen)
    journal = str(tmp_path / "study")
    searched(subject, set_trial_count(chosen, 10), journal)
    study = optuna.load_study(study_name="study", storage=open_storage(journal))
    study.ask().set_user_attr("worker", "here 1 0")  # a worker that is gone
    _age(study)
    resumed = searched(subject, chosen, journal)
    assert [t.values for t in resumed.trials] == [t.values for t in whole.trials]
    other = searched(subject, chosen.model_copy(update={"seed": 1}))
    assert [t.values for t in other.trials] != [t.values for t in whole.trials]


def _age(study: optuna.Study) -> None:
    """The lost trial's worker was on this machine, so that it is seen to be dead."""
    import socket

    trial = study.get_trials(states=(optuna.trial.TrialState.RUNNING,))[0]
    study._storage.set_trial_user_attr(trial._trial_id, "worker", f"{socket.gethostname()} 1 0")


def test_a_study_of_something_else_is_refused(subject: Subject, tmp_path: Path) -> None:
    journal = str(tmp_path / "study")
    searched(subject, made(2), journal)
    searched(subject, made(3), journal)  # more trials of the same: welcome
    with pytest.raises(UserError, match="was made with another recipe; name another with --study"):
        searched(subject, made(3, tokens=5), journal)
    with pytest.raises(UserError, match="was made with another model"):
        searched(refuser(block=3, word=REFUSAL), made(3), journal)


def test_an_interrupt_loses_one_trial(subject: Subject) -> None:
    chosen = made(4)
    ground, judge = judge_of(subject, chosen)
    study = SearchStudy(open_storage(""), "s", chosen, {})
    begun = study.ask(4)
    assert begun is not None
    with pytest.raises(KeyboardInterrupt), study.at(begun):
        raise KeyboardInterrupt
    from obliteratus.search.trials import run_trials

    trials = run_trials(study, chosen, ground, judge, 4)
    assert len(trials) == 4
    assert trials[0].number == 1  # the first died


def test_a_live_worker_is_not_buried(subject: Subject) -> None:
    study = SearchStudy(open_storage(""), "s", made(4), {})
    assert study.ask(4) is not None
    study.fail_stale_trials()
    assert len(study.alive) == 1
    assert study.ask(1) is None  # the one that is allowed is being made


WORKER = """
import sys
sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from tests.search.test_search import REFUSAL, made, ready, searched
from tests.support.refuser import refuser
subject = refuser(word=REFUSAL)
ready({meeting!r}, {n})
found = searched(subject, made({trials}), {storage!r})
print(len(found.trials))
"""


def ready(meeting: str, n: int) -> None:
    """Return when so many processes have called this: none is to make all trials while another still starts."""
    (Path(meeting) / str(os.getpid())).touch()
    while len(list(Path(meeting).iterdir())) < n:
        time.sleep(0.05)


def workers(n: int, trials: int, storage: str) -> list[subprocess.Popen[str]]:
    text = WORKER.format(tests=str(Path(__file__).parents[2]), trials=trials, storage=storage, meeting=mkdtemp(), n=n)
    return [subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True) for _ in range(n)]


def test_two_processes_share_a_study_and_a_killed_one_is_replaced(tmp_path: Path) -> None:
    storage = str(tmp_path / "study")
    first, second = workers(2, 40, storage)
    wait_for(storage, 2)
    first.send_signal(signal.SIGKILL)
    assert second.wait(120) == 0
    trials = optuna.load_study(study_name="study", storage=open_storage(storage)).get_trials()
    done = [t for t in trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert len(done) == 40
    assert len(trials) - len(done) <= 1  # the killed worker lost at most its running trial
    assert len({t.user_attrs["worker"] for t in done}) == 2


def wait_for(storage: str, n: int) -> None:
    """Until so many workers have finished a trial each."""
    for _ in range(600):
        if Path(storage).exists():
            studies = open_storage(storage)
            if any(s.study_name == "study" for s in studies.get_all_studies()):
                study = optuna.load_study(study_name="study", storage=studies)
                done = [t for t in study.get_trials() if t.state == optuna.trial.TrialState.COMPLETE]
                if len({t.user_attrs["worker"] for t in done}) >= n:
                    return
        time.sleep(0.1)
    raise AssertionError("no trials came")


def test_a_storage_that_answers_no_more(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried again three times, then a clear end; what was finished is still there afterwards."""
    import obliteratus.search.storage as module

    monkeypatch.setattr(module, "RETRY_WAITS", (0.0, 0.0, 0.0))
    journal = tmp_path / "study"
    searched(subject, made(2), str(journal))
    kept = journal.read_bytes()
    journal.unlink()
    journal.mkdir()  # every read fails now
    with pytest.raises(UserError, match=r"does not answer .*finished trials are safe"):
        searched(subject, made(3), str(journal))
    journal.rmdir()
    journal.write_bytes(kept)
    assert len(searched(subject, made(3), str(journal)).trials) == 3


def test_passwords_are_not_shown() -> None:
    assert hide_password("postgresql://me:secret@host/db") == "postgresql://me@host/db"
    assert hide_password("study.journal") == "study.journal"


# ---------------------------------------------------------------------------------------------- choice
def test_picks(subject: Subject) -> None:
    front = searched(subject, made(8)).front
    assert pick_member(front, "first") == 0
    assert pick_member(front, "last") == len(front) - 1
    assert pick_member(front, "1") == 0
    for wrong in ("0", str(len(front) + 1), "best"):
        with pytest.raises(UserError, match="--pick"):
            pick_member(front, wrong)


def test_thinned_keeps_the_ends() -> None:
    front = [Trial(n, {}, (float(n),), {}, True, True, 0.0) for n in range(25)]
    assert [t.number for t in thin_front(front, 4)] == [0, 8, 16, 24]
    assert thin_front(front[:2], 10) == front[:2]


def test_live_plans_agree_with_the_cheap_score(subject: Subject) -> None:
    """Golden: KL by hand in float64 from the model's own logits."""
    ground, judge = judge_of(subject, made())
    plan = ground.plan(apply_values(made(), {"excise.strength": 0.6, "weigh.0.low": 0.0}))

    def logits() -> torch.Tensor:
        rows = judge.rows["control"]
        with torch.no_grad():
            return torch.stack([subject.model(torch.tensor([r])).logits[0, -1].double() for r in rows]).log_softmax(-1)

    base = logits()
    with applied(subject, plan):
        edited = logits()
    expected = (base.exp() * (base - edited)).sum(-1).mean()
    assert judge.cheap(plan).scores["kl.first_token.mean"] == pytest.approx(
        float(expected), rel=1e-3
    )  # KL is stored in fp32
