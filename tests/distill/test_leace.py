"""LEACE: the oblique eraser as published, against its dense formula, and what orthogonal removal leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.executors import CLOSE, EXECUTORS, directed, live, logits, opened, planned, streams
from tests.support.notes import Notes
from tests.support.plans import random_basis
from tests.support.planted import make_moments, matrix_power, planted
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.norms import NormRule
from obliteratus.core.progress import report_to
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations, Directions, Prompt, PromptSet, Subject
from obliteratus.distill import find_directions, load_directions, save_directions
from obliteratus.excise.linear import compute_norm_scales, edit_weight, fold_gain_oblique, project, project_matrix
from obliteratus.excise.live.hooks import applied
from obliteratus.probe.probe import collect_activations

LEACE = [Step(use="leace")]


def askew(n: int = 400, width: int = 24, seed: int = 0) -> Activations:
    """Two groups with one covariance that is far from round, and a difference askew to its axes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, 1.5, width)
    rows = torch.randn(2, n, 2, width, generator=generator) @ mix
    rows[0] += 20 * torch.randn(width, generator=generator)
    return Activations({"target": make_moments(rows[0]), "control": make_moments(rows[1])}, -1)


def probe_accuracy(rows: Tensor, n: int) -> float:
    """Of the best linear probe on these very rows, by least squares with an intercept, in float64."""
    x = torch.cat([rows.double(), torch.ones(len(rows), 1).double()], 1)
    y = torch.cat([torch.ones(n), -torch.ones(n)]).double()
    w = torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution[:, 0]
    return float(((x @ w).sign() == y).float().mean())


def erased(acts: Activations, found: Directions, stream: int, orthogonal: bool = False) -> Tensor:
    rows = torch.cat([acts[g].rows[:, stream] for g in ("target", "control")])
    covectors = None if orthogonal or found.covectors is None else found.covectors[stream]
    return project(rows, found.basis[stream], 1.0, covectors)


# ----------------------------------------------------------------------------------------------- golden
@pytest.mark.parametrize("n", [400, 5000])
def test_it_is_the_published_projection(n: int) -> None:
    """P = I − W⁺ Π W with W = Σ^−½ and Π on W δ: by the dense matrix, nearly without shrinkage."""
    acts = askew(n)
    found = find_directions(acts, [Step(use="leace", shrinkage=1e-9)])
    rows = torch.cat([acts[g].rows[:, 1].double() for g in ("target", "control")])
    delta = acts["target"].rows[:, 1].double().mean(0) - acts["control"].rows[:, 1].double().mean(0)
    cov = torch.cov(rows.T)
    white = matrix_power(cov, -0.5)
    unit = white @ delta / (white @ delta).norm()
    published = torch.eye(len(delta)).double() - torch.linalg.inv(white) @ torch.outer(unit, unit) @ white
    mine = torch.eye(len(delta)).double() - found.basis[1].double().T @ found.covectors[1].double()
    torch.testing.assert_close(mine, published, rtol=1e-3, atol=1e-3 * float(published.abs().max()))
    assert float(found.raw[1]) == pytest.approx(float(delta @ torch.linalg.inv(cov) @ delta), rel=1e-2)
    assert 0 < float(found.raw[1]) < 4.01


def test_the_means_are_equal_after_it() -> None:
    acts = askew()
    found = find_directions(acts, LEACE)
    n = acts["target"].count
    rows = erased(acts, found, 1)
    delta = acts["target"].mean[1] - acts["control"].mean[1]
    assert (rows[:n].mean(0) - rows[n:].mean(0)).norm() < 1e-4 * delta.norm()


def test_what_is_left_along_the_covector_is_nothing_and_the_discriminants_way_leaves_most() -> None:
    """Projecting the covector out orthogonally, as the audited program does, keeps most of the difference."""
    acts = askew()
    found = find_directions(acts, LEACE)
    delta = acts["target"].mean[1] - acts["control"].mean[1]
    unit = torch.nn.functional.normalize(found.covectors[1], dim=1)
    assert project(delta, found.basis[1], 1.0, found.covectors[1]).norm() < 1e-4 * delta.norm()
    assert project(delta, unit, 1.0).norm() > 0.5 * delta.norm()


