"""How deep edits may begin: a refuser whose block is known, against baked weights, and where nothing is to be found."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from tests.support.contexts import (
    check_finding,
    context_of_model,
    refusing_context,
    with_direction,
    with_random_direction,
    with_same_groups,
)
from tests.support.refuser import END, LAYERS, REFUSAL, asked, shuffled
from tests.support.tiny import tiny_subject
from torch import Tensor

from obliteratus.analyze import AnalysisContext, analyses, analyze
from obliteratus.analyze.answer_check import AnswerCheck, AnsweredEdit, measure_rate
from obliteratus.analyze.reach import (
    Reach,
    choose_first_blocks,
    compute_remaining_behavior,
    find_effective_depths,
    find_typical_first_tokens,
    find_working_parts,
    measure_reach,
    plan_removal_from,
    rank_by_effect,
    rank_edits,
)
from obliteratus.core.probing import ProbeRequest
from obliteratus.core.results import Score
from obliteratus.core.settings import Step
from obliteratus.core.types import Edit, Plan, PromptSet
from obliteratus.distill import find_directions
from obliteratus.inference.chat_template import render_prompts
from obliteratus.probe.probe import collect_activations

ALL = {"depths": LAYERS, "low": 0.0, "prompts": 12, "tokens": 4}


@cache
def reached(block: int) -> Reach:
    """The finding of the refuser whose attention in this block writes the refusal."""
    return measure_reach(refusing_context(block=block), **ALL)


@cache
def half_reached() -> tuple[AnalysisContext, Reach]:
    """With a direction half way between the refusal's and another."""
    eye = torch.eye(32)
    context = with_direction(refusing_context(block=4), eye[REFUSAL] + eye[END + 3])
    return context, measure_reach(context, **{**ALL, "depths": 4, "tries": 0})


@pytest.mark.parametrize("block", [2, 4])
def test_removal_works_from_the_block_that_refuses_and_from_none_above(block: int) -> None:
    found = reached(block)
    assert found.depths == tuple(range(LAYERS))
    assert found.effective_depths == tuple(range(block + 1))
    assert found.tokens == ("N",)
    assert all(abs(s.value - 1) < 1e-3 for s in found.remaining["both"][block + 1 :])
    assert f"from block {block} on" in found.summary()
    check_finding(found, ["first edited block", "behavior remaining", "KL on controls (nats)"])


def test_the_part_that_writes_it_is_told_from_the_other() -> None:
    """Attention writes the refusal; no MLP does."""
    found = reached(4)
    assert found.remaining["attention"][2].value < 0.05
    assert abs(found.remaining["mlp"][2].value - 1) < 1e-3
    assert found.works("attention")
    assert not found.works("mlp")
    assert found.parts == ("both", "attention", "mlp")


@pytest.mark.parametrize("layer", [1, 3])
def test_what_is_left_is_that_of_baked_weights(layer: int) -> None:
    """A direction half beside the refusal's, by copies of the weights in double precision, one prompt at a time."""
    context, reach = half_reached()
    base, after = both(context, layer)
    token = find_typical_first_tokens(base["target"], base["control"])
    mass = {g: base[g][:, token].exp().sum(1).mean() for g in base}
    left = (after["target"][:, token].exp().sum(1).mean() - mass["control"]) / (mass["target"] - mass["control"])
    found = reach.remaining["both"][reach.depths.index(layer)]
    assert found.value == pytest.approx(float(left), abs=1e-4)
    assert 0.01 < found.value < 0.99
    assert found.n == 12


@pytest.mark.parametrize("layer", [0, 1])
def test_what_it_costs_is_that_of_baked_weights(layer: int) -> None:
    context = with_direction(
        context_of_model(tiny_subject("llama_biased"), asked()), torch.randn(32, generator=torch.manual_seed(1))
    )
    base, after = both(context, layer)
    p, q = base["control"], after["control"]
    found = measure_reach(context, **ALL).kl["both"][layer].value
    assert found == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
    assert found > 1e-5


def both(context: AnalysisContext, layer: int) -> list[dict[str, Tensor]]:
    """Log-probabilities by group of the model and of a copy whose blocks from the layer on write nothing along d."""
    subject = context.subject
    plain, d = copy.deepcopy(subject.model).double(), context.directions.basis[-1, 0].double()
    models = (plain, cut(plain, layer, d))
    rows = {group: render_prompts(subject, context.held_out[group]) for group in ("target", "control")}
    return [{g: torch.stack([logits(m, row) for row in ids]) for g, ids in rows.items()} for m in models]


