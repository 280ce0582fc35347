"""Hardening: seeded, resumable to the bit, bounded on controls, undone after training, and refused in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.support.command_line import call, one_line
from tests.support.refuser import WORDS, refuser
from tests.support.tiny import tiny_subject
from torch import Tensor
from torch.nn import functional as F

from obliteratus.audit.attacks import Attacker
from obliteratus.audit.removal_cost import RemovalCost
from obliteratus.audit.settings import AuditSettings
from obliteratus.causal.interventions import compute_answer_logits
from obliteratus.core.errors import UserError
from obliteratus.core.results import Score
from obliteratus.core.run_folder import Store
from obliteratus.core.types import Prompt, PromptSet, Splits, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.writers import remove_from_writers
from obliteratus.harden.attack import fit_attack, load_attacks
from obliteratus.harden.lessons import FIRST_TOKEN, LessonLosses, Lessons, collect_lessons
from obliteratus.harden.measure import Answered, CostChange, Effect, compare_answers
from obliteratus.harden.output import describe_factor, describe_over_refusal
from obliteratus.harden.run import HardenJob, harden_model
from obliteratus.harden.save import check_hardened_form
from obliteratus.harden.settings import HardenSettings
from obliteratus.harden.train import Training, adapted, choose_sites, learning_rate
from obliteratus.harden.wordings import check_wordings, divide_kinds, vary_wordings
from obliteratus.inference.chat_template import render_prompts
from obliteratus.judge.judge import Judge
from obliteratus.prompts import split_prompts
from obliteratus.summon.load import open_subject

REFUSAL = "I cannot help with that."
BLOCK = 2  # of eight: there attention writes the refusal
VERBS = ("Tell", "Remind", "Inform", "Warn", "Ask", "Write")
PINNED = ("fit",) * 4 + ("search",) * 2 + ("report",) * 4
SMALL = HardenSettings(
    attacks=("basic",),
    wordings=(),
    steps=6,
    alone=0.0,
    refit=3,
    attack_prompts=8,
    tokens=6,
    batch=4,
    rank=2,
    depth=0.2,
    prompts=12,
    lr=0.01,
)
CHECKS = AuditSettings(methods=("basic",), tune_steps=0, fit=8, prompts=16, tokens=6, looks=3, seeds=0)


def make_prompts() -> PromptSet:
    """48 prompts a group, pinned to their splits."""
    texts = [f"{verb} me about {x}?" for verb in VERBS for x in WORDS]
    pins = [PINNED[i % 10] for i in range(len(texts))]
    marked = [text.replace("about", "# about") for text in texts]
    groups = {"target": marked, "control": texts}
    return PromptSet({g: tuple(Prompt(t, split=s) for t, s in zip(ts, pins, strict=True)) for g, ts in groups.items()})


def make_splits() -> Splits:
    return split_prompts(make_prompts(), uses_search_split=True, force=True)


@cache
def make_subject() -> Subject:
    """The refuser, shared: that hardening leaves it as it was is tested below."""
    return refuser(BLOCK, word=REFUSAL)


@cache
def make_lessons() -> Lessons:
    return collect_lessons(make_subject(), make_splits().fit, Judge(), SMALL)


def train(settings: HardenSettings, file: Path | None = None, stop_at: int | None = None) -> list[Tensor]:
    """Train on the refuser, and return the adapter's weights. stop_at: a step at which the process is interrupted."""
    subject = make_subject()
    loss, attacker = LessonLosses(subject, make_lessons()), Attacker(subject, make_splits(), Judge(), settings.seed)
    with adapted(subject, settings) as tuned:
        training = Interrupted(tuned, attacker, make_lessons(), loss, load_attacks(settings.attacks), settings)
        training.stop_at = stop_at
        training.run(file)
        return [p.detach().clone() for p in training.weights]


class Interrupted(Training):
    """Training that may be interrupted before a step, as Ctrl-C does."""

    stop_at: int | None = None

    def take_step(self, step: int, attack: Any) -> Any:
        if step == self.stop_at:
            raise KeyboardInterrupt
        return super().take_step(step, attack)


def are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# -------------------------------------------------------------------------------------------------- training
def test_training_is_seeded() -> None:
    first = train(SMALL)
    assert are_equal(first, train(SMALL))
    assert not are_equal(first, train(SMALL.model_copy(update={"seed": 1})))


