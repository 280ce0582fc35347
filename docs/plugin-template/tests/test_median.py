"""It finds a planted direction, and not where there is none."""

import torch
from my_steps import median_difference

import obliteratus as ob
from obliteratus.core.types import Moments


def make_activations(shift: float) -> tuple[ob.Activations, torch.Tensor]:
    """Return noise of 200 prompts in two groups, and the direction by which the target group is shifted."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 200, 3, 16, generator=generator)  # [group, prompt, stream, width]
    truth = torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0)
    rows[0] += shift * truth
    groups = {name: Moments(200, own.mean(0), own) for name, own in zip(("target", "control"), rows, strict=True)}
    return ob.Activations(groups, -1), truth


def test_a_planted_direction_is_found() -> None:
    acts, truth = make_activations(shift=4.0)
    assert (median_difference(acts, None).basis[:, 0] @ truth).min() > 0.95


def test_there_is_none_without_a_shift() -> None:
    acts, truth = make_activations(shift=0.0)
    assert (median_difference(acts, None).basis[:, 0] @ truth).abs().max() < 0.7


def test_recipes_find_it_by_name() -> None:
    acts, truth = make_activations(shift=4.0)
    assert (ob.find_directions(acts, ["median_diff"]).basis[:, 0] @ truth).min() > 0.95
