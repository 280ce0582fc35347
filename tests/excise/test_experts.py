"""Experts one by one: counted as they are really routed, each with its own direction, chosen, blended, steadied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.executors import CLOSE, EXECUTORS, directed, live, opened, unedited
from tests.support.pairwise import pairwise
from tests.support.plans import PlanMaker, random_basis
from tests.support.scores import is_sound
from tests.support.tiny import tiny_subject
from torch import Tensor, nn

from obliteratus.core.errors import NothingMatchedError, UserError
from obliteratus.core.probing import ProbeRequest
from obliteratus.core.results import Score
from obliteratus.core.settings import Excise, Experts
from obliteratus.core.types import (
    Activations,
    Blend,
    Edit,
    Plan,
    Prompt,
    PromptSet,
    RoutingStatistics,
    Site,
    Subject,
)
from obliteratus.excise.bake.tensors import bake
from obliteratus.excise.change import average_experts
from obliteratus.excise.experts import select_preferred_experts, turn_towards_expert
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import load_plan, plan_edits, save_plan
from obliteratus.excise.router_limit import compute_changed_share, limit_router_edits, read_chosen_experts
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.shared_prefix import MIN_PREFIX, common_prefix_length
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.probe.probe import collect_activations, load_activations, save_activations
from obliteratus.summon.coverage import summarize_plan_coverage
from obliteratus.verify.experts import rank_experts
from obliteratus.verify.intervals import student_quantile
from obliteratus.weights.matrices import expand_experts, read_bias, read_weight

NAMES = ["mixtral", "gpt_oss"]  # stacked either way, without biases and with


@pytest.fixture(scope="module")
def many() -> PromptSet:
    things = ["stars", "the moon", "a comet", "suns", "planets far away", "dust", "rings", "orbits", "mars", "io"]
    foods = ["rice", "a large pot of soup", "eggs", "peas", "bread", "fish", "beans", "corn", "leeks", "oats"]
    target, control = [f"Tell me about {x}." for x in things], [f"How do I cook {x}?" for x in foods]
    return PromptSet({"target": tuple(map(Prompt, target)), "control": tuple(map(Prompt, control))})


def stacks(subject: Subject) -> list[Site]:
    return [s for s in subject.sites if s.stacked and s.role == "writes"]


def probed(subject: Subject, prompts: PromptSet) -> Activations:
    return collect_activations(subject, prompts, request=ProbeRequest(expert_modules=[s.path for s in stacks(subject)]))


def routed(mean: Tensor, count: Sequence[int], spread: float = 0.0, prompts: int = 10) -> RoutingStatistics:
    """spread: variance of each expert's outputs, summed over their coordinates."""
    share, square = torch.tensor(count) / prompts, mean.square().sum(1) + spread
    return RoutingStatistics(share, share * (1 - share), prompts, torch.tensor(count), mean, square)


