"""Steps that combine directions with those of another step, or remove others from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.support.planted import (
    LOOSE,
    PROMPTS,
    SHIFT,
    STREAMS,
    WIDTH,
    cosine,
    keep_directions,
    make_moments,
    planted,
    projector,
    with_rows,
)
from torch import Tensor
from torch.nn.functional import normalize

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations, Directions
from obliteratus.distill import extractors, find_directions

MEAN, BYPASS = Step(use="mean_diff"), {"use": "bypass_contrast"}


def means(acts: Activations, *names: str) -> list[Tensor]:
    return [acts[name].rows.double().mean(0) for name in names]


def with_topic(acts: Activations, truth: Tensor) -> tuple[Activations, Tensor]:
    """Target and bypass prompts share a subject that control prompts lack, at right angles to the truth."""
    topic = keep_directions(truth, 7)
    for name in ("target", "bypass"):
        rows = acts[name].rows.clone()
        rows[:, 1:] += SHIFT * topic[1:]
        acts = with_rows(acts, name, rows)
    return acts, topic


def given(rows: Tensor) -> Directions:
    """Directions of a known basis."""
    return Directions(rows, torch.ones(len(rows)), torch.ones(len(rows)), "one")


def ran(name: str, acts: Activations, so_far: Directions | None, **options: Any) -> Directions:
    made = extractors[name].function(acts, so_far, **extractors.check(name, options))
    assert isinstance(made, Directions)
    return made


# -------------------------------------------------------------------------------------- bypass_contrast
def test_bypass_contrast_is_the_unit_difference() -> None:
    acts, _ = planted()
    found = find_directions(acts, [Step(**BYPASS)])
    target, bypass = means(acts, "target", "bypass")
    delta = (target - bypass)[1:]
    torch.testing.assert_close(found.basis[1:, 0].double(), normalize(delta, dim=1), **LOOSE)
    torch.testing.assert_close(found.raw[1:].double(), delta.norm(dim=1), **LOOSE)


def test_bypass_contrast_leaves_the_topic_out() -> None:
    acts, truth = planted()
    acts, topic = with_topic(acts, truth)
    found, mixed = (find_directions(acts, [Step(use=use)]) for use in ("bypass_contrast", "mean_diff"))
    assert (cosine(found, truth) > 0.95).all()
    assert (cosine(found, topic).abs() < 0.2).all()
    assert (cosine(mixed, topic) > 0.6).all()  # the negative control


def test_bypass_contrast_finds_nothing_where_bypass_prompts_are_target_prompts() -> None:
    acts, _ = planted()
    rows = acts["target"].rows
    half = replace(acts, groups={**acts.groups, "target": make_moments(rows[::2]), "bypass": make_moments(rows[1::2])})
    assert (
        find_directions(half, [Step(**BYPASS)]).raw[1:] < 0.5 * find_directions(acts, [Step(**BYPASS)]).raw[1:]
    ).all()


# ------------------------------------------------------------------------------------------------ union
def test_union_spans_both() -> None:
    acts, truth = planted()
    acts, topic = with_topic(acts, truth)
    found = find_directions(acts, [MEAN, Step(use="union", other=BYPASS)])
    target, control, bypass = means(acts, "target", "control", "bypass")
    for stream in range(1, STREAMS):
        rows = torch.stack([target - control, target - bypass])[:, stream]
        torch.testing.assert_close(projector(found.basis[stream]), projector(rows), rtol=0, atol=1e-4)
        inside = found.basis[stream] @ torch.stack([truth, topic], 1)[stream].T
        assert (inside.norm(dim=0) > 0.95).all()
    torch.testing.assert_close(found.basis[:, 0], find_directions(acts, [MEAN]).basis[:, 0])
    assert (find_directions(acts, [MEAN]).basis[1:, 0] * truth[1:]).sum(1).max() < 0.85  # the negative control


def test_union_of_the_same_adds_nothing() -> None:
    acts, _ = planted()
    once, twice = (find_directions(acts, [MEAN, *more]) for more in ([], [Step(use="union", other=MEAN.model_dump())]))
    torch.testing.assert_close(twice.basis[:, :1], once.basis)
    assert (twice.basis[:, 1] == 0).all()
    torch.testing.assert_close(twice.score, once.score)


def test_union_passes_options_on_and_keeps_what_follows_zeros() -> None:
    acts, _ = planted()
    found = find_directions(acts, [MEAN, Step(use="union", other={"use": "svd", "k": 3})])
    assert found.basis.shape == (STREAMS, 4, WIDTH)
    none = given(torch.zeros(STREAMS, 2, WIDTH))
    torch.testing.assert_close(ran("union", acts, none).basis[:, 2:], find_directions(acts, [Step(use="svd")]).basis)


# ------------------------------------------------------------------------------------------------ blend
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_blend_is_the_formula(share: float) -> None:
    acts, _ = planted()
    found = find_directions(acts, [MEAN, Step(use="blend", share=share)])
    target, control, bypass = means(acts, "target", "control", "bypass")
    own, other = (normalize(target - x, dim=1) for x in (control, bypass))
    wanted = normalize((1 - share) * own + share * other, dim=1)
    torch.testing.assert_close(found.basis[1:, 0].double(), wanted[1:], **LOOSE)


def test_blend_takes_the_topic_out_by_its_share() -> None:
    acts, truth = planted()
    acts, topic = with_topic(acts, truth)
    none, half, full = (find_directions(acts, [MEAN, Step(use="blend", share=x)]) for x in (0.0, 0.5, 1.0))
    for less, more in ((none, half), (half, full)):
        assert (cosine(less, topic) > cosine(more, topic) + 0.2).all()
    assert (cosine(half, truth) > cosine(none, truth)).all()


def test_blend_never_cancels() -> None:
    acts, truth = planted()
    own = given(-truth[:, None].contiguous())  # as an SVD may turn it
    found = ran("blend", acts, own, share=0.5)
    assert (cosine(found, truth) > 0.97).all()  # and turned to the target again
    other = find_directions(acts, [Step(**BYPASS)]).basis[1:, 0]
    assert (0.5 * (other - truth[1:])).norm(dim=1).max() < 0.3  # the negative control: what is left unaligned


def test_blend_clears_the_other_rows() -> None:
    acts, _ = planted()
    first = Step(use="svd", k=3)
    found = find_directions(acts, [first, Step(use="blend")])
    before = find_directions(acts, [first]).basis[1]
    wanted = projector(torch.cat([found.basis[1, :1], before[1:]]))
    torch.testing.assert_close(projector(found.basis[1]), wanted, rtol=0, atol=1e-4)


def test_blend_with_nothing_is_the_other() -> None:
    acts, _ = planted()
    found = ran("blend", acts, given(torch.zeros(STREAMS, 1, WIDTH)), share=0.1)
    torch.testing.assert_close(found.basis, find_directions(acts, [Step(**BYPASS)]).basis)


# ------------------------------------------------------------------------------------------ interpolate
@pytest.mark.parametrize(
    ("at", "low", "part"), [(0.0, 1, 0.0), (1 / 3, 2, 0.0), (0.5, 2, 0.5), (0.9, 3, 0.7), (1.0, 4, 0.0)]
)
def test_interpolate_is_the_formula(at: float, low: int, part: float) -> None:
    """Over the streams that leave the layers, of which there are four: stream 0 enters the first."""
    acts, _ = planted()
    rows = find_directions(acts, [MEAN]).basis[:, 0].double()
    found = find_directions(acts, [MEAN, Step(use="interpolate", at=at)])
    high = rows[min(low + 1, 4)]
    wanted = normalize((1 - part) * rows[low] + part * high * (rows[low] @ high).sign(), dim=0)
    assert found.basis.shape == (STREAMS, 1, WIDTH)
    torch.testing.assert_close(found.basis[:, 0].double(), wanted.expand(STREAMS, -1), rtol=0, atol=1e-5)


def test_interpolate_at_a_whole_index_is_single() -> None:
    acts, _ = planted()
    one, two = (
        find_directions(acts, [MEAN, s]) for s in (Step(use="interpolate", at=2 / 3), Step(use="single", depth=0.75))
    )
    torch.testing.assert_close(one.basis, two.basis)
    half = find_directions(acts, [MEAN, Step(use="interpolate", at=0.8)])
    assert (half.basis - one.basis).norm(dim=2).min() > 0.05


def test_interpolate_does_not_cancel_between_opposite_signs() -> None:
    acts, truth = planted()
    rows = truth[1].expand(STREAMS, -1).clone()
    rows[2] *= -1
    found = ran("interpolate", acts, given(rows[:, None]), at=1 / 6)
    assert (found.basis[0, 0] @ truth[1]).abs() > 0.999
    assert (rows[1] + rows[2]).norm() < 1e-6  # the negative control


# --------------------------------------------------------------------------------------------- keep_out
def leaning(acts: Activations, truth: Tensor) -> tuple[Directions, Tensor]:
    """Directions that lean on the keep group's own."""
    own = keep_directions(truth)
    return given((0.8 * truth + 0.6 * own)[:, None].contiguous()), own