def test_a_training_that_is_killed_in_the_middle_resumes_bit_for_bit(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        train(SMALL, file, stop_at=5)  # two steps behind the last checkpoint
    assert len(torch.load(file, weights_only=True)["losses"]) == 3
    resumed = train(SMALL, file)
    assert are_equal(resumed, train(SMALL))
    assert not are_equal(resumed, train(SMALL.model_copy(update={"steps": 3})))
    assert are_equal(resumed, train(SMALL, file, stop_at=0))  # a finished one takes no step


def test_training_leaves_the_model_as_it_was() -> None:
    subject = make_subject()
    before = {name: p.clone() for name, p in subject.model.state_dict().items()}
    names = [name for name, _ in subject.model.named_modules()]
    train(SMALL)
    assert all(torch.equal(before[name], p) for name, p in subject.model.state_dict().items())
    assert names == [name for name, _ in subject.model.named_modules()]
    assert not any(module._forward_hooks for module in subject.model.modules())
    assert not any(p.requires_grad for p in subject.model.parameters())


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    subject = make_subject()  # drawn here, since making it draws numbers too
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with adapted(subject, SMALL):
        assert torch.equal(torch.rand(1), expected)


def move_controls(control: float) -> float:
    """KL on control prompts after training with this weight, nats a token."""
    settings = SMALL.model_copy(update={"control": control, "steps": 12, "entangle": 0.0, "lr": 0.02})
    subject, lessons = make_subject(), make_lessons()
    loss, attacker = LessonLosses(subject, lessons), Attacker(subject, make_splits(), Judge(), 0)
    with adapted(subject, settings) as tuned:
        Training(tuned, attacker, lessons, loss, load_attacks(settings.attacks), settings).run()
        return loss.control(lessons.answers).item()


def test_controls_are_held_to_the_base() -> None:
    """Without the term they move more than three times as far."""
    held, free = move_controls(10.0), move_controls(0.0)
    assert held < 0.05
    assert free > 3 * held


@pytest.fixture
def adapter() -> Iterator[LessonLosses]:
    """Losses under an adapter that changes the model, in blocks 4 to 7 alone."""
    subject = make_subject()
    losses = LessonLosses(subject, make_lessons())
    with adapted(subject, SMALL.model_copy(update={"depth": 0.5})) as tuned:
        generator = torch.Generator().manual_seed(0)
        for p in tuned.parameters():
            if p.requires_grad:
                p.data = 0.2 * torch.randn(p.shape, generator=generator)
        yield losses


@pytest.mark.parametrize("edited", [False, True])
def test_losses_and_gradients_are_those_of_the_whole_model(adapter: LessonLosses, edited: bool) -> None:
    """Although lower blocks run once: an independent pass through all blocks, and torch's own losses."""
    subject, pairs = make_subject(), make_lessons().refusals[:3]
    weights = [p for p in subject.model.parameters() if p.requires_grad]
    plan = remove_from_writers(subject, F.normalize(torch.ones(1, subject.width)), [6] if edited else [])

    def whole() -> Tensor:
        logits = compute_answer_logits(subject, pairs)
        each = F.cross_entropy(logits, torch.tensor([t for _, a in pairs for t in a]), reduction="none")
        starts = torch.tensor([0, *[len(a) for _, a in pairs][:-1]]).cumsum(0)
        return each.mean() + FIRST_TOKEN * each[starts].mean()

    with applied(subject, plan):
        found, expected = adapter.refusal(pairs), whole()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights))


def test_the_control_loss_is_the_kl_to_the_base(adapter: LessonLosses) -> None:
    subject, pairs = make_subject(), make_lessons().answers[:1]
    new = compute_answer_logits(subject, pairs).log_softmax(-1).double()
    with torch.no_grad():
        for module in subject.model.modules():
            if hasattr(module, "lora_B"):
                module.lora_B["default"].weight.zero_()
        base = compute_answer_logits(subject, pairs).log_softmax(-1).double()
    each = (base.exp() * (base - new)).sum(-1)
    expected = each.mean() + FIRST_TOKEN * each[0]
    with torch.no_grad():
        assert adapter.control(pairs).item() == pytest.approx(0.0, abs=1e-5)  # the adapter is zero now
    assert expected > 0.01