# ------------------------------------------------------------------------------------- router statistics
def by_hand(
    subject: Subject, prompts: Sequence[Prompt], site: Site, skipped: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Share of each prompt's tokens behind the skipped ones; at the last, count, mean output and mean squared length
    of each expert; one prompt at a time, in fp64."""
    found: list[list[Tensor]] = [[] for _ in expand_experts(subject.module(site.path), site)]
    shares = []
    for row in render_prompts(subject, list(prompts)):
        given: list[tuple[Tensor, Tensor]] = []
        hook = subject.module(site.path).register_forward_pre_hook(
            lambda m, args, given=given: given.append((args[0].reshape(-1, args[0].shape[-1]), args[1]))
        )
        with torch.no_grad():
            subject.model(torch.tensor([row]))
        hook.remove()
        x, every = given[0][0][-1], given[0][1]
        shares.append([sum(e in own for own in every[skipped:].tolist()) / (len(row) - skipped) for e in range(4)])
        for expert in every[-1].tolist():
            found[expert].append(alone(subject.module(site.path), x.double(), expert))
    outputs = [torch.stack(o) if o else torch.zeros(0, subject.width, dtype=torch.float64) for o in found]
    n = torch.tensor([len(o) for o in outputs])
    means = torch.stack([o.sum(0) / max(len(o), 1) for o in outputs])
    return (
        torch.tensor(shares, dtype=torch.float64),
        n,
        means,
        torch.stack([o.square().sum() / max(len(o), 1) for o in outputs]),
    )


def alone(module: Any, x: Tensor, expert: int) -> Tensor:
    """One expert's output, from the architecture's papers and not from the library."""
    weights = {name: p.detach().double()[expert] for name, p in module.named_parameters()}
    if "down_proj_bias" in weights:  # gpt-oss: interleaved, clamped, with a sigmoid of 1.702 x
        both = x @ weights["gate_up_proj"] + weights["gate_up_proj_bias"]
        gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ weights["down_proj"] + weights["down_proj_bias"]
    gate, up = (weights["gate_up_proj"] @ x).chunk(2)
    return weights["down_proj"] @ (nn.functional.silu(gate) * up)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_counted_is_what_each_prompt_was_routed_to(name: str, many: PromptSet) -> None:
    subject = opened(name)
    acts = probed(subject, many)
    for site in stacks(subject):
        n = common_prefix_length(
            render_prompts(subject, [prompt for members in many.groups.values() for prompt in members])
        )
        skipped = n if n >= MIN_PREFIX else 0
        for group, members in many.groups.items():
            shares, count, mean, square = by_hand(subject, members, site, skipped)
            found = acts.routed[site.path][group]
            torch.testing.assert_close(found.share.double(), shares.mean(0), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(found.variance.double(), shares.var(0), rtol=1e-4, atol=1e-7)
            assert torch.equal(found.count, count)
            assert int(count.sum()) == 2 * len(members) == 2 * found.prompts  # the top 2, and no soft share of all
            torch.testing.assert_close(found.mean.double(), mean, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found.square.double(), square, rtol=1e-4, atol=1e-6)


def test_counting_adds_no_pass_and_leaves_the_stream_alone(many: PromptSet) -> None:
    subject = opened("mixtral")
    passes: list[int] = []
    hook = subject.model.base_model.register_forward_pre_hook(lambda m, args: passes.append(1))
    plain = collect_activations(subject, many)
    without = len(passes)
    counted = probed(subject, many)
    hook.remove()
    assert len(passes) == 2 * without
    assert all(torch.equal(plain[g].mean, counted[g].mean) for g in many.groups)


def test_later_passes_see_what_the_edited_experts_put_out(many: PromptSet, make_plan: PlanMaker) -> None:
    subject = opened("mixtral")
    for norm in ("none", "columns"):
        plan = make_plan(subject, ("expert.out",), norm=norm)
        with applied(subject, plan):
            acts = probed(subject, many)
        for edit in plan.edits:
            mean = acts.routed[edit.site.path]["target"].mean
            assert (mean @ edit.basis.T).norm() < 1e-4 * mean.norm()
    free = probed(subject, many).routed[plan.edits[0].site.path]["target"].mean
    assert (free @ plan.edits[0].basis.T).norm() > 1e-2 * free.norm()


def test_activations_go_to_disk_and_back(many: PromptSet, tmp_path: Path) -> None:
    acts = probed(opened("gpt_oss"), many)
    save_activations(acts, tmp_path)
    found = load_activations(tmp_path).routed
    assert found.keys() == acts.routed.keys()
    for path, groups in acts.routed.items():
        assert groups.keys() == found[path].keys()
        for group, mine in groups.items():
            assert found[path][group].prompts == mine.prompts
            assert all(
                torch.equal(vars(found[path][group])[k], vars(mine)[k])
                for k in ("share", "variance", "count", "mean", "square")
            )


# --------------------------------------------------------------------------------------- own directions
def test_without_noise_an_expert_loses_its_own_difference() -> None:
    delta = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    basis = random_basis(12, 1, 1)
    found = turn_towards_expert(basis, routed(delta, [5] * 4), routed(torch.zeros(4, 12), [5] * 4), 2)
    unit = delta[2] / delta[2].norm()
    torch.testing.assert_close(found[0] * torch.sign(found[0] @ unit), unit)


@pytest.mark.parametrize("k", [1, 3])
def test_the_shrunk_direction_is_james_and_steins(k: int) -> None:
    """Golden, fp64: what is along the basis stays, the rest is multiplied by 1 − noise / length²."""
    generator = torch.Generator().manual_seed(k)
    basis = random_basis(16, k, 1, torch.float64)
    target, control = (torch.randn(4, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    groups = routed(target, [6] * 4, spread=3.0), routed(control, [11] * 4, spread=2.0)
    found = turn_towards_expert(basis, *groups, 1)
    delta = target[1] - control[1]
    inside = basis.T @ basis @ delta
    rest = delta - inside
    factor = 1 - (3.0 / 5 + 2.0 / 10) * (16 - k) / 16 / float(rest @ rest)
    assert 0 < factor < 1
    wanted = inside + factor * rest
    torch.testing.assert_close(found @ found.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.T @ found @ wanted, wanted)  # it lies in the new subspace
    others = basis - torch.outer(basis @ inside, inside) / (inside @ inside)
    torch.testing.assert_close(found.T @ found @ others.T, others.T)  # and so does what stood across it


@pytest.mark.parametrize(("count", "spread"), [([0, 9], 0.0), ([1, 9], 0.0), ([9, 9], 1e6)])
def test_few_or_noisy_prompts_leave_the_layers_direction(count: list[int], spread: float) -> None:
    basis = random_basis(8, 2, 0)
    mean = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
    found = turn_towards_expert(basis, routed(mean, count, spread=spread), routed(0 * mean, [9, 9], spread=spread), 0)
    assert torch.equal(found, basis)
    clear = turn_towards_expert(basis, routed(mean, [9, 9]), routed(0 * mean, [9, 9]), 0)
    assert not torch.allclose(clear, basis, atol=1e-2)


# ----------------------------------------------------------------------------------------------- ranking
def test_the_experts_that_target_prompts_draw_on_come_first() -> None:
    zeros = torch.zeros(4, 3)
    groups = {"target": routed(zeros, [2, 9, 0, 9]), "control": routed(zeros, [9, 8, 0, 2])}
    assert select_preferred_experts(groups, 0.25).tolist() == [3]
    assert select_preferred_experts(groups, 0.5).tolist() == [1, 3]
    assert select_preferred_experts(groups, 0.01).tolist() == [3]
    ranked = rank_experts(Activations({}, -1, routed={"here": groups}))
    assert [r.expert for r in ranked] == [3, 1, 2, 0]
    assert ranked[0].excess.value == pytest.approx(0.7)
    assert not ranked[0].excess.has_interval  # of ten prompts a group


def test_the_excess_has_welchs_interval() -> None:
    counts = {"target": [18, 2], "control": [4, 16]}
    groups = {group: routed(torch.zeros(2, 3), count, prompts=20) for group, count in counts.items()}
    first, last = rank_experts(Activations({}, -1, routed={"here": groups}))
    assert (first.expert, last.expert) == (0, 1)
    assert first.excess.value == pytest.approx(0.7)
    parts = [0.9 * 0.1 / 20, 0.2 * 0.8 / 20]
    freedom = sum(parts) ** 2 / sum(part**2 / 19 for part in parts)
    half = student_quantile(freedom) * sum(parts) ** 0.5
    assert (first.excess.low, first.excess.high) == (pytest.approx(0.7 - half), pytest.approx(0.7 + half))
    assert first.excess.low > 0 > last.excess.high


# --------------------------------------------------------------------------------------------- the plan
def planned(subject: Subject, many: PromptSet, experts: Experts | None, **options: Any) -> Plan:
    acts = probed(subject, many)
    weights = torch.tensor([1.0 if s.stacked else 0.0 for s in subject.sites])
    return plan_edits(subject, directed(subject), weights, acts, Excise(experts=experts, **options))


def test_shares_and_strengths_follow_the_routing(many: PromptSet) -> None:
    subject = opened("mixtral")
    acts = probed(subject, many)
    plan = planned(subject, many, Experts(share=0.25, rest=0.5), strength=2.0)
    for site in stacks(subject):
        mine = {e.site.expert: e.strength for e in plan.edits if isinstance(e, Edit) and e.site.path == site.path}
        first = select_preferred_experts(acts.routed[site.path], 0.25).tolist()
        assert mine == {e: 2.0 if e in first else 1.0 for e in range(4)}
    few = planned(subject, many, Experts(share=0.25))
    assert len(few.edits) == len(stacks(subject))
    assert summarize_plan_coverage(subject, few)["edited_share"] == pytest.approx(
        summarize_plan_coverage(subject, planned(subject, many, None))["edited_share"] / 4
    )


def test_own_directions_differ_between_experts(many: PromptSet) -> None:
    subject = opened("mixtral")
    bases = [e.basis for e in planned(subject, many, Experts(own=True)).edits if isinstance(e, Edit)]
    assert len(bases) == 4 * len(stacks(subject))
    assert len({tuple(b.flatten().tolist()) for b in bases}) > len(stacks(subject))
    shared = [e.basis for e in planned(subject, many, Experts(share=0.5, rest=1.0)).edits if isinstance(e, Edit)]
    assert len({tuple(b.flatten().tolist()) for b in shared}) == len(stacks(subject))


CASES: dict[str, tuple[Experts, dict[str, Any]]] = {
    "own": (Experts(own=True), {}),
    "own and ruled": (Experts(own=True), {"norm": "columns"}),
    "some": (Experts(share=0.5, rest=0.25), {"strength": 1.5}),
    "blended": (Experts(share=0.5, blend=0.3), {"norm": "columns"}),
    "all at once": (Experts(own=True, share=0.5, rest=-0.5, blend=1.0), {"norm": "rows"}),
}


@pytest.mark.parametrize(("name", "case", "executor"), pairwise(NAMES, CASES, ["baked", "reloaded"]))
def test_executors_agree(name: str, case: str, executor: str, many: PromptSet, tmp_path: Path) -> None:
    subject = opened(name)
    experts, options = CASES[case]
    plan = planned(subject, many, experts, **options)
    save_plan(plan, tmp_path)
    expected = live(subject, load_plan(tmp_path))
    found = EXECUTORS[executor](subject, plan, tmp_path)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not torch.allclose(expected, unedited(name), atol=1e-3)


# ------------------------------------------------------------------------------------------------ blends
@pytest.mark.parametrize("name", NAMES)
def test_a_blend_is_the_weighted_mean_and_nothing_else_changes(name: str) -> None:
    subject = opened(name)
    site = stacks(subject)[0]
    ones = expand_experts(subject.module(site.path), site)
    plan = Plan((Blend(ones[1], torch.tensor([0, 3]), 0.3),), subject.source.digest)
    made = bake(subject, plan)
    old = subject.module(site.path).get_parameter(site.weight)
    new = made[site.parameter]()
    wanted = 0.7 * old[1].double() + 0.3 * (old[0].double() + old[3].double()) / 2
    torch.testing.assert_close(new[1].double(), wanted, rtol=1e-5, atol=1e-7)
    assert [torch.equal(a, b) for a, b in zip(old, new, strict=True)] == [True, False, True, True]
    biases = [read_bias(subject.module(site.path), one) for one in ones]
    if biases[0] is not None:
        b = torch.stack([x for x in biases if x is not None]).double()
        torch.testing.assert_close(made[f"{site.path}.{site.bias}"]()[1].double(), 0.7 * b[1] + 0.15 * (b[0] + b[3]))


def test_the_mean_holds_one_matrix_whatever_the_number_of_donors() -> None:
    subject = opened("mixtral")
    site = stacks(subject)[0]
    ones = expand_experts(subject.module(site.path), site)
    whole = torch.stack([read_weight(subject.module(site.path), one) for one in ones]).double().mean(0)
    torch.testing.assert_close(
        average_experts(partial(read_weight, subject.module(site.path)), ones).double(), whole, rtol=1e-5, atol=1e-7
    )


def test_a_weaker_plan_blends_less() -> None:
    site = expand_experts(opened("mixtral").module("model.layers.0.mlp.experts"), stacks(opened("mixtral"))[0])[0]
    change = Plan((Blend(site, torch.tensor([1]), 0.4),)).scaled(0.5).edits[0]
    assert isinstance(change, Blend)
    assert change.share == pytest.approx(0.2)


@pytest.mark.parametrize(("expert", "donors"), [(4, [0]), (0, [4]), (0, [-1]), (None, [1])])
def test_experts_that_are_not_there_are_refused(expert: int | None, donors: list[int]) -> None:
    subject = opened("mixtral")
    site = replace(stacks(subject)[0], expert=expert)
    with (
        pytest.raises(UserError, match="the plan edits experts"),
        applied(subject, Plan((Blend(site, torch.tensor(donors), 0.5),), subject.source.digest)),
    ):
        pass


# ------------------------------------------------------------------------------------------- what is asked
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"experts": {}}, "changes nothing"),
        ({"experts": {"own": True, "blend": 0.1}}, "set a share below 1"),
        ({"experts": {"own": True}, "parts": ["attn.out"]}, "needs the part expert.out"),
        ({"experts": {"own": True, "share": 0.0}}, "share"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        load_recipe("basic", {"excise": options})


def test_paths_reach_what_a_recipe_leaves_out() -> None:
    assert load_recipe("basic", {"excise.experts.own": True, "excise.experts.share": 0.5}).excise.experts == Experts(
        own=True, share=0.5
    )
    with pytest.raises(UserError, match="heads"):
        load_recipe("basic", {"excise.heads.share": 0.5})


def test_a_stack_that_is_not_edited_is_an_error_and_a_dense_model_is_none(many: PromptSet) -> None:
    subject = opened("mixtral")
    acts, options = probed(subject, many), Excise(experts=Experts(own=True))
    attention = torch.tensor([1.0 if s.part == "attn.out" else 0.0 for s in subject.sites])
    with pytest.raises(NothingMatchedError, match="no stack of experts is edited"):
        plan_edits(subject, directed(subject), attention, acts, options)
    dense = tiny_subject("llama")
    plan = plan_edits(dense, directed(dense), torch.ones(len(dense.sites)), collect_activations(dense, many), options)
    assert all(e.site.expert is None for e in plan.edits)


def test_a_run_records_the_ranking(many: PromptSet) -> None:
    changed = {"excise": {"experts": {"own": True}}, "verify": [{"use": "first_token_kl"}]}
    plan, found, *_ = run(load_recipe("basic", changed), opened("mixtral"), many, force=True)
    told = found.passes[0]["experts"]
    assert told == sorted(told, key=lambda one: -one["value"])
    assert told
    assert all(is_sound(Score(**{key: one[key] for key in Score.model_fields})) for one in told)
    assert any(e.site.expert is not None for e in plan.edits)
    plain = run(load_recipe("basic", {"verify": changed["verify"]}), opened("mixtral"), many, force=True).run
    assert plain.passes[0]["experts"] == []


# ----------------------------------------------------------------------------------------------- routers
def routers(subject: Subject, strength: float, k: int = 2) -> Plan:
    """Router edits along the largest directions of what the routers themselves read by."""
    edits = []
    for site in (s for s in subject.sites if s.part == "router"):
        rows = torch.linalg.svd(read_weight(subject.module(site.path), site), full_matrices=False)[2][:k]
        edits.append(Edit(site, rows.contiguous(), strength))
    return Plan(tuple(edits), subject.source.digest)


def test_router_edits_that_send_prompts_elsewhere_are_weakened(many: PromptSet, make_plan: PlanMaker) -> None:
    subject = opened("mixtral")
    rest = make_plan(subject, ("attn.out",))
    plan = rest + routers(subject, 2.0)
    found = limit_router_edits(subject, Plan(), plan, many["control"])
    strengths = {e.strength for e in found.edits if e.site.part == "router" and isinstance(e, Edit)}
    assert len(strengths) == 1
    assert 0 < strengths.pop() < 2.0
    assert [e for e in found.edits if e.site.part != "router"] == list(rest.edits)
    ids, paths = render_prompts(subject, many["control"]), [s.path for s in stacks(subject)]
    shares = []
    for edits in (rest, found, plan):
        with applied(subject, edits):
            shares.append(read_chosen_experts(subject, ids, paths))
    assert (
        float(compute_changed_share(shares[0], shares[1]).mean())
        <= 0.25
        < float(compute_changed_share(shares[0], shares[2]).mean())
    )


def test_router_edits_that_change_little_stay(many: PromptSet, make_plan: PlanMaker) -> None:
    subject = opened("mixtral")
    gentle, none = routers(subject, 1e-4), make_plan(subject, ("expert.out",))
    assert [
        e.strength for e in limit_router_edits(subject, Plan(), gentle, many["control"]).edits if isinstance(e, Edit)
    ] == [e.strength for e in gentle.edits if isinstance(e, Edit)]
    assert limit_router_edits(subject, Plan(), none, many["control"]) is none


def test_moved_counts_sets_and_not_their_order() -> None:
    before, after = torch.tensor([[[0, 1], [2, 3]]]), torch.tensor([[[1, 0], [3, 1]]])
    assert compute_changed_share(before, after).tolist() == [[0.0, 0.5]]
