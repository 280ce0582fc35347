"""Winsorizing: clamping to quantiles, and what it saves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.support.planted import LOOSE, PROMPTS, cosine, planted, with_rows

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations
from obliteratus.distill import extractors, find_directions

MEAN = Step(use="mean_diff")


def winsorized(acts: Activations, share: float) -> Activations:
    made = extractors["winsorize"].function(acts, None, share=share)
    assert isinstance(made, Activations)
    return made


def with_freaks(acts: Activations) -> Activations:
    """Three target prompts of enormous activations in a few dimensions."""
    rows = acts["target"].rows.clone()
    rows[:3, 1:, 20:24] += 2000.0
    return with_rows(acts, "target", rows)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.333])
def test_winsorize_clamps_to_the_quantiles(share: float) -> None:
    acts, _ = planted()
    made = winsorized(acts, share)
    assert set(made.groups) == {"target", "control", "bypass", "keep"}
    for name, moments in acts.groups.items():
        rows = moments.rows.double()
        low, high = torch.quantile(rows, share, dim=0), torch.quantile(rows, 1 - share, dim=0)
        wanted = torch.maximum(torch.minimum(rows, high), low)
        torch.testing.assert_close(made[name].rows.double(), wanted, **LOOSE)
        torch.testing.assert_close(made[name].mean.double(), wanted.mean(0), **LOOSE)
        assert made[name].count == PROMPTS
        assert not torch.equal(made[name].rows, moments.rows)


def test_winsorize_keeps_all_else() -> None:
    acts = replace(planted()[0], outputs={"a.b": torch.ones(3)}, digest="d", position=-2)
    made = winsorized(acts, 0.01)
    assert (made.outputs, made.digest, made.position) == (acts.outputs, "d", -2)


def test_winsorize_holds_off_freak_prompts() -> None:
    acts, truth = planted()
    acts = with_freaks(acts)
    assert (cosine(find_directions(acts, [MEAN]), truth).abs() < 0.5).all()
    assert (cosine(find_directions(acts, [Step(use="winsorize", share=0.03), MEAN]), truth) > 0.9).all()
    # the negative control: a share that reaches no prompt changes nothing
    assert (cosine(find_directions(acts, [Step(use="winsorize", share=1e-6), MEAN]), truth).abs() < 0.5).all()


def test_winsorize_works_on_one_prompt() -> None:
    acts, _ = planted(n=1)
    assert torch.equal(winsorized(acts, 0.2)["target"].rows, acts["target"].rows)


@pytest.mark.parametrize("share", [0.0, 0.5, -0.1])
def test_winsorize_wants_a_share(share: float) -> None:
    with pytest.raises(UserError, match="'winsorize': share: input should be"):
        find_directions(planted()[0], [Step(use="winsorize", share=share), MEAN])


def test_winsorize_wants_rows() -> None:
    with pytest.raises(UserError, match="'winsorize' needs every prompt's activations"):
        find_directions(planted(keep=False)[0], [Step(use="winsorize"), MEAN])