def cut(model: torch.nn.Module, layer: int, d: Tensor) -> torch.nn.Module:
    model = copy.deepcopy(model)
    for block in model.model.layers[layer:]:
        for writer in (block.self_attn.o_proj, block.mlp.down_proj):
            writer.weight.data -= torch.outer(d, d @ writer.weight)
            if writer.bias is not None:
                writer.bias.data -= d * (d @ writer.bias)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module, row: list[int]) -> Tensor:
    return model(torch.tensor([row])).logits[0, -1].log_softmax(-1)


def test_anchors_and_oblique_directions_are_used_where_they_are() -> None:
    """The context is edited as the recipe would: anchored, controls lose nothing that they all have."""
    subject = tiny_subject("llama_biased")
    plain = context_of_model(subject, asked())
    paths = [s.path for s in subject.sites if s.role == "writes" and s.part in ("attn.out", "mlp.out")]
    anchored = replace(plain, activations=collect_activations(subject, asked(), request=ProbeRequest(paths)))
    oblique = replace(anchored, directions=find_directions(anchored.activations, [Step(use="leace")]))
    contrasted = collect_activations(subject, asked(), request=ProbeRequest(contrast_modules=paths))
    least = replace(plain, activations=contrasted)
    cost = [measure_reach(g, **ALL).kl["both"][0].value for g in (plain, anchored, oblique, least)]
    assert len({round(c, 9) for c in cost}) == 4
    assert cost[1] < cost[0]
    assert cost[3] < cost[0]


def test_the_cheapest_edits_are_answered_up_to_one_that_ends_refusals() -> None:
    """N is no refusal in words: with "Sorry" for it, edits that leave nothing are answered, the deepest first."""
    context = refusing_context(block=3, word="Sorry, I can't help with that.")
    found = measure_reach(context, **{**ALL, "depths": 4})
    (first, *rest) = found.answered
    assert not rest
    assert (first.part, first.depth, first.shown.value, first.shown.n) == ("attention", 3, 0.0, 12)
    assert first.degenerate is not None
    assert (first.degenerate.value, first.degenerate.n) == (0.0, 24)
    assert found.is_fluent(first)
    assert found.unedited_degenerate is None  # nobody needed to ask
    assert "in attention from block 3 on, 0.0% of 12 prompts show it, and 0.0% of answers are" in found.summary()
    assert measure_rate(context, Plan(), context.held_out["target"], 4).value == 1.0  # negative control
    assert measure_reach(context, **{**ALL, "depths": 1, "tries": 0}).answered == ()


def test_what_leaves_much_or_costs_more_is_not_answered_first() -> None:
    score = lambda x: Score(value=x, low=x, high=x, n=4, unit="")  # noqa: E731
    shares = {"both": (0.0, 0.05), "mlp": (0.0, 0.3), "random": (0.0, 0.0)}
    nats = {"both": (0.4, 0.1), "mlp": (0.1, 0.0), "random": (0.0, 0.0)}
    left, cost = ({p: tuple(map(score, row)) for p, row in table.items()} for table in (shares, nats))
    assert rank_edits((5, 7), left, cost) == [("mlp", 5), ("both", 7), ("both", 5)]


def test_others_follow_by_what_they_leave() -> None:
    score = lambda x: Score(value=x, low=x, high=x, n=4, unit="")  # noqa: E731
    left = {"both": (0.2, 0.204, 0.5), "mlp": (0.3, 0.9, 1.0), "random": (0.0, 0.0, 0.0)}
    cells = {part: tuple(map(score, row)) for part, row in left.items()}
    assert rank_by_effect((5, 7, 9), cells)[:4] == [("both", 7), ("both", 5), ("mlp", 5), ("both", 9)]


# ---------------------------------------------------------------------------------------------------- fluency
LONG = "Sorry, I can't help with that."


def make_check() -> AnswerCheck:
    context = refusing_context(block=3, word=LONG)
    targets, controls = context.held_out["target"], context.held_out["control"]
    plan_of = partial(plan_removal_from, context, context.directions, ("attn.out",))
    return AnswerCheck(
        context, lambda part, layer: plan_of(layer), targets, {"target": targets, "control": controls}, 4
    )


def test_usual_loops_are_those_of_control_answers() -> None:
    """Refusals do not loop: a model that loops on half of its control answers is not held to its refusals."""
    check = make_check()
    assert check.measure_usual_loops().value == 0
    check.checked = {**check.checked, "control": check.checked["target"]}  # negative control: other prompts are read
    assert check.measure_usual_loops().n == len(check.checked["target"])


def test_loops_are_seen_in_answers_of_both_groups() -> None:
    """Where END is removed from all that is written, no answer ends: "YYYY …"."""
    check, basis = make_check(), torch.eye(32)[[REFUSAL, END]]
    writers = [site for site in check.context.subject.sites if site.role == "writes"]
    plan = Plan(tuple(Edit(s, basis, 1.0, "none", None) for s in writers), check.context.subject.source.digest)
    shown, loops = check.measure_answers(plan)
    assert (shown.value, loops.value, loops.n) == (0.0, 1.0, 24)
    shown, loops = check.measure_answers(Plan())  # negative control
    assert (shown.value, loops.value) == (1.0, 0.0)


