"""Winsorising, and SVD of centred differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.support.planted import LOOSE, PROMPTS, STREAMS, WIDTH, cosine, planted, projector, shuffled, with_rows
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations
from obliteratus.distill import extractors, find_directions

MEAN = Step(use="mean_diff")


def winsorised(acts: Activations, share: float) -> Activations:
    made = extractors["winsorise"].function(acts, None, share=share)
    assert isinstance(made, Activations)
    return made


def with_freaks(acts: Activations) -> Activations:
    """Three target prompts of enormous activations in a few dimensions."""
    rows = acts["target"].rows.clone()
    rows[:3, 1:, 20:24] += 2000.0
    return with_rows(acts, "target", rows)


# -------------------------------------------------------------------------------------------- winsorise
@pytest.mark.parametrize("share", [0.01, 0.1, 0.333])
def test_winsorise_clamps_to_the_quantiles(share: float) -> None:
    acts, _ = planted()
    made = winsorised(acts, share)
    assert set(made.groups) == {"target", "control", "bypass", "keep"}
    for name, moments in acts.groups.items():
        rows = moments.rows.double()
        low, high = torch.quantile(rows, share, dim=0), torch.quantile(rows, 1 - share, dim=0)
        wanted = torch.maximum(torch.minimum(rows, high), low)
        torch.testing.assert_close(made[name].rows.double(), wanted, **LOOSE)
        torch.testing.assert_close(made[name].mean.double(), wanted.mean(0), **LOOSE)
        assert made[name].count == PROMPTS
        assert not torch.equal(made[name].rows, moments.rows)


def test_winsorise_keeps_all_else() -> None:
    acts = replace(planted()[0], outputs={"a.b": torch.ones(3)}, digest="d", position=-2)
    made = winsorised(acts, 0.01)
    assert (made.outputs, made.digest, made.position) == (acts.outputs, "d", -2)


def test_winsorise_holds_off_freak_prompts() -> None:
    acts, truth = planted()
    acts = with_freaks(acts)
    assert (cosine(find_directions(acts, [MEAN]), truth).abs() < 0.5).all()
    assert (cosine(find_directions(acts, [Step(use="winsorise", share=0.03), MEAN]), truth) > 0.9).all()
    # the negative control: a share that reaches no prompt changes nothing
    assert (cosine(find_directions(acts, [Step(use="winsorise", share=1e-6), MEAN]), truth).abs() < 0.5).all()


def test_winsorise_works_on_one_prompt() -> None:
    acts, _ = planted(n=1)
    assert torch.equal(winsorised(acts, 0.2)["target"].rows, acts["target"].rows)


@pytest.mark.parametrize("share", [0.0, 0.5, -0.1])
def test_winsorise_wants_a_share(share: float) -> None:
    with pytest.raises(UserError, match="'winsorise': share: input should be"):
        find_directions(planted()[0], [Step(use="winsorise", share=share), MEAN])


def test_winsorise_wants_rows() -> None:
    with pytest.raises(UserError, match="'winsorise' needs every prompt's activations"):
        find_directions(planted(keep=False)[0], [Step(use="winsorise"), MEAN])


# ------------------------------------------------------------------------------------------ centred svd
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
def test_centred_svd_is_the_shift_and_the_top_of_the_covariance(paired: bool) -> None:
    acts, _, _ = spread_beside()
    found = find_directions(acts, [Step(use="svd", k=3, centred=True, paired=paired)])
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


def test_centring_tells_shift_from_spread() -> None:
    acts, truth, apart = spread_beside()
    found = find_directions(acts, [Step(use="svd", k=2, centred=True)])
    assert (cosine(found, truth) > 0.9).all()
    assert ((found.basis[:, 1] * apart).sum(1)[1:].abs() > 0.9).all()
    mixed = find_directions(acts, [Step(use="svd", k=2)])  # the negative control: uncentred, spread comes first
    assert (cosine(mixed, truth).abs() < 0.5).all()


def test_centred_svd_finds_nothing_under_shuffled_labels() -> None:
    acts, truth = planted()
    step = Step(use="svd", k=1, centred=True)
    assert (cosine(find_directions(acts, [step]), truth) > 0.95).all()
    assert (find_directions(shuffled(acts), [step]).raw[1:] < 0.1 * find_directions(acts, [step]).raw[1:]).all()
    assert find_directions(acts, [step]).basis.shape == (STREAMS, 1, WIDTH)
