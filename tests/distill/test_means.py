"""Difference of means, one layer's directions at all layers, and directions without the control mean."""

from __future__ import annotations

import pytest
import torch
from tests.support.planted import LOOSE, cosine, planted

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.distill import find_directions

MEAN = Step(use="mean_diff")


def test_mean_diff_is_the_unit_difference() -> None:
    acts, _ = planted()
    found = find_directions(acts, [MEAN])
    target, control = (acts[g].rows.double().mean(0) for g in ("target", "control"))
    delta = target - control
    torch.testing.assert_close(found.basis[1:, 0].double(), (delta / delta.norm(dim=1)[:, None])[1:], **LOOSE)
    torch.testing.assert_close(found.raw[1:].double(), delta.norm(dim=1)[1:], **LOOSE)
    share = delta.norm(dim=1) / (target.norm(dim=1) + control.norm(dim=1))
    torch.testing.assert_close(found.score[1:].double(), share[1:], **LOOSE)


@pytest.mark.parametrize(("depth", "at"), [(0.25, 1), (1.0, 4), (0.6, 2)])
def test_single_takes_the_named_layer(depth: float, at: int) -> None:
    acts, truth = planted()
    found = find_directions(acts, [MEAN, Step(use="single", depth=depth)])
    assert (cosine(found, truth[at].expand_as(truth)) > 0.95).all()


@pytest.mark.parametrize(("depth", "at"), [(0.0, 1), (0.5, 3), (0.74, 3), (0.75, 4), (1.0, 4)])
def test_single_takes_the_stream_that_leaves_the_named_block(depth: float, at: int) -> None:
    """Four blocks: ⌊4 · depth⌋ and one more."""
    found, every = (
        find_directions(planted()[0], s) for s in ([MEAN, Step(use="single", depth=depth, leaving=True)], [MEAN])
    )
    assert torch.equal(found.basis, every.basis[at].expand_as(every.basis))


def test_single_takes_the_best_layer() -> None:
    acts, _ = planted()
    acts["target"].mean[3] += acts["target"].mean[3] - acts["control"].mean[3]
    assert int(find_directions(acts, [MEAN]).score.argmax()) == 3
    found = find_directions(acts, [MEAN, Step(use="single")])
    torch.testing.assert_close(found.basis, found.basis[3].expand_as(found.basis))


def test_orthogonal_to_control_leaves_the_control_mean_alone() -> None:
    acts, _ = planted()
    acts["target"].mean[:, 0] += 30.0  # chance leans on a massive dimension
    mean = torch.nn.functional.normalize(acts["control"].mean, dim=1)
    for first in ({"use": "mean_diff"}, {"use": "svd", "k": 3}):
        before, after = (
            find_directions(acts, [Step(**first), *more]) for more in ([], [Step(use="orthogonal_to_control")])
        )
        along = [torch.einsum("lkw,lw->lk", d.basis, mean)[1:].abs().max() for d in (before, after)]
        assert along[0] > 0.05
        assert along[1] < 1e-4


def test_moments_are_enough_for_means_and_not_for_svd() -> None:
    acts, truth = planted(keep=False)
    assert (cosine(find_directions(acts, [MEAN]), truth) > 0.95).all()
    with pytest.raises(UserError, match=r"'svd' needs every prompt.* set probe.keep"):
        find_directions(acts, [Step(use="svd")])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([], "has no step that finds directions"),
        ([Step(use="single")], "put e.g. mean_diff first"),
        ([Step(use="svd", k=30)], "k=30 directions need at least 30 target prompts; got 20"),
        ([Step(use="svd", k=65)], "k: input should be less than or equal to 64"),
        ([Step(use="svd", K=3)], "'svd': key 'K'"),
        ([Step(use="mean_dif")], "did you mean 'mean_diff'"),
    ],
)
def test_what_cannot_run_says_why(recipe: list[Step], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_directions(planted(n=20)[0], recipe)