class PlantedCheck(AnswerCheck):
    """With planted answers: part and depth → (share shown, share degenerate)."""

    planted: Mapping[tuple[str, int], tuple[float, float]]
    unedited: float

    def answer(self, part: str, layer: int) -> AnsweredEdit:
        shown = self.planted[part, layer][0]
        return AnsweredEdit(part, layer, Score(value=shown, low=shown, high=shown, n=48, unit="share"))

    def measure_answers(self, plan: Plan) -> tuple[Score, Score]:
        shares = self.planted["attention", plan.edits[0].site.layer]
        shown, loops = (Score(value=share, low=share, high=share, n=48, unit="share") for share in shares)
        return shown, loops

    def measure_usual_loops(self) -> Score:
        return Score(value=self.unedited, low=self.unedited, high=self.unedited, n=24, unit="share")


def planted(shares: dict[int, tuple[float, float]], unedited: float = 0.0) -> PlantedCheck:
    check = PlantedCheck(**vars(make_check()))
    check.planted = {("attention", layer): pair for layer, pair in shares.items()}
    check.unedited = unedited
    return check


def find(check: PlantedCheck, ranked: Sequence[int], others: Sequence[int], tries: int = 6) -> list[AnsweredEdit]:
    cells = ([("attention", layer) for layer in layers] for layers in (ranked, others))
    return list(check.find_fluent_edit(*cells, tries, lambda done: None))


def test_an_edit_that_ends_fluency_too_is_passed_over() -> None:
    shares = {1: (0.0, 0.3), 2: (0.1, 0.0), 3: (0.0, 0.05), 4: (0.0, 0.0)}
    found = find(planted(shares), [1, 2, 3, 4], [])
    assert [edit.depth for edit in found] == [1, 2, 3]  # 4 is dearer, and not needed
    assert [edit.degenerate is not None for edit in found] == [True, False, True]
    tolerant = find(planted(shares, unedited=0.25), [1, 2, 3, 4], [])  # negative control: no more than before the edit
    assert [edit.depth for edit in tolerant] == [1]


def test_two_loops_are_within_chance() -> None:
    """In few answers two of them are more than the margin."""
    found = replace(reached(4), unedited_degenerate=None)
    for n, loops, fluent in ((24, 2, True), (24, 3, False), (100, 5, True), (100, 6, False)):
        edit = AnsweredEdit("both", 4, score_of(0.0), score_of(loops / n, n))
        assert found.is_fluent(edit) == fluent
        assert (
            replace(found, unedited_degenerate=score_of(1 / n, n)).is_fluent(
                edit._replace(degenerate=score_of((loops + 1) / n, n))
            )
            == fluent
        )


def score_of(value: float, n: int = 24) -> Score:
    return Score(value=value, low=value, high=value, n=n, unit="share")


def test_where_no_edit_is_fluent_others_are_tried() -> None:
    shares = {1: (0.0, 0.3), 2: (0.1, 0.0), 5: (0.2, 0.0), 6: (0.3, 0.0), 7: (0.4, 0.0)}
    found = find(planted(shares), [1, 2], [1, 2, 5, 6, 7], tries=3)
    assert [edit.depth for edit in found] == [1, 2, 5, 6]  # 2 is checked for loops, then 5 and 6 make three
    assert all(edit.degenerate is not None for edit in found)
    assert find(planted(shares), [1, 2], [5], tries=0) == []
    loops = {layer: (0.0, 0.3) for layer in range(1, 6)} | {6: (0.5, 0.0)}
    assert [edit.depth for edit in find(planted(loops), [1, 2, 3, 4, 5], [6])] == [1, 2, 6]  # no third dearer one


def test_without_typical_first_tokens_answers_say_what_is_left() -> None:
    """Half of either group begins with the refusal, so no first token is typical of target prompts."""
    context = refusing_context(block=3, word=LONG)
    mixed = replace(context, held_out=shuffled(asked()))
    found = measure_reach(mixed, **{**ALL, "depths": 4, "tries": 2})
    assert found.tokens == ()
    assert [(edit.part, edit.depth) for edit in found.answered] == [("both", depth) for depth in found.depths[:2]]
    assert "of answers are degenerate" in found.summary()
    controls = PromptSet({group: asked()["control"] for group in ("target", "control")})
    nothing = measure_reach(replace(context, held_out=controls), **{**ALL, "depths": 4})  # negative control
    assert nothing.tokens == nothing.answered == ()