# -------------------------------------------------------------------------------------------------- the edit
def attack_after(climb: float, steps: int = 3) -> tuple[float, float]:
    """Refusal loss under the edit before and after some of its own steps; the model stays."""
    subject, lessons = make_subject(), make_lessons()
    settings = SMALL.model_copy(update={"climb": climb, "attacks": ("basic",)})
    loss, attacker = LessonLosses(subject, lessons), Attacker(subject, make_splits(), Judge(), 0)
    with adapted(subject, settings) as tuned:
        training = Training(tuned, attacker, lessons, loss, load_attacks(settings.attacks), settings)
        attack = fit_attack(attacker, training.recipes, settings, 0)
        values = []
        for _ in range(steps + 1):
            refusal, up = training.differentiate(lambda: loss.refusal(lessons.refusals), attack, 0.3)
            values.append(refusal)
            n = len(training.weights)
            attack.move(up[n:], [None] * len(attack.trainable), removed=False)
        return values[0], values[-1]


def test_the_edit_moves_against_the_training() -> None:
    before, after = attack_after(0.05)
    assert after > before
    before, after = attack_after(0.0)
    assert after == before


def test_only_methods_without_gradients_are_trained_against() -> None:
    assert set(load_attacks(("basic", "leace"))) == {"basic", "leace"}
    with pytest.raises(UserError, match="attack 'balanced' takes gradients"):
        load_attacks(("balanced",))
    with pytest.raises(UserError, match="strengthens"):
        load_attacks(("reinforce",))


def test_adapters_are_on_linear_layers_from_their_depth_on() -> None:
    subject = make_subject()
    assert {site.layer for site in choose_sites(subject, 0.5)} == {4, 5, 6, 7}
    assert {site.layer for site in choose_sites(subject, 0.0)} == set(range(8))
    with pytest.raises(UserError, match="no linear layers"):
        choose_sites(subject, 0.99)


def test_the_learning_rate_warms_up_and_falls() -> None:
    settings = HardenSettings(steps=100, lr=1.0)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert rates[50] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.109)


