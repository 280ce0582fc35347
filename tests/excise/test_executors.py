"""Every executor agrees: live ≡ baked ≡ LoRA ≡ saved and reloaded; and what they do is what was meant."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.support.executors import (
    BIASED,
    CLOSE,
    EXACT,
    EXECUTORS,
    NAMES,
    RULES,
    STACKED,
    SWITCHED,
    SWITCHLESS,
    WRITERS,
    directed,
    executors,
    has_adapter,
    live,
    logits,
    opened,
    planned,
    streams,
    unedited,
)
from tests.support.pairwise import pairwise
from tests.support.plans import PlanMaker
from tests.support.tiny import run_of, tiny, tiny_config, tiny_subject, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Excise
from obliteratus.core.types import Directions, Plan, Prompt, PromptSet, Subject
from obliteratus.excise.bake.adapter import save_adapter
from obliteratus.excise.bake.tensors import bake
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.needs import wanted_by
from obliteratus.excise.plan import plan_edits
from obliteratus.probe.probe import collect_activations
from obliteratus.rebirth.save import save
from obliteratus.summon.load import assemble_subject
from obliteratus.summon.sites import find_architecture
from obliteratus.weights.matrices import read_weight

CASES = {
    "square": ("llama", WRITERS),
    "wide": ("mistral", WRITERS),
    "conv1d": ("gpt2", WRITERS),
    "tied": ("qwen2", ("embed", *WRITERS)),
    "biased": ("llama_biased", WRITERS),
    "sandwich": ("gemma2", WRITERS),
    "experts": ("mixtral", ("expert.out", "attn.out")),
    "shared experts": ("qwen2_moe", WRITERS),
    "transposed, biased experts": ("gpt_oss", WRITERS),
}
STRENGTHS = [-0.5, 0.0, 0.7, 1.0, 2.0]


def possible(case: str, executor: str, *others: Any) -> bool:
    """Whether PEFT can hold an adapter of the model, if asked to, and the rule can edit embeddings, if they are."""
    if case == "tied" and "unit_rows_rank_3" in others:
        return False
    return executor != "adapter" or has_adapter(CASES.get(case, (case,))[0])


def with_rules(rules: list[str]) -> list[tuple[str, str]]:
    """Every model with the first rule, and one model of each kind with the others: rules look at the layout alone."""
    kinds = [name for name, _ in CASES.values()]
    return [(name, rules[0]) for name in NAMES] + [(name, rule) for name in kinds for rule in rules[1:]]


# ----------------------------------------------------------------------------------------- they agree
@pytest.mark.parametrize(
    ("case", "executor", "rule", "strength"), pairwise(CASES, EXECUTORS, RULES, STRENGTHS, allowed=possible)
)
def test_agrees_with_live(
    case: str, executor: str, rule: str, strength: float, make_plan: PlanMaker, tmp_path: Path
) -> None:
    name, parts = CASES[case]
    subject = opened(name)
    plan = make_plan(subject, parts, strength=strength, norm=rule)
    expected, before = live(subject, plan), unedited(name)
    torch.testing.assert_close(EXECUTORS[executor](subject, plan, tmp_path), expected, **CLOSE)
    assert torch.allclose(expected, before, **CLOSE) == (strength == 0)
    assert torch.equal(logits(subject.model), before)


@pytest.mark.parametrize(("name", "executor"), executors(NAMES))
def test_every_family_agrees_with_live(name: str, executor: str, make_plan: PlanMaker, tmp_path: Path) -> None:
    subject = opened(name)
    plan = make_plan(subject, strength=0.8)
    expected = live(subject, plan)
    found = EXECUTORS[executor](subject, plan, tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    other = live(subject, make_plan(subject, strength=0.8, seed=1))
    assert not torch.allclose(found, other, **CLOSE)


@pytest.mark.parametrize("name", STACKED)
def test_a_missed_expert_is_noticed(name: str, make_plan: PlanMaker) -> None:
    subject = opened(name)
    plan, model = make_plan(subject), copy.deepcopy(subject.model)
    missed = next(e.site for e in plan.edits if e.site.stacked)
    for key, value in bake(subject, plan).items():
        path, _, own = key.rpartition(".")
        new = value()
        if key == missed.parameter:
            new[1] = subject.model.get_parameter(key)[1]
        setattr(model.get_submodule(path), own, nn.Parameter(new, requires_grad=False))
    assert not torch.allclose(logits(model), live(subject, plan), **CLOSE)


TWO_RULES = [
    *(("none", "none"), ("columns", "columns"), ("rows", "columns"), ("whole", "rows"), ("columns", "unit_rows")),
    ("unit_rows", "columns"),
]
LOW_RANK_RULES = [("columns", "unit_rows_rank_3"), ("unit_rows_rank_3", "columns")]


@pytest.mark.parametrize(("case", "executor", "rules"), pairwise(CASES, EXECUTORS, TWO_RULES, allowed=possible))
def test_two_edits_on_each_site(
    case: str, executor: str, rules: tuple[str, str], make_plan: PlanMaker, tmp_path: Path
) -> None:
    name, parts = CASES[case]
    subject = opened(name)
    first, second = (make_plan(subject, parts, strength=0.8, norm=r, seed=i) for i, r in enumerate(rules))
    expected = live(subject, first + second)
    torch.testing.assert_close(EXECUTORS[executor](subject, first + second, tmp_path), expected, **CLOSE)
    assert not torch.allclose(expected, live(subject, second), **CLOSE)  # the first counts


@pytest.mark.parametrize("rules", LOW_RANK_RULES)
@pytest.mark.parametrize("case", ["wide", "conv1d", "sandwich", "experts"])
def test_a_change_of_low_rank_among_others(
    case: str, rules: tuple[str, str], make_plan: PlanMaker, tmp_path: Path
) -> None:
    test_two_edits_on_each_site(case, "baked", rules, make_plan, tmp_path)


def test_an_embedding_takes_no_change_of_low_rank(make_plan: PlanMaker) -> None:
    subject = opened("qwen2")
    with (
        pytest.raises(UserError, match="to which the norm rule unit_rows_rank_3 does not apply"),
        applied(subject, make_plan(subject, ("embed",), norm="unit_rows_rank_3")),
    ):
        pass
    with pytest.raises(ValueError, match="take embed out of parts"):
        Excise(norm="unit_rows_rank_3", parts=("embed", "attn.out"))


def test_an_adapter_holds_a_change_of_low_rank_exactly(make_plan: PlanMaker, tmp_path: Path) -> None:
    subject = wide_subject()
    saved = save_adapter(subject, make_plan(subject, norm="unit_rows_rank_3"), tmp_path)
    assert saved["error"] < 1e-4
    assert save_adapter(subject, make_plan(subject, norm="unit_rows"), tmp_path)["error"] > 0.01


@pytest.mark.parametrize(("name", "executor", "rule"), pairwise(BIASED, EXECUTORS, RULES, allowed=possible))
def test_anchored_where_there_is_a_bias(
    name: str, executor: str, rule: str, make_plan: PlanMaker, tmp_path: Path
) -> None:
    subject = opened(name)
    plan = make_plan(subject, strength=0.9, norm=rule, anchored=True)
    expected = live(subject, plan)
    torch.testing.assert_close(EXECUTORS[executor](subject, plan, tmp_path), expected, **CLOSE)
    assert not torch.allclose(expected, live(subject, make_plan(subject, strength=0.9, norm=rule)), **CLOSE)


@pytest.mark.parametrize(
    ("name", "executor", "rule"),
    pairwise(
        ["gpt2", "opt", "llama", "qwen2"],
        EXECUTORS,
        ["none", "columns", "rows", "unit_rows"],
        allowed=lambda *case: case[:2] != ("opt", "adapter"),  # PEFT looks up OPT's attention mask as row numbers
    ),
)
def test_an_anchored_embedding_needs_no_bias(
    name: str, executor: str, rule: str, make_plan: PlanMaker, tmp_path: Path
) -> None:
    """Its outputs are the weight's own columns, which take the anchor. GPT-2 and OPT have one of positions too."""
    subject = opened(name)
    plan = make_plan(subject, ("embed",), strength=0.9, norm=rule, anchored=True)
    expected = live(subject, plan)
    torch.testing.assert_close(EXECUTORS[executor](subject, plan, tmp_path), expected, **CLOSE)
    bare = make_plan(subject, ("embed",), strength=0.9, norm=rule)
    assert not torch.allclose(expected, live(subject, bare), **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_the_mean_embedding_stays_where_it_is_the_anchor(name: str) -> None:
    """PROBE's anchors are the mean outputs over control prompts; after removal the mean along Q is what it was."""
    subject = opened(name)
    prompts = PromptSet({g: tuple(Prompt(f"{g} {i} {'x' * i}") for i in range(6)) for g in ("target", "control")})
    options = Excise(parts=("embed",), anchored=True)
    request = wanted_by(options, subject.sites)
    acts = collect_activations(subject, prompts, request=request)
    found = directed(subject, same=True)
    plan = plan_edits(subject, found, torch.ones(len(subject.sites)), acts, options)
    with applied(subject, plan):
        after = collect_activations(subject, prompts, request=request)
    for path, mean in acts.outputs.items():
        torch.testing.assert_close(after.outputs[path], mean, rtol=1e-4, atol=1e-4)
    with applied(subject, planned(subject, found, parts=("embed",))):
        bare = collect_activations(subject, prompts, request=request)
    assert any(not torch.allclose(bare.outputs[p], m, rtol=1e-2, atol=1e-2) for p, m in acts.outputs.items())


@pytest.mark.parametrize("rule", ["none", "columns"])
@pytest.mark.parametrize("name", SWITCHLESS)
def test_anchored_without_a_bias_is_no_merged_model(name: str, rule: str, make_plan: PlanMaker, tmp_path: Path) -> None:
    subject = opened(name)
    plan = make_plan(subject, norm=rule, anchored=True)
    with pytest.raises(UserError, match=r"needs a bias and .* has none"):
        bake(subject, plan)
    with pytest.raises(UserError, match=r"needs a bias and .* has none"):
        save(subject, plan, run_of(subject), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if has_adapter(name):
        torch.testing.assert_close(EXECUTORS["adapter"](subject, plan, tmp_path), live(subject, plan), **CLOSE)


HALVES = [WRITERS, ("attn.out",), ("mlp.out",)]


@pytest.mark.parametrize(("name", "executor", "parts"), pairwise(SWITCHED, EXECUTORS, HALVES, allowed=possible))
def test_anchored_where_a_bias_can_be_switched_on(
    name: str, executor: str, parts: tuple[str, ...], make_plan: PlanMaker, tmp_path: Path
) -> None:
    subject = opened(name)
    plan = make_plan(subject, parts, anchored=True)
    if not {p.partition(".")[0] for p in parts} <= halves(subject):
        with pytest.raises(UserError, match=r"needs a bias and .* has none"):
            bake(subject, plan)
        return
    torch.testing.assert_close(EXECUTORS[executor](subject, plan, tmp_path), live(subject, plan), **CLOSE)


def halves(subject: Subject) -> set[str]:
    return set(find_architecture(subject.model.config).bias_switch)


def biases(subject: Subject, model: Any) -> dict[str, set[bool]]:
    """Whether the writers of each half of the blocks, ``attn``, ``mlp`` …, have a bias in this model."""
    found: dict[str, set[bool]] = {}
    for site in subject.sites:
        if site.role == "writes" and site.part != "embed":
            there = getattr(model.get_submodule(site.path), site.bias, None) is not None
            found.setdefault(site.part.partition(".")[0], set()).add(there)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_lists_of_models_are_true(name: str) -> None:
    """Against the modules: which hold stacks, which have biases, and which get them by the switches declared."""
    subject = opened(name)
    assert (name in STACKED) == any(site.stacked for site in subject.sites)
    own = biases(subject, subject.model)
    assert own == {half: {name in BIASED} for half in own}
    if name in SWITCHED:
        switch = find_architecture(subject.model.config).bias_switch
        gained = biases(subject, tiny(name, **dict.fromkeys(switch.values(), True)))
        assert gained == {half: {half in switch} for half in own}


@pytest.mark.parametrize(
    ("case", "form"), [(c, "adapter") for c in CASES if possible(c, "adapter")] + [(c, "plan") for c in CASES]
)
def test_other_forms_pass_their_rescore(case: str, form: Any, make_plan: PlanMaker, tmp_path: Path) -> None:
    name, parts = CASES[case]
    subject = opened(name)
    before = logits(subject.model)
    run = save(subject, make_plan(subject, parts), run_of(subject), tmp_path / "out", form=form)
    assert run.saved["rescore"]["max_kl"] < 1e-6
    assert torch.equal(logits(subject.model), before)  # PEFT is off again


@pytest.mark.parametrize(("name", "why"), [("mixtral", "holds all experts"), ("falcon_h1", "state spaces")])
def test_what_an_adapter_cannot_hold_is_said(name: str, why: str, make_plan: PlanMaker, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{why}.*use --save merged or plan"):
        save_adapter(opened(name), make_plan(opened(name)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_too_low_a_rank_disagrees(make_plan: PlanMaker, tmp_path: Path) -> None:
    subject = opened("llama")
    plan = make_plan(subject, norm="columns")
    told = save_adapter(subject, plan, tmp_path, max_rank=1)
    assert told["rank"] == 1
    assert 0.1 < told["error"] < 1
    found = logits(PeftModel.from_pretrained(copy.deepcopy(subject.model), tmp_path))
    assert not torch.allclose(found, live(subject, plan), rtol=1e-2, atol=1e-2)


def test_without_a_rule_an_adapter_has_the_rank_of_the_subspaces(make_plan: PlanMaker, tmp_path: Path) -> None:
    subject = opened("llama")
    plan = make_plan(subject, k=2) + make_plan(subject, k=1, seed=1)
    assert save_adapter(subject, plan, tmp_path) == {"rank": 3.0, "error": 0.0}


def test_a_lossy_adapter_is_refused_by_its_rescore(make_plan: PlanMaker, tmp_path: Path) -> None:
    subject = wide_subject()
    plan = make_plan(subject, norm="rows")
    with pytest.raises(UserError, match="an adapter cannot hold a norm rule exactly"):
        save(subject, plan, run_of(subject), tmp_path / "out", form="adapter")
    assert not (tmp_path / "out").exists()


def wide_subject() -> Subject:
    """A model wider than an adapter's largest rank."""
    config = tiny_config("llama")
    config.hidden_size = 128
    config.head_dim = 32
    config.intermediate_size = 256
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(5)
    return assemble_subject(model, tiny_tokenizer(), id="wide")


# ------------------------------------------------------------------------------------- leaving no trace
@pytest.mark.parametrize(("name", "rule"), with_rules(RULES))
def test_leaving_restores_every_bit(name: str, rule: str, make_plan: PlanMaker) -> None:
    subject = opened(name)
    before, weights = logits(subject.model), {k: v.clone() for k, v in subject.model.state_dict().items()}
    parts = WRITERS if rule == "unit_rows_rank_3" else ("embed", *WRITERS)
    plan = make_plan(subject, parts, norm=rule, strength=1.3, anchored=True)
    assert not torch.allclose(live(subject, plan), before, **CLOSE)
    with pytest.raises(RuntimeError, match="planted"), applied(subject, plan):
        raise RuntimeError("planted")
    assert torch.equal(logits(subject.model), before)
    assert all(torch.equal(v, weights[k]) for k, v in subject.model.state_dict().items())


def test_a_plan_that_does_not_fit_leaves_nothing(make_plan: PlanMaker) -> None:
    subject = opened("llama")
    before = logits(subject.model)
    plan = make_plan(subject)
    broken = replace(plan.edits[-1], site=replace(plan.edits[-1].site, path="model.layers.9.nothing"))
    with (
        pytest.raises(UserError, match="which the model does not have"),
        applied(subject, replace(plan, edits=(*plan.edits, broken))),
    ):
        pass
    assert torch.equal(logits(subject.model), before)


def test_an_empty_plan_does_nothing() -> None:
    subject = opened("llama")
    with applied(subject, Plan()):
        assert not any(m._forward_hooks for m in subject.model.modules())


# -------------------------------------------------------------------------------- what reaches the stream
def left(subject: Subject, plan: Plan, found: Directions) -> Tensor:
    """Share of what each block adds to the stream that lies along its directions."""
    stream = streams(subject, plan)
    added = stream[:, 1:] - stream[:, :-1]
    along = torch.einsum("plw,lkw->plk", added, found.basis[1:])
    return along.norm(dim=-1) / added.norm(dim=-1)


@pytest.mark.parametrize(("name", "rule"), with_rules(EXACT))
def test_nothing_along_the_directions_is_written(name: str, rule: str) -> None:
    subject = opened(name)
    found = directed(subject)
    assert left(subject, planned(subject, found, norm=rule), found).max() < 1e-4
    assert left(subject, planned(subject, found, norm=rule, strength=0.5), found).mean() > 1e-2


@pytest.mark.parametrize("rule", ["rows", "unit_rows", "unit_rows_rank_3"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_rules_on_rows_put_some_back(name: str, rule: str) -> None:
    subject = opened(name)
    found = directed(subject)
    assert left(subject, planned(subject, found, norm=rule), found).mean() > 1e-2


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "olmo2"])
def test_without_its_gain_a_sandwich_norm_writes_the_direction(name: str) -> None:
    subject = opened(name)
    found = directed(subject)
    naive = replace(subject, sites=tuple(replace(s, gain=None) for s in subject.sites))
    assert left(subject, planned(naive, found), found).mean() > 1e-2


@pytest.mark.parametrize(("name", "rule"), with_rules(EXACT))
def test_with_the_embeddings_the_whole_stream_is_free(name: str, rule: str) -> None:
    subject = opened(name)
    found = directed(subject, same=True)
    plan = planned(subject, found, norm=rule, parts=("embed", *WRITERS))
    stream = streams(subject, plan)
    along = torch.einsum("plw,kw->plk", stream, found.basis[0]).norm(dim=-1) / stream.norm(dim=-1)
    assert along.max() < 1e-4


def test_an_edit_on_the_wrong_side_leaves_the_direction() -> None:
    """What shape-guessing code does to a square matrix: it projects the input."""
    subject = tiny_subject("llama")
    found = directed(subject)
    for site in subject.sites:
        if site.part == "attn.out":
            weight = subject.module(site.path).weight
            assert weight.shape[0] == weight.shape[1]
            q = found.basis[site.stream]
            weight -= weight @ q.T @ q
    q, site = found.basis[1], next(s for s in subject.sites if s.part == "attn.out")
    assert (q @ read_weight(subject.module(site.path), site)).norm() > 0.1
    right = bake(opened("llama"), planned(opened("llama"), found))[f"{site.path}.weight"]()
    assert (q @ right).norm() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_reflecting_twice_is_the_identity(name: str, make_plan: PlanMaker) -> None:
    subject = opened(name)
    once = make_plan(subject, strength=2.0)
    before = logits(subject.model)
    torch.testing.assert_close(live(subject, once + once), before, **CLOSE)
    assert not torch.allclose(live(subject, once), before, **CLOSE)


@pytest.mark.parametrize("name", ["llama_biased", "gemma2"])
def test_an_anchor_at_a_modules_own_mean_keeps_it(name: str, make_plan: PlanMaker) -> None:
    """On an output that equals its anchor nothing changes; elsewhere only the difference is removed."""
    subject = opened(name)
    plan = make_plan(subject, ("attn.out",), anchored=True)
    edit = plan.edits[0]
    seen: list[Tensor] = []
    handle = subject.module(edit.site.path).register_forward_hook(lambda m, a, y: seen.append(y))
    logits(subject.model)
    handle.remove()
    anchor = seen[0][0, -1].clone()
    with applied(subject, replace(plan, edits=(replace(edit, anchor=anchor),))):
        handle = subject.module(edit.site.path).register_forward_hook(lambda m, a, y: seen.append(y))
        logits(subject.model)
        handle.remove()
    torch.testing.assert_close(seen[1][0, -1], anchor, rtol=1e-4, atol=1e-5)
    along = (seen[1] - anchor) @ edit.basis.T
    assert along.abs().max() < 1e-4
    assert ((seen[0] - anchor) @ edit.basis.T).abs().max() > 0.1