def test_no_linear_probe_tells_the_groups_apart_and_before_one_did() -> None:
    acts = askew()
    found = find_directions(acts, [Step(use="leace", shrinkage=1e-6)])
    n = acts["target"].count
    whole = torch.cat([acts[g].rows[:, 1] for g in ("target", "control")])
    # A probe of the very rows reads labels off the rounding of directions in fp32: noise at a hundred times that.
    noise = 1e-5 * whole.std() * torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))
    assert probe_accuracy(whole + noise, n) > 0.9
    assert probe_accuracy(erased(acts, found, 1) + noise, n) < 0.6


def test_of_more_classes_it_is_the_published_projection() -> None:
    """Three classes, two of them categories of target: P = I − W⁺ Π W with Π on W times both mean differences."""
    acts = sorted_(askew())
    found = find_directions(acts, [Step(use="leace", k=2, shrinkage=1e-9)])
    rows = torch.cat([acts[g].rows[:, 1].double() for g in ("target", "control")])
    white = matrix_power(torch.cov(rows.T), -0.5)
    means = torch.stack([part.mean(0) for part in (rows[:100], rows[100:400], rows[400:])])
    image = torch.linalg.qr(white @ (means[:2] - means[2]).T)[0]
    published = torch.eye(rows.shape[1]).double() - torch.linalg.inv(white) @ image @ image.T @ white
    mine = torch.eye(rows.shape[1]).double() - found.basis[1].double().T @ found.covectors[1].double()
    torch.testing.assert_close(mine, published, rtol=1e-3, atol=1e-3 * float(published.abs().max()))
    left = project(rows, found.basis[1].double(), 1.0, found.covectors[1].double())
    parts = [part.mean(0) for part in (left[:100], left[100:400], left[400:])]
    one = find_directions(
        acts, [Step(use="leace", shrinkage=1e-9)]
    )  # negative control: one direction leaves the classes apart
    alone = project(rows, one.basis[1].double(), 1.0, one.covectors[1].double())
    gap = (means[0] - means[1]).norm()
    assert (parts[0] - parts[1]).norm() < 1e-4 * gap
    assert (alone[:100].mean(0) - alone[100:400].mean(0)).norm() > 0.1 * gap


def test_fewer_directions_than_categories_say_what_they_leave() -> None:
    """By hand in float64: the weighted squared distances from the control mean, after over before."""
    acts = three_categories(askew())
    notes = Notes()
    with report_to(notes):
        found = find_directions(acts, [Step(use="leace", k=2)])
    stream = int(found.score.argmax())
    rows = acts["target"].rows[:, stream].double()
    control = acts["control"].rows[:, stream].double().mean(0)
    parts = [(100, rows[:100]), (100, rows[100:200]), (200, rows[200:])]
    apart = [(n / 400, part.mean(0) - control) for n, part in parts]
    after = [(n, d - found.basis[stream].double().T @ (found.covectors[stream].double() @ d)) for n, d in apart]
    share = sum(n * float(d @ d) for n, d in after) / sum(n * float(d @ d) for n, d in apart)
    assert 0.05 < share < 0.6
    assert notes.texts == [
        f"leace: k=2 for 3 target categories leaves {share:.0%} of the squared distances of their means from the "
        f"control mean (stream {stream}, where the score is highest)"
    ]
    with report_to(notes):
        find_directions(acts, [Step(use="leace", k=3)])
    assert len(notes.texts) == 1  # nothing is left to tell


def three_categories(acts: Activations) -> Activations:
    """Target prompts of three categories, each moved off in a direction of its own."""
    rows = acts["target"].rows.clone()
    for seed, part in ((8, slice(0, 100)), (9, slice(100, 200)), (10, slice(200, 400))):
        rows[part] += 30 * torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(seed))
    target = replace(make_moments(rows), categories=("one",) * 100 + ("two",) * 100 + ("three",) * 200)
    return replace(acts, groups={**acts.groups, "target": target})