def test_keep_out_leaves_the_keep_mean_alone() -> None:
    acts, truth = planted()
    so_far, _ = leaning(acts, truth)
    found = ran("keep_out", acts, so_far)
    keep, control = means(acts, "keep", "control")
    away = normalize(keep - control, dim=1)[1:]
    assert (found.basis[1:, 0].double() * away).sum(1).abs().max() < 1e-5
    assert (so_far.basis[1:, 0].double() * away).sum(1).min() > 0.5  # the negative control: before
    assert (cosine(found, truth) > 0.97).all()
    own = so_far.basis[1:, 0].double()
    wanted = normalize(own - (own * away).sum(1, keepdim=True) * away, dim=1)
    torch.testing.assert_close(found.basis[1:, 0].double(), wanted, **LOOSE)


def test_keep_out_takes_out_spread() -> None:
    acts, truth = planted()
    apart = keep_directions(truth, 50)
    rows = acts["keep"].rows.clone()
    by = 9 * torch.randn(PROMPTS, 1, 1, generator=torch.Generator().manual_seed(1))
    rows[:, 1:] += by * apart[1:]
    acts = with_rows(acts, "keep", rows)
    so_far = given((0.8 * truth + 0.6 * apart)[:, None].contiguous())
    without, found = (ran("keep_out", acts, so_far, k=k) for k in (0, 1))
    assert (cosine(found, truth) > 0.97).all()
    assert (cosine(without, apart).abs() > 0.4).all()  # the negative control
    for stream in range(1, STREAMS):
        one = rows[:, stream].double()
        top = torch.linalg.eigh((one - one.mean(0)).T @ (one - one.mean(0)))[1][:, -1]
        control = acts["control"].rows[:, stream].double().mean(0)
        away = projector(torch.stack([one.mean(0) - control, top]))
        own = so_far.basis[stream, 0].double()
        wanted = normalize(own - own @ away, dim=0)
        torch.testing.assert_close(found.basis[stream, 0].double(), wanted, rtol=0, atol=1e-4)


