"""SVD of differences: plain, paired, centered; and cutting groups to pairs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.support.planted import (
    LOOSE,
    PROMPTS,
    STREAMS,
    WIDTH,
    cosine,
    make_moments,
    planted,
    projector,
    shuffled,
    with_rows,
)
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations
from obliteratus.distill import find_directions

MEAN = Step(use="mean_diff")


@pytest.mark.parametrize("paired", [False, True])
def test_svd_is_the_top_of_the_second_moment(paired: bool) -> None:
    acts, _ = planted()
    found = find_directions(acts, [Step(use="svd", k=3, paired=paired)])
    target, control = (acts[g].rows.double() for g in ("target", "control"))
    rows = target - (control if paired else control.mean(0))
    for stream in range(1, STREAMS):
        values, vectors = torch.linalg.eigh(rows[:, stream].T @ rows[:, stream])
        top = vectors[:, -3:]
        basis = found.basis[stream].double()
        torch.testing.assert_close(basis.T @ basis, top @ top.T, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.raw[stream].double(), values[-3:].sum() / PROMPTS, **LOOSE)


def test_svd_scores_no_less_than_with_fewer_directions() -> None:
    acts, _ = planted()
    few, many, mean = (find_directions(acts, s).score for s in ([Step(use="svd", k=1)], [Step(use="svd", k=6)], [MEAN]))
    assert (few <= many + 1e-6).all()
    assert (many <= mean + 1e-6).all()


def test_pairs_cuts_the_larger_group() -> None:
    """Both ways round; what is left is the first rows and their mean, and paired svd then runs."""
    acts, _ = planted()
    for name in ("target", "control"):
        fewer = replace(acts, groups={**acts.groups, name: make_moments(acts[name].rows[:150])})
        with pytest.raises(UserError, match="150"):
            find_directions(fewer, [Step(use="svd", k=2, paired=True)])
        cut = replace(
            acts, groups={**acts.groups, **{g: make_moments(acts[g].rows[:150]) for g in ("target", "control")}}
        )
        svd = Step(use="svd", k=2, paired=True)
        found, wanted = find_directions(fewer, [Step(use="pairs"), svd]), find_directions(cut, [svd])
        torch.testing.assert_close(found.basis, wanted.basis)
        torch.testing.assert_close(found.score, wanted.score)


def test_paired_groups_of_unequal_length_are_refused() -> None:
    acts, _ = planted()
    short = replace(acts, groups={**acts.groups, "control": make_moments(acts["control"].rows[:150])})
    assert find_directions(short, [Step(use="svd")]).score[1:].min() > 0
    with pytest.raises(UserError, match="paired=true needs groups of equal size; got 200 target and 150"):
        find_directions(short, [Step(use="svd", paired=True)])


# ---------------------------------------------------------------------------------------------- centered
def spread_beside(seed: int = 0) -> tuple[Activations, Tensor, Tensor]:
    """A shift, and at right angles to it a direction in which target prompts spread more than they are shifted."""
    acts, truth = planted(seed)
    apart = torch.linalg.qr(torch.stack([truth, truth.roll(1, 1)], 2))[0][..., 1]
    by = 12.0 * torch.randn(PROMPTS, 1, 1, generator=torch.Generator().manual_seed(seed))
    by = by - by.mean()
    rows = acts["target"].rows + by * apart
    rows[:, 0] = acts["target"].rows[:, 0]
    return with_rows(acts, "target", rows), truth, apart


@pytest.mark.parametrize("paired", [False, True])
def test_centered_svd_is_the_shift_and_the_top_of_the_covariance(paired: bool) -> None:
    acts, _, _ = spread_beside()
    found = find_directions(acts, [Step(use="svd", k=3, centered=True, paired=paired)])
    target, control = (acts[g].rows.double() for g in ("target", "control"))
    rows = target - (control if paired else control.mean(0))
    for stream in range(1, STREAMS):
        delta = rows[:, stream].mean(0)
        values, vectors = torch.linalg.eigh((rows[:, stream] - delta).T @ (rows[:, stream] - delta))
        wanted = projector(torch.stack([delta, vectors[:, -1], vectors[:, -2]]))
        torch.testing.assert_close(projector(found.basis[stream]), wanted, rtol=0, atol=1e-3)
        torch.testing.assert_close(found.basis[stream, 0].double(), delta / delta.norm(), **LOOSE)
        raw = delta.square().sum() + values[-2:].sum() / PROMPTS
        torch.testing.assert_close(found.raw[stream].double(), raw, **LOOSE)


def test_centering_tells_shift_from_spread() -> None:
    acts, truth, apart = spread_beside()
    found = find_directions(acts, [Step(use="svd", k=2, centered=True)])
    assert (cosine(found, truth) > 0.9).all()
    assert ((found.basis[:, 1] * apart).sum(1)[1:].abs() > 0.9).all()
    mixed = find_directions(acts, [Step(use="svd", k=2)])  # the negative control: uncentered, spread comes first
    assert (cosine(mixed, truth).abs() < 0.5).all()


def test_centered_svd_finds_nothing_under_shuffled_labels() -> None:
    acts, truth = planted()
    step = Step(use="svd", k=1, centered=True)
    assert (cosine(find_directions(acts, [step]), truth) > 0.95).all()
    assert (find_directions(shuffled(acts), [step]).raw[1:] < 0.1 * find_directions(acts, [step]).raw[1:]).all()
    assert find_directions(acts, [step]).basis.shape == (STREAMS, 1, WIDTH)