def sorted_(acts: Activations) -> Activations:
    """The target's first hundred prompts moved off, and of a category of their own."""
    rows = acts["target"].rows.clone()
    rows[:100] += 30 * torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(8))
    target = replace(make_moments(rows), categories=("one",) * 100 + ("other",) * 300)
    return replace(acts, groups={**acts.groups, "target": target})


def test_categories_that_do_not_differ_leave_one_direction() -> None:
    acts = askew()
    rows = acts["target"].rows
    twice = replace(make_moments(torch.cat([rows, rows])), categories=("one",) * 400 + ("other",) * 400)
    found = find_directions(replace(acts, groups={**acts.groups, "target": twice}), [Step(use="leace", k=2)])
    assert found.basis[1, 0].norm() > 0.99
    assert not found.basis[1, 1].any()


@pytest.mark.parametrize("categories", [(), ("one",) * 400])
def test_more_directions_than_categories_are_refused(categories: tuple[str, ...]) -> None:
    acts = askew()
    acts = replace(acts, groups={**acts.groups, "target": replace(acts["target"], categories=categories)})
    with pytest.raises(UserError, match="k=2 directions need as many categories of target prompts; got"):
        find_directions(acts, [Step(use="leace", k=2)])


def test_it_changes_the_rows_least() -> None:
    """In the metric of Σ⁻¹, less than orthogonal removal of the same difference does."""
    acts = askew()
    found = find_directions(acts, [Step(use="leace", shrinkage=1e-6)])
    rows = torch.cat([acts[g].rows[:, 1] for g in ("target", "control")]).double()
    white = matrix_power(torch.cov(rows.T), -0.5)
    moves = [rows - erased(acts, found, 1, orthogonal).double() for orthogonal in (False, True)]
    sizes = [((move - move.mean(0)) @ white).norm() for move in moves]
    assert sizes[0] < 0.8 * sizes[1]


def test_full_shrinkage_is_the_orthogonal_projection() -> None:
    found = find_directions(askew(), [Step(use="leace", shrinkage=1.0)])
    torch.testing.assert_close(found.covectors[1], found.basis[1], rtol=1e-4, atol=1e-5)


def test_no_difference_gives_nothing() -> None:
    found = find_directions(planted()[0], LEACE)
    assert not found.covectors[0].any()
    assert not found.basis[0].any()


@pytest.mark.parametrize("use", ["orthogonal_to_control", "single", "interpolate"])
def test_steps_that_change_directions_refuse_oblique_ones(use: str) -> None:
    with pytest.raises(UserError, match=f"'{use}' cannot change oblique directions"):
        find_directions(planted()[0], [*LEACE, Step(use=use)])


def test_covectors_must_fit_their_basis() -> None:
    found = find_directions(askew(), LEACE)
    with pytest.raises(ValueError, match="covectors"):
        replace(found, covectors=2 * found.covectors)


def test_directions_come_back_with_their_covectors(tmp_path: Path) -> None:
    found = find_directions(askew(), LEACE)
    save_directions(found, tmp_path)
    assert torch.equal(load_directions(tmp_path).covectors, found.covectors)