def test_keep_out_and_the_control_mean_go_together() -> None:
    """Golden in float64. One step after the other brings some of the keep group's difference back."""
    acts, truth = planted()
    so_far, _ = leaning(acts, truth)
    found = ran("keep_out", acts, so_far, control=True)
    in_turn = find_directions(acts, [MEAN, Step(use="keep_out"), Step(use="orthogonal_to_control")])
    keep, control = means(acts, "keep", "control")
    back = 0.0
    for stream in range(1, STREAMS):
        away, mean = normalize(keep[stream] - control[stream], dim=0), normalize(control[stream], dim=0)
        own = so_far.basis[stream, 0].double()
        wanted = normalize(own - own @ projector(torch.stack([away, mean])), dim=0)
        torch.testing.assert_close(found.basis[stream, 0].double(), wanted, rtol=0, atol=1e-5)
        assert max(abs(float(wanted @ away)), abs(float(wanted @ mean))) < 1e-12
        assert max(abs(float(found.basis[stream, 0].double() @ x)) for x in (away, mean)) < 1e-6
        back = max(back, abs(float(in_turn.basis[stream, 0].double() @ away)))
    assert back > 1e-3  # the negative control


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_keep_out_of_a_share_is_partial_orthogonalization(share: float, control: bool) -> None:
    """w − λ r rᵀw / rᵀr; with ``control`` both w and r lose their part along the control mean first."""
    acts, truth = planted()
    so_far, _ = leaning(acts, truth)
    found = ran("keep_out", acts, so_far, share=share, control=control)
    keep, mean = means(acts, "keep", "control")
    for stream in range(1, STREAMS):
        own, away = so_far.basis[stream, 0].double(), keep[stream] - mean[stream]
        if control:
            unit = normalize(mean[stream], dim=0)
            own, away = own - (own @ unit) * unit, away - (away @ unit) * unit
        wanted = normalize(own - share * (own @ away) / (away @ away) * away, dim=0)
        torch.testing.assert_close(found.basis[stream, 0].double(), wanted, rtol=0, atol=1e-5)


def test_keep_out_of_all_leaves_zeros() -> None:
    acts, _ = planted()
    acts = replace(acts, groups={**acts.groups, "keep": acts["target"]})
    found = find_directions(acts, [MEAN, Step(use="keep_out")])
    assert (found.basis == 0).all()
    assert (found.score == 0).all()


# -------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([Step(use="union")], "'union' changes the directions of a step before it"),
        ([MEAN, Step(use="union", other={"use": "sdv"})], "did you mean 'svd'"),
        ([MEAN, Step(use="union", other={"use": "svd", "k": 0})], "'svd': k: input should be greater"),
        ([MEAN, Step(use="union", other={"k": 3})], "'union': other.use: field required"),
        ([MEAN, Step(use="blend", other={"use": "winsorize"})], "has no step that finds directions"),
        ([MEAN, Step(use="blend", share=1.5)], "'blend': share"),
        ([MEAN, Step(use="interpolate", at=2)], "'interpolate': at"),
        ([MEAN, Step(use="keep_out", k=20)], "'keep_out': k=20 directions need at least 21 keep prompts; got 20"),
    ],
)
def test_what_cannot_run_says_why(recipe: list[Step], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_directions(planted(n=20)[0], recipe)


def test_keep_out_wants_rows_only_for_spread() -> None:
    acts, _ = planted(keep=False)
    assert find_directions(acts, [MEAN, Step(use="keep_out")]).score[1:].min() > 0
    with pytest.raises(UserError, match="'keep_out' needs every prompt's activations"):
        find_directions(acts, [MEAN, Step(use="keep_out", k=1)])
