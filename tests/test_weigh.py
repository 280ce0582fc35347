"""Where and how hard: each step's defining property, and the product of them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_subject
from torch import Tensor

from obliteratus.errors import UserError
from obliteratus.types import Directions, Site, Step
from obliteratus.weigh import weigh, weighers

ELBOW = [0.02, 0.9, 0.05, 0.95, 1.0, 0.04, 0.03, 0.06]


def sites_for(n: int) -> tuple[Site, ...]:
    """One writer in each layer, between the embeddings and the head."""
    inner = [Site(f"l.{i}", i, "mlp.out", "writes", "linear") for i in range(n)]
    embed = Site("embed", -1, "embed", "writes", "embedding")
    return (embed, *inner, Site("head", n, "unembed", "reads", "linear"))


def factors(scores: list[float], use: str, **options: Any) -> list[float]:
    """The factor of each layer; embeddings and head, which are in no layer, must be left at 1."""
    found = weigh(scored(scores), sites_for(len(scores)), [Step(use=use, **options)])
    assert found[0] == found[-1] == 1
    return found[1:-1].tolist()


def scored(scores: list[float]) -> Directions:
    n = len(scores) + 1
    basis = torch.eye(4)[:1].expand(n, 1, 4).contiguous()
    score = torch.tensor([0.77, *scores])  # stream 0 belongs to no layer
    return Directions(basis, score, score, "")


@pytest.mark.parametrize("name", list(weighers))
def test_contract(name: str) -> None:
    """Every step, on every kind of site of a real model: one finite factor ≥ 0 for each."""
    subject = tiny_subject("gpt2")
    generator = torch.Generator().manual_seed(0)
    basis = torch.eye(32)[:1].expand(3, 1, 32).contiguous()
    score = torch.rand(3, generator=generator)
    found: Tensor = weigh(Directions(basis, score, score, ""), subject.sites, [Step(use=name)])
    assert found.shape == (len(subject.sites),)
    assert torch.isfinite(found).all()
    assert (found >= 0).all()
    by_layer = {s.layer: float(f) for s, f in zip(subject.sites, found, strict=True)}
    assert [by_layer[s.layer] for s in subject.sites] == found.tolist()  # one factor a layer


def test_all() -> None:
    assert factors(ELBOW, "all") == [1.0] * 8


@pytest.mark.parametrize("n", [0, 1, 3, 7])
def test_skip_first(n: int) -> None:
    assert factors(ELBOW, "skip_first", n=n) == [0.0] * n + [1.0] * (8 - n)


@pytest.mark.parametrize(
    ("low", "high", "kept"), [(0.0, 1.0, range(5)), (0.25, 0.75, [1, 2, 3]), (0.2, 0.8, [1, 2, 3]), (1.0, 1.0, [4])]
)
def test_middle(low: float, high: float, kept: Any) -> None:
    assert factors([1.0] * 5, "middle", low=low, high=high) == [float(i in kept) for i in range(5)]


def test_middle_of_one_layer() -> None:
    assert factors([1.0], "middle", low=0.0, high=0.5) == [1.0]


def test_knee_finds_the_planted_elbow() -> None:
    # The best three stand out; the knee's own point, the first of the rest, may belong to either side.
    kept = {i for i, f in enumerate(factors(ELBOW, "knee")) if f}
    assert {1, 3, 4} <= kept
    assert len(kept) <= 4


@pytest.mark.parametrize("scores", [[0.5] * 8, [0.8 - 0.1 * i for i in range(8)], [0.0] * 4])
def test_without_a_knee_all_are_kept(scores: list[float]) -> None:
    assert factors(scores, "knee") == [1.0] * len(scores)


def test_knee_has_a_floor() -> None:
    scores = [1.0, 0.95, 0.9, 0.2, 0.0]  # the knee lies after the third: below a floor of 0.93 it counts no more
    assert factors(scores, "knee", floor=0.0)[:3] == [1.0] * 3
    assert factors(scores, "knee", floor=0.93) == [1.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("scores", [[0.3], [0.1, 0.9]])
def test_knee_of_two_layers_or_fewer_keeps_all(scores: list[float]) -> None:
    assert factors(scores, "knee") == [1.0] * len(scores)


def test_knee_does_not_depend_on_the_order() -> None:
    order = [3, 7, 1, 0, 5, 2, 6, 4]
    straight = factors(ELBOW, "knee")
    assert factors([ELBOW[i] for i in order], "knee") == [straight[i] for i in order]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_top_keeps_the_best(share: float) -> None:
    kept = [i for i, f in enumerate(factors(ELBOW, "top", share=share, floor=0)) if f]
    best = sorted(range(8), key=lambda i: -ELBOW[i])[: max(1, round(share * 8))]
    assert kept == sorted(best)


def test_top_has_a_floor() -> None:
    assert factors(ELBOW, "top", floor=0.5) == [float(x >= 0.5) for x in ELBOW]
    assert factors(ELBOW, "top", floor=1.0) == [float(x == 1.0) for x in ELBOW]


def test_by_score_is_the_root_of_the_share() -> None:
    expected = (torch.tensor(ELBOW).double() / max(ELBOW)).sqrt()
    torch.testing.assert_close(torch.tensor(factors(ELBOW, "by_score")).double(), expected, rtol=1e-6, atol=1e-6)


def test_steps_multiply_in_any_order() -> None:
    steps = [Step(use="by_score"), Step(use="skip_first", n=2), Step(use="top", share=0.5)]
    directions, sites = scored(ELBOW), sites_for(8)
    each = torch.stack([weigh(directions, sites, [s]) for s in steps]).prod(0)
    torch.testing.assert_close(weigh(directions, sites, steps), each)
    torch.testing.assert_close(weigh(directions, sites, steps[::-1]), each)
    assert torch.equal(weigh(directions, sites, []), torch.ones(10))


def test_nothing_left_is_an_error() -> None:
    layers_only = sites_for(8)[1:-1]
    steps = [Step(use="skip_first", n=4), Step(use="middle", low=0.0, high=0.3)]
    with pytest.raises(UserError, match="leave no layer; widen one of them"):
        weigh(scored(ELBOW), layers_only, steps)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Step(use="middle", low=0.8, high=0.2), "low=0.8 lies above high=0.2; swap them"),
        (Step(use="top", share=1.5), "share: input should be less than or equal to 1"),
        (Step(use="skip_first", n=-1), "n: input should be greater"),
        (Step(use="kneee"), "did you mean 'knee'"),
    ],
)
def test_bad_options(step: Step, message: str) -> None:
    with pytest.raises(UserError, match=message):
        weigh(scored(ELBOW), sites_for(8), [step])
