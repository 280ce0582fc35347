"""A sketch is short of the scatter by no more than it says, and steps find by it what they find by all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.planted import (
    LOOSE,
    PROMPTS,
    SIZE,
    cosine,
    make_moments,
    make_sketch,
    planted,
    shuffled,
    with_sketches,
)
from tests.support.tiny import tiny_subject
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.registry import RunInputs
from obliteratus.core.settings import Probe, Step
from obliteratus.core.types import Activations, PromptSet, Sketch
from obliteratus.distill import find_directions
from obliteratus.distill.steps import check_needs, check_sizes
from obliteratus.probe.probe import collect_activations

STEPS: dict[str, dict[str, Any]] = {
    "svd": {"k": 3},
    "whitened_svd": {"k": 3},
    "discriminant": {},
    "leace": {},
}


def scatter(rows: Tensor) -> Tensor:
    """[streams, width, width] about the mean, in float64."""
    centered = rows.double() - rows.double().mean(0)
    return torch.einsum("nsw,nsv->swv", centered, centered)


def drawn(n: int, width: int, decay: float, offset: float = 30.0) -> Tensor:
    """[n, 2, width]: variances fall by ``decay`` along axes askew to the dimensions; a mean far from zero."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    scales = torch.arange(1, width + 1) ** -decay
    return torch.randn(n, 2, width, generator=generator) * 10 * scales @ axes + offset


def short(rows: Tensor, found: Sketch) -> Tensor:
    """[streams, width]: eigenvalues of what the sketch leaves out."""
    return torch.linalg.eigvalsh(scatter(rows) - found.rows.double().mT @ found.rows.double())


# ----------------------------------------------------------------------------------------- the sketch itself
@pytest.mark.parametrize("batch", [1, 7, 24, 64])
def test_few_rows_are_kept_exactly(batch: int) -> None:
    rows = drawn(SIZE, 200, 0.5)
    found = make_sketch(rows, batch=batch)
    torch.testing.assert_close(found.rows.double().mT @ found.rows.double(), scatter(rows), rtol=1e-4, atol=1e-2)
    assert found.rows.shape[1] <= SIZE
    assert (found.error < 1e-9).all()


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("batch", [5, 90, 1000])
def test_of_many_no_more_is_lost_than_is_said_and_than_is_known(decay: float, batch: int) -> None:
    rows = drawn(1000, 200, decay)
    found, whole = make_sketch(rows, batch=batch), torch.linalg.eigvalsh(scatter(rows)).flip(1)
    missing, rounding = short(rows, found), 1e-5 * whole[:, :1]
    assert found.rows.shape[1] == SIZE
    assert (missing >= -rounding).all()
    assert (missing <= found.lost[:, None] + rounding).all()
    for k in (0, 10, SIZE - 1):
        assert (found.lost <= whole[:, k:].sum(1) / (SIZE + 1 - k) + rounding[:, 0]).all()
    torch.testing.assert_close(found.total.double(), whole.sum(1), rtol=1e-5, atol=0.0)


def test_what_is_said_to_be_lost_is_near_what_is() -> None:
    """A bound that is far above, or a loss of nothing, would say nothing."""
    rows = drawn(1000, 200, 0.5)
    found = make_sketch(rows)
    missing = short(rows, found)[:, -1]
    assert (missing > 0.5 * found.lost).all()
    assert (found.error > 0.005).all()
    assert (found.error < 0.2).all()
    larger = make_sketch(rows, size=128)
    assert (larger.lost < 0.5 * found.lost).all()


def test_a_mean_far_away_is_no_spread() -> None:
    """The scatter about zero would be all of it the mean's."""
    near, far = (make_sketch(drawn(300, 100, 0.5, offset)) for offset in (0.0, 1000.0))
    torch.testing.assert_close(near.total, far.total, rtol=1e-3, atol=0.0)
    assert (drawn(300, 100, 0.5, 1000.0).square().sum((0, 2)) > 1e3 * far.total).all()


# ----------------------------------------------------------------------------------------------- its readers
@pytest.mark.parametrize("use", STEPS)
def test_as_many_rows_as_dimensions_give_the_same_directions(use: str) -> None:
    acts, _ = planted()
    steps = [Step(use=use, **STEPS[use])]
    rows, few = find_directions(acts, steps), find_directions(with_sketches(acts), steps)
    torch.testing.assert_close(few.basis[:, 0], rows.basis[:, 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(few.raw[1:], rows.raw[1:], **LOOSE)
    if rows.covectors is not None and few.covectors is not None:
        torch.testing.assert_close(few.covectors, rows.covectors, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("use", STEPS)
def test_fewer_rows_than_dimensions_find_the_planted_direction_as_well(use: str) -> None:
    """One row in four of the prompts' and of the width, massive dimensions beside it."""
    acts, truth = wide()
    steps = [Step(use=use, **STEPS[use])]
    rows, few = (cosine(find_directions(of, steps), truth) for of in (acts, with_sketches(acts)))
    assert (few.abs() > rows.abs() - 0.03).all()
    by_chance = cosine(find_directions(with_sketches(shuffled(acts)), steps), truth)
    assert (by_chance.abs() < 0.5).all()


def wide(n: int = 256, width: int = 256) -> tuple[Activations, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(2, n, 3, width, generator=generator)
    rows[..., :3] *= 100
    truth = torch.nn.functional.normalize(torch.randn(3, width, generator=generator), dim=1)
    rows[0] += 4 * truth
    return Activations({"target": make_moments(rows[0]), "control": make_moments(rows[1])}, -1), truth


# ----------------------------------------------------------------------------------------------- in a run
def test_probe_sketches_what_it_reads(prompts: PromptSet) -> None:
    subject = tiny_subject("llama")
    rows, few = (collect_activations(subject, prompts, Probe(keep=keep)) for keep in ("rows", "sketch"))
    for name, moments in few.groups.items():
        assert moments.rows is None
        assert moments.sketch is not None
        assert torch.equal(moments.mean, rows[name].mean)
        spread = scatter(rows[name].rows)
        sketched = moments.sketch.rows.double().mT @ moments.sketch.rows.double()
        torch.testing.assert_close(sketched, spread, rtol=1e-3, atol=1e-5 * float(spread.abs().max()))


@pytest.mark.parametrize("use", STEPS)
def test_it_is_enough_for_these(use: str) -> None:
    steps = [Step(use=use, **STEPS[use])]
    check_needs(steps, ["target", "control"], keep="sketch")
    check_sizes(steps, RunInputs({"target": PROMPTS, "control": PROMPTS}, lambda: 64, "sketch"))
    with pytest.raises(UserError, match=r'or a sketch of them; set probe\.keep = "rows" or "sketch"'):
        check_needs(steps, ["target", "control"], keep="moments")


def refused(steps: list[Step], given: RunInputs) -> None:
    """All that is asked before weights are loaded."""
    check_needs(steps, ["target", "control"], keep=given.keep)
    check_sizes(steps, given)


@pytest.mark.parametrize(
    ("use", "options"), [("winsorize", {}), ("sae", {}), ("svd", {"paired": True}), ("leace", {"k": 2})]
)
def test_what_needs_every_prompt_is_refused_before_and_when_run(use: str, options: dict[str, Any]) -> None:
    steps = [Step(use=use, **options)]
    given = RunInputs({"target": PROMPTS, "control": PROMPTS}, lambda: 64, "sketch")
    message = f"'{use}' needs every prompt's activations; set probe.keep = \"rows\""
    with pytest.raises(UserError, match=message):
        refused(steps, given)
    with pytest.raises(UserError, match=message):
        find_directions(with_sketches(planted()[0]), steps)
