"""Plans: what is saved comes back bit for bit, and a plan that does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.plans import PlanMaker, random_basis
from tests.support.tiny import tiny_subject

from obliteratus.core.errors import NothingMatchedError, UserError
from obliteratus.core.settings import Excise
from obliteratus.core.types import Activations, Directions, Edit, Mask, Plan, Shift, Site, Subject, ZeroOutput
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import FILES, load_plan, plan_edits, save_plan
from obliteratus.summon.sites import read_gain

ACTS = Activations({}, -1)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject("gemma2")


def same(a: Edit, b: Edit) -> bool:
    anchors = a.anchor is b.anchor is None or torch.equal(a.anchor, b.anchor)
    rest = (a.site, a.strength, a.norm) == (b.site, b.strength, b.norm)
    return rest and torch.equal(a.basis, b.basis) and anchors


def test_round_trip(subject: Subject, make_plan: PlanMaker, tmp_path: Path) -> None:
    plan = make_plan(subject, strength=0.1, norm="columns", anchored=True) + make_plan(subject, ("embed",), k=3)
    odd = replace(plan.edits[0], site=replace(plan.edits[0].site, span=(8, 16), expert=3))
    plan = replace(plan, edits=(*plan.edits, odd))
    save_plan(plan, tmp_path)
    found = load_plan(tmp_path)
    assert found.model == plan.model
    assert all(same(a, b) for a, b in zip(found.edits, plan.edits, strict=True))
    assert found.edits[-1].site == odd.site


def test_plans_add_in_order(subject: Subject, make_plan: PlanMaker) -> None:
    first, second = make_plan(subject), make_plan(subject, seed=1)
    both = first + second
    assert both.edits == first.edits + second.edits
    assert all(edits[0] in first.edits and edits[1] in second.edits for edits in both.by_site().values())
    assert (Plan() + first).model == (first + Plan()).model == first.model
    with pytest.raises(UserError, match="plans of two models cannot be added"):
        first + replace(second, model="other")


def test_a_scaled_plan_does_that_share_of_it(subject: Subject, make_plan: PlanMaker) -> None:
    plan = make_plan(subject)
    writer = next(site for site in subject.sites if site.part == "mlp.out")
    others = (Shift(writer, torch.ones(subject.width)), Mask(writer, torch.tensor([1])), ZeroOutput(writer))
    plan = replace(plan, edits=(*plan.edits, *others))
    half = plan.scaled(0.5)
    assert half.model == plan.model
    edits = [change for change in half.edits if isinstance(change, Edit)]
    assert [e.strength for e in edits] == [0.5 * e.strength for e in plan.edits if isinstance(e, Edit)]
    assert torch.equal(half.edits[-3].vector, torch.full((subject.width,), 0.5))  # type: ignore[union-attr]
    assert half.edits[-2:] == plan.edits[-2:]  # without a strength
    same, edit = plan.scaled(1.0).edits[0], plan.edits[0]
    assert (same.site, same.strength) == (edit.site, edit.strength)  # type: ignore[union-attr]
    assert same.basis is edit.basis  # type: ignore[union-attr]
    for factor in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="give a finite number"):
            plan.scaled(factor)


def test_only_some_blocks_and_parts(subject: Subject, make_plan: PlanMaker) -> None:
    plan = make_plan(subject)
    cut = plan.only(layers=1, parts="attn.out")
    assert {(e.site.layer, e.site.part) for e in cut.edits} == {(1, "attn.out")}
    assert (
        plan.only(layers=range(99), parts=["attn.out", "mlp.out"]).edits
        == plan.only(parts=["attn.out", "mlp.out"]).edits
    )
    assert plan.only() == plan
    one, rest = plan.only(layers={0}), plan.only(layers=[x for x in range(-1, 99) if x])
    assert len(one.edits) + len(rest.edits) == len(plan.edits)
    with pytest.raises(UserError, match=r"nothing of 'router' is edited; the plan edits .*attn\.out"):
        plan.only(parts="router")
    with pytest.raises(UserError, match="nothing is left; the plan edits"):
        plan.only(layers=[])


# ------------------------------------------------------------------------------------------- bad files
def _unknown_field(data: dict[str, Any]) -> None:
    data["edits"][0]["site"]["foo"] = 1


TENSORS: dict[str, Callable[[Path], Any]] = {
    "truncated tensors": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "pickled tensors": lambda path: torch.save({"0.basis": torch.ones(1, 32)}, path),
    "empty tensors": lambda path: path.write_bytes(b""),
}
TEXT: dict[str, Callable[[Path], Any]] = {
    "truncated text": lambda path: path.write_text(path.read_text()[:-40]),
    "binary text": lambda path: path.write_bytes(b"\xff\xfe\0"),
    "a list": lambda path: path.write_text("[]"),
}
DATA: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no edits": lambda data: data.pop("edits"),
    "no model": lambda data: data.pop("model"),
    "an unknown site field": _unknown_field,
    "a span of three": lambda data: data["edits"][0]["site"].update(span=[0, 8, 16]),
    "more edits than tensors": lambda data: data["edits"].append(data["edits"][0]),
}


def spoiled(folder: Path, how: str) -> None:
    tensors, text = (folder / name for name in FILES)
    if how in TENSORS:
        TENSORS[how](tensors)
    elif how in TEXT:
        TEXT[how](text)
    else:
        data = json.loads(text.read_text())
        DATA[how](data)
        text.write_text(json.dumps(data))


@pytest.mark.parametrize("how", [*TENSORS, *TEXT, *DATA])
def test_broken_plans_are_the_users_to_mend(how: str, subject: Subject, make_plan: PlanMaker, tmp_path: Path) -> None:
    save_plan(make_plan(subject), tmp_path)
    spoiled(tmp_path, how)
    with pytest.raises(UserError, match=r"the plan cannot be read .*; run the method again"):
        load_plan(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, subject: Subject, make_plan: PlanMaker, tmp_path: Path) -> None:
    save_plan(make_plan(subject), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"there is no {name}; give the output folder"):
        load_plan(tmp_path)


def test_a_plan_of_the_first_version_is_read(subject: Subject, make_plan: PlanMaker, tmp_path: Path) -> None:
    """It had no kinds: all were edits."""
    plan = make_plan(subject)
    save_plan(plan, tmp_path)
    data = json.loads((tmp_path / FILES[1]).read_text())
    for edit in data["edits"]:
        assert edit.pop("kind") == "edit"
    (tmp_path / FILES[1]).write_text(json.dumps(data | {"version": 1}))
    assert all(same(a, b) for a, b in zip(load_plan(tmp_path).edits, plan.edits, strict=True))


def test_two_norm_rules_on_one_site_contradict(subject: Subject, make_plan: PlanMaker, tmp_path: Path) -> None:
    save_plan(make_plan(subject, norm="rows") + make_plan(subject, norm="columns"), tmp_path)
    with pytest.raises(UserError, match=r"two norm rules \(columns, rows\) on .*; give each site one rule"):
        load_plan(tmp_path)


# ------------------------------------------------------------------------------------- what does not fit
def test_a_plan_for_another_model(subject: Subject, make_plan: PlanMaker) -> None:
    other = tiny_subject("gemma2", seed=1)
    with pytest.raises(UserError, match="made for another model"), applied(other, make_plan(subject)):
        pass
    with applied(tiny_subject("gemma2"), make_plan(subject)):  # the same weights are the same model
        pass


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["basis", "anchor", "strength"])
def test_a_plan_with_nan(where: str, value: float, subject: Subject, make_plan: PlanMaker) -> None:
    plan = make_plan(subject, anchored=True)
    bad = {"basis": plan.edits[1].basis.clone(), "anchor": plan.edits[1].anchor.clone(), "strength": value}
    if where != "strength":
        bad[where].flatten()[3] = value
    edits = (plan.edits[0], replace(plan.edits[1], **{where: bad[where]}))
    with pytest.raises(UserError, match="NaN or Inf"), applied(subject, replace(plan, edits=edits)):
        pass


# -------------------------------------------------------------------------------------------- EXCISE
def found_in(subject: Subject, streams: list[int], k: int = 2) -> Directions:
    n = subject.n_layers + 1
    rows = [random_basis(subject.width, k, i) if i in streams else torch.zeros(k, subject.width) for i in range(n)]
    score = torch.tensor([float(i in streams) for i in range(n)])
    return Directions(torch.stack(rows), score, score, "")


def made(subject: Subject, found: Directions, weights: torch.Tensor | None = None, **options: Any) -> Plan:
    factors = torch.ones(len(subject.sites)) if weights is None else weights
    return plan_edits(subject, found, factors, ACTS, Excise(**options))


def test_each_writer_gets_the_directions_of_its_stream(subject: Subject) -> None:
    found = found_in(subject, [1, 3])
    plan = made(subject, found, strength=0.5, norm="rows", parts=("mlp.out",))
    assert [e.site.layer for e in plan.edits] == [0, 2]
    for edit in plan.edits:
        assert (edit.strength, edit.norm, edit.anchor) == (0.5, "rows", None)
        gain = read_gain(subject.model, edit.site)
        folded = torch.linalg.qr((found.basis[edit.site.stream] * gain).T.double())[0]
        span = edit.basis.double().T @ edit.basis.double()
        torch.testing.assert_close(span, folded @ folded.T, rtol=0, atol=1e-5)
    assert plan.model == subject.source.digest


def test_weights_scale_the_strength_and_zero_leaves_out(subject: Subject) -> None:
    weights = torch.tensor([0.0 if s.layer == 1 else 0.25 for s in subject.sites])
    plan = made(subject, found_in(subject, [0, 1, 2, 3]), weights, strength=2.0)
    assert {e.site.layer for e in plan.edits} == {0, 2}
    assert {e.strength for e in plan.edits} == {0.5}


def test_anchors_are_the_mean_outputs(subject: Subject) -> None:
    sites: list[Site] = [s for s in subject.sites if s.part == "mlp.out"]
    outputs = {s.path: torch.full((subject.width,), float(i)) for i, s in enumerate(sites)}
    found = found_in(subject, [1, 2, 3])
    options = Excise(parts=("mlp.out",), anchored=True)
    plan = plan_edits(subject, found, torch.ones(len(subject.sites)), Activations({}, -1, outputs), options)
    assert all(torch.equal(e.anchor, outputs[e.site.path]) for e in plan.edits)


@pytest.mark.parametrize("part", ["expert.out", "router"])
def test_a_part_that_matches_nothing_is_an_error(part: str, subject: Subject) -> None:
    with pytest.raises(
        NothingMatchedError, match=f"'{part}' names no part of this model; it has attn.in, attn.out, embed"
    ):
        made(subject, found_in(subject, [1]), parts=("mlp.out", part))


def test_nothing_to_edit_is_an_error(subject: Subject) -> None:
    with pytest.raises(NothingMatchedError, match="nothing to edit"):
        made(subject, found_in(subject, []))
    with pytest.raises(NothingMatchedError, match="nothing to edit"):
        made(subject, found_in(subject, [1]), torch.zeros(len(subject.sites)))