@pytest.mark.parametrize(
    ("n", "low", "most", "blocks"),
    [(30, 0.3, 7, [11, 14, 17, 20, 23, 26, 29]), (4, 0.0, 9, [0, 1, 2, 3]), (1, 0.3, 8, [0])],
)
def test_depths_end_at_the_last_block(n: int, low: float, most: int, blocks: list[int]) -> None:
    assert choose_first_blocks(n, low, most) == blocks


# ------------------------------------------------------------------------------------------------------- nulls
@pytest.mark.parametrize("seed", range(2))
def test_random_directions_find_nothing(seed: int) -> None:
    found = measure_reach(with_random_direction(refusing_context(), seed), **{**ALL, "depths": 4})
    assert found.effective_depths == ()
    assert all(abs(s.value - 1) < 0.1 for s in found.remaining["both"])
    assert "from no depth on" in found.summary()


def test_a_depth_at_which_any_direction_does_as_much_is_not_found() -> None:
    """Of 32 dimensions, removing a random one in every block moves this model's answers."""
    found = reached(2)
    assert found.effective_depths[0] == 0
    assert any(s.value < 0.5 for s in found.remaining["random"])
    noise = 0.05 * torch.randn(4, 12, 3, generator=torch.Generator().manual_seed(0))
    little, much = 0.1 + noise[0], 0.9 + noise[1]
    assert find_effective_depths({"both": little, "random": much}, (1, 2, 3)) == (1, 2, 3)
    assert find_effective_depths({"both": little, "random": 0.1 + noise[2]}, (1, 2, 3)) == ()
    assert find_effective_depths({"both": 0.6 + noise[0], "random": much}, (1, 2, 3)) == ()
    assert find_effective_depths({"both": little[:5], "random": much[:5]}, (1, 2, 3)) == ()  # too few prompts


def test_parts_that_do_nothing_are_found_working_no_more_often_than_the_level() -> None:
    found = 0
    for seed in range(200):
        noise = 0.1 * torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(seed))
        left = dict(zip(("both", "attention", "mlp"), 1 + noise, strict=True)) | {"random": torch.zeros(12, 8)}
        found += bool(find_working_parts(left))
        left["mlp"][:, 3] -= 1
        assert "mlp" in find_working_parts(left)
    assert found <= 21  # the binomial's 99.9 % point


@pytest.mark.parametrize("null", ["same", "shuffled"])
def test_groups_that_do_not_differ_find_nothing(null: str) -> None:
    context: AnalysisContext = refusing_context()
    context = with_same_groups(context) if null == "same" else replace(context, held_out=shuffled(asked()))
    found = measure_reach(context, **{**ALL, "depths": 4})
    assert found.effective_depths == ()
    assert not found.tokens or null == "shuffled"
    check_finding(found, ["first edited block"])


def test_no_directions_leave_the_model_as_it_is() -> None:
    context = with_same_groups(context_of_model(tiny_subject("llama"), asked()))
    found = measure_reach(
        replace(context, directions=find_directions(context.activations, [Step(use="mean_diff")])), **ALL
    )
    assert all(s.value < 1e-6 for s in found.kl["both"])
    assert all(s.value == 1 for s in found.remaining["both"])


# ---------------------------------------------------------------------------------------------------- parts of it
def test_first_tokens_are_those_that_are_likely_and_typical() -> None:
    target = torch.tensor([[0.5, 0.3, 0.04, 0.16], [0.5, 0.3, 0.04, 0.16]]).log()
    control = torch.tensor([[0.01, 0.2, 0.0, 0.79]]).log()
    assert find_typical_first_tokens(target, control) == (0,)
    assert find_typical_first_tokens(control, control) == ()


def test_what_remains_is_one_before_and_zero_as_controls_are() -> None:
    base = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]]).log()
    assert compute_remaining_behavior(base, base, 2, [0]).mean() == pytest.approx(1)
    gone = torch.tensor([[0.2, 0.8], [0.2, 0.8], [0.2, 0.8]]).log()
    assert compute_remaining_behavior(base, gone, 2, [0]).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert compute_remaining_behavior(base, gone, 2, []).tolist() == [1, 1]


def test_models_without_a_dense_part_and_the_cost_in_prompts() -> None:
    subject = tiny_subject("mixtral")
    assert isinstance(analyze(context_of_model(subject, asked()), [Step(use="reach", depths=1)])["reach"], Reach)
    cost: Any = analyses["reach"].cost({"prompts": 24, "depths": 10, "tries": 2, "answers": 48, "tokens": 16})
    values = {"L": 30, "N_search,target": 112, "N_search,control": 10}
    assert cost.forwards.evaluate(values) == (24 + 10) * (1 + 10 * 4)
    assert cost.count_passes(values) == (24 + 10) * (1 + 10 * 4) + 3 * 48 * 17 + 5 * (24 + 10) * 49