# -------------------------------------------------------------------------------- on bare tensors, by definition
@pytest.mark.parametrize("strength", [-0.5, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("rule", ["none", "columns", "rows", "unit_rows", "whole"])
def test_an_oblique_edit_is_its_definition(rule: NormRule, strength: float) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(10, 14, generator=generator, dtype=torch.float64)
    basis = torch.randn(2, 10, generator=generator, dtype=torch.float64)  # not even orthonormal
    along = torch.linalg.inv(basis @ basis.T) @ basis
    along = along + torch.randn(2, 10, generator=generator).double() @ (torch.eye(10).double() - basis.T @ along)
    torch.testing.assert_close(along @ basis.T, torch.eye(2).double())
    plain = (torch.eye(10).double() - strength * basis.T @ along) @ weight
    sizes = {"columns": weight.norm(dim=0) / plain.norm(dim=0), "whole": weight.norm() / plain.norm()}
    rows = (weight.norm(dim=1) / plain.norm(dim=1))[:, None]
    expected = plain * (rows if rule == "rows" else sizes.get(rule, torch.ones(())))
    if rule == "unit_rows":
        unit = torch.nn.functional.normalize(weight, dim=1)
        kept = unit - strength * basis.T @ along @ unit
        expected = weight.norm(dim=1, keepdim=True) * torch.nn.functional.normalize(kept, dim=1)
    torch.testing.assert_close(edit_weight(weight, basis, strength, rule, None, along), expected)
    swapped = edit_weight(weight, along, strength, rule, None, basis)  # negative control: sides swapped
    assert not torch.allclose(swapped, expected, rtol=1e-2, atol=1e-2)
    assert compute_norm_scales(project_matrix(weight, basis, along), basis, strength, "none").inputs is None


def test_before_a_gain() -> None:
    generator = torch.Generator().manual_seed(0)
    gain = 0.2 + torch.rand(9, generator=generator, dtype=torch.float64)
    basis = random_basis(9, 1, 0, torch.float64)
    along = basis + 0.5 * random_basis(9, 2, 1, torch.float64)[:1]
    along = along / (along @ basis.T)
    y = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    inner, outer = fold_gain_oblique(along, basis, gain)
    torch.testing.assert_close(project(y, outer, 0.7, inner) * gain, project(y * gain, basis, 0.7, along))


# ------------------------------------------------------------------------------------------ on tiny models
def oblique(subject: Subject, seed: int = 0) -> Directions:
    """Random directions with covectors that lean away from them."""
    found, other = directed(subject, seed, k=1), directed(subject, seed + 50, k=1)
    along = found.basis + 0.5 * other.basis
    return replace(found, covectors=along / (along * found.basis).sum(-1, keepdim=True))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("rule", ["none", "columns"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "llama_biased"])
def test_executors_agree_on_oblique_edits(name: str, rule: str, executor: str, tmp_path: Path) -> None:
    subject = opened(name)
    plan = planned(subject, oblique(subject), norm=rule, strength=0.8)
    expected = live(subject, plan)
    torch.testing.assert_close(EXECUTORS[executor](subject, plan, tmp_path), expected, **CLOSE)
    straight = replace(plan, edits=tuple(replace(e, covectors=None) for e in plan.edits))
    assert not torch.allclose(live(subject, straight), expected, **CLOSE)
    assert not torch.allclose(logits(subject.model), expected, **CLOSE)


def test_what_is_promised_for_activations_does_not_hold_for_the_model() -> None:
    """The eraser makes the means of a stream equal. Edits of all writers leave most of the last stream's difference."""
    subject = opened("llama")
    prompts = PromptSet(
        {
            "target": tuple(Prompt(f"# question {i} of the first kind") for i in range(40)),
            "control": tuple(Prompt(f"a remark {i * i} of another") for i in range(40)),
        }
    )
    acts = collect_activations(subject, prompts)
    found = find_directions(acts, [Step(use="leace", shrinkage=0.95)])
    last = len(found.score) - 1
    gap = acts["target"].mean - acts["control"].mean
    erased_gap = project(gap[last][None], found.basis[last], 1.0, found.covectors[last])
    assert erased_gap.norm() < 1e-3 * gap[last].norm()
    with applied(subject, planned(subject, found)):
        after = collect_activations(subject, prompts)
    left = (after["target"].mean - after["control"].mean)[last].norm() / gap[last].norm()
    assert left > 0.2


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_nothing_along_the_covectors_is_written(name: str) -> None:
    subject = opened(name)
    found = oblique(subject)
    stream = streams(subject, planned(subject, found))
    added = stream[:, 1:] - stream[:, :-1]
    for which, bound in ((found.covectors, 1e-4), (None, None)):
        along = torch.einsum("plw,lkw->plk", added, (found.basis if which is None else which)[1:])
        share = along.norm(dim=-1) / added.norm(dim=-1)
        assert share.max() < bound if bound else share.mean() > 1e-2  # along the basis itself something stays