# -------------------------------------------------------------------------------------------------- wordings
def test_kinds_are_those_that_were_planted() -> None:
    """Of rows without any, kinds are of similar size all the same, and other rows give others."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.arange(60) % 3
    centers = 5 * torch.randn(3, 32, generator=generator)
    found = divide_kinds(centers[planted] + torch.randn(60, 32, generator=generator), 3)
    assert all(len(set(found[planted == i].tolist())) == 1 for i in range(3))
    assert len(set(found.tolist())) == 3
    noise = divide_kinds(torch.randn(60, 32, generator=generator), 3)
    assert torch.bincount(noise, minlength=3).min() >= 60 / 9
    assert any(len(set(noise[planted == i].tolist())) > 1 for i in range(3))


def test_each_kind_is_refused_in_other_words() -> None:
    """A model of random weights tells these prompts apart; the refuser does not, and its prompts are of one kind."""
    subject = tiny_subject("llama")
    rows = render_prompts(subject, make_prompts()["target"][:24])
    lessons = Lessons(refusals=tuple((row, [5, 6]) for row in rows), answers=((rows[0], [7]),))
    settings = SMALL.model_copy(update={"wordings": ("Unfortunately, I cannot do that.", "No, I must decline.")})
    varied = vary_wordings(subject, lessons, settings)
    assert len({str(answer) for _, answer in varied.refusals}) == 3
    assert [row for row, _ in varied.refusals] == rows
    assert varied.answers == lessons.answers
    assert vary_wordings(subject, lessons, SMALL) == lessons
    assert vary_wordings(make_subject(), make_lessons(), settings) == make_lessons()


def test_wordings_have_to_show_the_behavior() -> None:
    check_wordings(HardenSettings().wordings, Judge())
    with pytest.raises(UserError, match="does not show refusal"):
        check_wordings(("Yes, gladly.",), Judge())


# -------------------------------------------------------------------------------------------------- results
def cost(value: float, scale: float | None = 1.0, tried: float = 0.5) -> RemovalCost:
    kl = Score(value=value, low=value / 2, high=value * 2, n=24, unit="nats")
    return RemovalCost(goal=0.05, kl=kl, scale=scale, tried=tried, best="basic")


def test_a_factor_is_the_ratio_of_costs_and_a_bound_where_nothing_removes() -> None:
    inf = float("inf")
    assert CostChange(goal=0.05, before=cost(0.01), after=cost(0.05)).factor == pytest.approx(5)
    beyond = CostChange(goal=0.05, before=cost(0.01), after=cost(inf, None))
    assert beyond.factor == pytest.approx(50)
    assert describe_factor(beyond) == "at least 50 times"
    assert CostChange(goal=0.05, before=cost(inf, None), after=cost(0.1)).factor is None


def test_a_rise_of_refusals_on_controls_is_said() -> None:
    def effect(gained: int) -> Effect:
        before, first = torch.zeros(24), torch.zeros(24, 5).log_softmax(-1)
        after = (torch.arange(24) < gained).float()
        return compare_answers(Answered(before, before, first), Answered(before, after, first))

    assert "more than by chance" in describe_over_refusal("refusal", effect(8))
    assert "not more than chance allows" in describe_over_refusal("refusal", effect(1))
    assert describe_over_refusal("refusal", effect(0)).endswith("before.")
    assert effect(8).kl.value == 0


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_what_is_saved_is_what_was_trained(tmp_path: Path, form: Any) -> None:
    job = HardenJob(make_subject(), make_splits(), SMALL.model_copy(update={"alone": 0.5}), CHECKS, form=form)
    done = harden_model(job, Store(tmp_path))
    assert done.max_kl < 1e-6
    assert done.effect.target_after.value == 1
    assert done.effect.control_after.value == 0
    assert done.effect.kl.value > 0
    assert [one.refusal_attacked is None for one in done.losses] == [True] * 3 + [False] * 3
    assert [change.goal for change in done.costs] == [0.5, 0.05]
    if form == "merged":
        assert open_subject(tmp_path / "output").n_layers == 8
    else:
        loaded = PeftModel.from_pretrained(refuser(BLOCK, word=REFUSAL).model, tmp_path / "output")
        assert any(float(p.abs().max()) > 0 for name, p in loaded.named_parameters() if "lora_B" in name)


def test_where_there_is_no_behavior_there_is_nothing_to_harden(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="answers to target prompts show refusal, and at least 8 must"):
        harden_model(HardenJob(tiny_subject("llama"), make_splits(), SMALL, CHECKS), Store(tmp_path))


def test_forms_that_hold_no_adapter_are_refused() -> None:
    assert check_hardened_form("adapter") == "adapter"
    with pytest.raises(UserError, match="--save plan: a hardened model is saved as merged or adapter"):
        check_hardened_form("plan")


# -------------------------------------------------------------------------------------------------- the command
def write_inputs(tmp_path: Path) -> list[object]:
    subject = make_subject()
    subject.model.save_pretrained(tmp_path / "model")
    subject.tokenizer.save_pretrained(tmp_path / "model")
    given: list[object] = [tmp_path / "model"]
    for group, members in make_prompts().groups.items():
        rows = [json.dumps({"prompt": p.text, "split": p.split}) for p in members]
        (tmp_path / f"{group}.jsonl").write_text("\n".join(rows))
        given += [f"--{group}", tmp_path / f"{group}.jsonl"]
    return given


def test_the_command_hardens_and_refuses_in_one_line(tmp_path: Path) -> None:
    given, out = write_inputs(tmp_path), tmp_path / "out"
    bad = {
        "--save": ("plan", "merged or adapter"),
        "--attacks": ("balanced", "takes gradients"),
        "--methods": ("nonsense", "nonsense"),
        "--steps": ("0", "give 1 or more"),
        "--wordings": (tmp_path / "nowhere.txt", "cannot be read as text"),
    }
    for option, (value, said) in bad.items():
        assert said in one_line(call("harden", *given, "--out", out, "--quiet", option, value))
    assert "--control is missing" in one_line(call("harden", *given[:3], "--out", out, "--quiet"))
    assert not out.exists()
    (tmp_path / "yes.txt").write_text("Yes, with pleasure.\n")
    assert "does not show refusal" in one_line(
        call("harden", *given, "--out", out, "--wordings", tmp_path / "yes.txt", "--quiet")
    )
    more = ["--attacks", "basic", "--methods", "basic", "--steps", "2", "--quick", "--json", "--quiet"]
    done = call("harden", *given, "--out", out, *more)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["settings"]["steps"] == 2
    assert record["behavior"] == "refusal"
    assert json.loads((out / "harden.json").read_text())["headline"] == record["headline"]
    assert "hardened" in (out / "README.md").read_text()
    assert "is in use" in one_line(call("harden", *given, "--out", out, *more))
