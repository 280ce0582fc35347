"""Where and how hard: each step's defining property, and the product of them all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy
import pytest
import torch
from tests.support.tiny import tiny_subject
from torch import Tensor

from obliteratus.core.errors import UserError
from obliteratus.core.settings import Step
from obliteratus.core.types import Activations, Directions, Moments, Site
from obliteratus.weigh import weigh_sites, weighers

ELBOW = [0.02, 0.9, 0.05, 0.95, 1.0, 0.04, 0.03, 0.06]


def sites_for(n: int) -> tuple[Site, ...]:
    """One writer in each layer, between the embeddings and the head."""
    inner = [Site(f"l.{i}", i, "mlp.out", "writes", "linear") for i in range(n)]
    embed = Site("embed", -1, "embed", "writes", "embedding")
    return (embed, *inner, Site("head", n, "unembed", "reads", "linear"))


def means(n: int, width: int = 4, seed: int = 0) -> Activations:
    """Random means of both groups at n + 1 streams."""
    generator = torch.Generator().manual_seed(seed)
    groups = ("target", "control")
    return Activations({g: Moments(1, torch.randn(n + 1, width, generator=generator)) for g in groups}, -1)


def factors(scores: Sequence[float], use: str, acts: Activations | None = None, **options: Any) -> list[float]:
    """The factor of each layer; embeddings and head, which are in no layer, must be left at 1."""
    n = len(scores)
    found = weigh_sites(scored(scores), sites_for(n), acts or means(n), [Step(use=use, **options)])
    assert found[0] == found[-1] == 1
    return found[1:-1].tolist()


def scored(scores: Sequence[float]) -> Directions:
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
    found: Tensor = weigh_sites(Directions(basis, score, score, ""), subject.sites, means(2, 32), [Step(use=name)])
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


# ------------------------------------------------------------------------------------------- by the means
def at_angles(degrees: list[float]) -> Activations:
    """Means that enclose these angles at the layers' streams. Their lengths say nothing; stream 0 is opposed."""
    angle = numpy.radians([180.0, *degrees])
    length = torch.linspace(1, 50, len(angle))[:, None]
    target = torch.tensor(numpy.stack([numpy.cos(angle), numpy.sin(angle)], 1)).float() * length
    control = torch.tensor([[3.0, 0.0]]).expand_as(target)
    return Activations({"target": Moments(1, target), "control": Moments(1, control)}, -1)


ANGLES = [10.0, 80.0, 20.0, 5.0, 120.0, 30.0, 40.0, 7.0]


@pytest.mark.parametrize(("share", "kept"), [(0.0, {4}), (0.1, {4}), (0.25, {1, 4}), (0.5, {1, 4, 5, 6})])
def test_cosmic_layers_are_those_of_the_widest_angle(share: float, kept: set[int]) -> None:
    expected = [float(i in kept) for i in range(8)]
    assert factors(ELBOW, "cosmic_layers", at_angles(ANGLES), share=share) == expected
    assert factors(ELBOW[::-1], "cosmic_layers", at_angles(ANGLES), share=share) == expected  # scores say nothing
    mirrored = factors(ELBOW, "cosmic_layers", at_angles(ANGLES[::-1]), share=share)
    assert mirrored == expected[::-1]


def test_knee_cosmic_is_the_union() -> None:
    acts = at_angles([10.0, 80.0, 20.0, 5.0, 30.0, 120.0, 40.0, 7.0])
    sharp, wide = factors(ELBOW, "knee", floor=0.93), factors(ELBOW, "cosmic_layers", acts, share=0.25)
    assert [i for i, f in enumerate(sharp) if f] == [3, 4]
    assert [i for i, f in enumerate(wide) if f] == [1, 5]
    union = factors(ELBOW, "knee_cosmic", acts, floor=0.93, share=0.25)
    assert union == [float(i in {1, 3, 4, 5}) for i in range(8)]


# ----------------------------------------------------------------------------------------------- kernels
def heretic(layer: int, top: float, position: float, least: float, distance: float) -> float:
    """Heretic's kernel in its own terms: positions and distances in layers, ``least`` a weight."""
    away = abs(layer - position)
    if away > distance:
        return 0.0
    return top + (away / distance) * (least - top)


@pytest.mark.parametrize("n", [5, 12])
def test_tent_is_heretics_kernel(n: int) -> None:
    found = factors([1.0] * n, "tent", max_weight=1.3, peak=0.7, min_weight=0.25, reach=0.4)
    last = n - 1
    expected = [heretic(i, 1.3, 0.7 * last, 0.25 * 1.3, 0.4 * last) for i in range(n)]
    assert found == pytest.approx(expected, abs=1e-6)
    assert len(set(found)) > 2
    assert 0.0 in found


def test_tent_keeps_its_least_weight_at_its_very_edge() -> None:
    """|0.6 − 0.9| is more than 0.3 in the last bit, and the edge counts."""
    found = factors([1.0] * 11, "tent", peak=0.9, min_weight=0.5, reach=0.3)
    assert found == pytest.approx([0, 0, 0, 0, 0, 0, 0.5, 4 / 6, 5 / 6, 1, 5 / 6], abs=1e-6)


def test_bell_is_a_gaussian_over_the_depth() -> None:
    found = factors([1.0] * 9, "bell", max_weight=2.0, peak=0.25, width=0.125, floor=0.1)
    expected = [2 * (0.1 + 0.9 * math.exp(-((i - 2) ** 2) / 2)) for i in range(9)]  # one width is one layer
    assert found == pytest.approx(expected, abs=1e-6)
    assert max(found) == found[2] == pytest.approx(2.0)
    assert min(found) > 0.2 - 1e-6


@pytest.mark.parametrize("use", ["tent", "bell"])
def test_a_kernel_may_be_for_one_part(use: str) -> None:
    sites = tiny_subject("llama").sites
    n = 3
    both, attention = (
        weigh_sites(scored([1.0] * n), sites, means(n), [Step(use=use, peak=0.0, max_weight=3.0, part=part)])
        for part in ("", "attn.out")
    )
    for site, everywhere, there in zip(sites, both.tolist(), attention.tolist(), strict=True):
        assert there == (everywhere if site.part == "attn.out" else 1.0)
    assert {f for f, s in zip(both.tolist(), sites, strict=True) if s.part == "mlp.out"} != {1.0}


def test_component_sets_attention_mlp_and_embeddings_apart() -> None:
    sites = tiny_subject("gpt2").sites
    found = weigh_sites(scored([0.3, 0.6]), sites, means(2), [Step(use="component", attn=0.5, mlp=2.0, embed=0.0)])
    expected = {"attn.out": 0.5, "mlp.out": 2.0, "embed": 0.0}
    assert found.tolist() == [expected.get(s.part, 1.0) for s in sites]
    assert set(expected) < {s.part for s in sites}


# ---------------------------------------------------------------------------------------- low frequencies
def smooth_part(profile: list[float], components: int) -> numpy.ndarray[Any, Any]:
    """The least-squares fit by cosines of 0 … components − 1 half waves: what a DCT-II cut off there must equal."""
    n = len(profile)
    waves = numpy.stack([numpy.cos(numpy.pi * k * (numpy.arange(n) + 0.5) / n) for k in range(components)], 1)
    fitted: numpy.ndarray[Any, Any] = waves @ numpy.linalg.lstsq(waves, numpy.array(profile), rcond=None)[0]
    return fitted


def share_smooth(profile: list[float], components: int) -> list[float]:
    y = smooth_part(profile, components)
    kept = y.clip(0)
    return [float(a / (a + b)) for a, b in zip(kept, abs(numpy.array(profile) - y), strict=True)]


HUMP = [0.5 - 0.4 * math.cos(2 * math.pi * (i + 0.5) / 12) for i in range(12)]  # two half waves
NOISY = [x + (0.15 if i % 2 else -0.05) for i, x in enumerate(HUMP)]


@pytest.mark.parametrize("components", [1, 2, 3, 5])
def test_low_frequency_is_the_smooth_share(components: int) -> None:
    found = factors(NOISY, "low_frequency", bands=components, threshold=0.0)
    assert found == pytest.approx(share_smooth(NOISY, components), abs=1e-5)
    assert 0 <= min(found) < 0.95
    assert max(found) <= 1


def test_low_frequency_stops_at_its_threshold() -> None:
    """The mean and two half waves leave less than a fifth of the variation, however high above zero it all lies."""
    profile = [0.5 + x / 2 for x in NOISY]
    total = numpy.var(profile)
    rest = [float(numpy.mean((numpy.array(profile) - smooth_part(profile, k)) ** 2) / total) for k in range(1, 9)]
    stop = next(k for k, r in enumerate(rest, start=1) if r <= 0.2)
    assert stop == 3
    found = factors(profile, "low_frequency", bands=8, threshold=0.2)
    assert found == pytest.approx(share_smooth(profile, stop), abs=1e-5)
    assert found != pytest.approx(share_smooth(profile, 8), abs=1e-3)


@pytest.mark.parametrize("profile", [[0.4] * 12, [0.0] * 5, [0.7], HUMP])
def test_low_frequency_leaves_a_smooth_profile(profile: list[float]) -> None:
    assert factors(profile, "low_frequency", bands=3, threshold=0.0) == pytest.approx([1.0] * len(profile), abs=1e-6)


def test_low_frequency_weighs_a_spike_down_most() -> None:
    profile = [0.3] * 12
    profile[7] = 0.9
    found = factors(profile, "low_frequency")
    assert min(found) == found[7] < 0.75
    assert sorted(found)[1] > found[7] + 0.1
    assert factors([2 * x for x in [0.2, *profile[1:]]], "low_frequency") == pytest.approx(
        factors([0.2, *profile[1:]], "low_frequency"), abs=1e-6
    )  # in no unit


def test_low_frequency_with_all_bands_keeps_everything() -> None:
    assert factors(NOISY, "low_frequency", bands=12, threshold=0.0) == pytest.approx([1.0] * 12, abs=1e-6)
    assert min(factors(NOISY, "low_frequency", bands=6, threshold=0.0)) < 0.95


# ------------------------------------------------------------------------------------------- all together
def test_steps_multiply_in_any_order() -> None:
    steps = [Step(use="by_score"), Step(use="skip_first", n=2), Step(use="top", share=0.5)]
    directions, sites, acts = scored(ELBOW), sites_for(8), means(8)
    each = torch.stack([weigh_sites(directions, sites, acts, [s]) for s in steps]).prod(0)
    torch.testing.assert_close(weigh_sites(directions, sites, acts, steps), each)
    torch.testing.assert_close(weigh_sites(directions, sites, acts, steps[::-1]), each)
    assert torch.equal(weigh_sites(directions, sites, acts, []), torch.ones(10))


def test_nothing_left_is_an_error() -> None:
    layers_only = sites_for(8)[1:-1]
    steps = [Step(use="skip_first", n=4), Step(use="middle", low=0.0, high=0.3)]
    with pytest.raises(UserError, match="leave no layer to edit; widen one of them"):
        weigh_sites(scored(ELBOW), layers_only, means(8), steps)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Step(use="middle", low=0.8, high=0.2), "low=0.8 is above high=0.2; swap them"),
        (Step(use="top", share=1.5), "share: input should be less than or equal to 1"),
        (Step(use="skip_first", n=-1), "n: input should be greater"),
        (Step(use="kneee"), "did you mean 'knee'"),
        (Step(use="tent", reach=0), "reach: input should be greater than 0"),
        (Step(use="tent", max_weight=4.1), "max_weight: input should be less than or equal to 4"),
        (Step(use="tent", part="mlp.in"), "part: input should be '', 'attn.out' or 'mlp.out'"),
        (Step(use="bell", width=-0.1), "width: input should be greater than 0"),
        (Step(use="component", attn=-1), "attn: input should be greater than or equal to 0"),
        (Step(use="low_frequency", bands=0), "bands: input should be greater"),
        (Step(use="cosmic_layers", share=1.1), "share: input should be less"),
    ],
)
def test_bad_options(step: Step, message: str) -> None:
    with pytest.raises(UserError, match=message):
        weigh_sites(scored(ELBOW), sites_for(8), means(8), [step])


# ------------------------------------------------------------------------------------------- gabliteration
def test_adaptive_scale_is_the_papers() -> None:
    """Layers 2 to 6 of 8, ξ = −1, −½, 0, ½, 1; the damped projector written out, R orthonormal."""
    found = factors([1.0] * 8, "adaptive_scale")
    r = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0].T
    damped = r.T @ torch.linalg.inv(r @ r.T + 0.1 * torch.eye(2)) @ r
    share = float(damped.trace()) / 2  # what is left of a unit vector of its span
    wanted = [0, 0, *(0.3 * (1 + 0.5 * (1 - abs(x))) * share for x in (-1, -0.5, 0, 0.5, 1)), 0]
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("layers", "options"), [(2, {}), (3, {}), (4, {"skip_first": 0, "skip_last": 0, "beta": 0})])
def test_adaptive_scale_of_few_layers(layers: int, options: dict[str, Any]) -> None:
    """Nothing left is an error that says so; a flat scale is base / (1 + ridge)."""
    if layers - 3 <= 0 and not options:
        with pytest.raises(UserError, match="leave no layer"):
            weigh_sites(scored([1.0] * layers), sites_for(layers)[1:-1], means(layers), [Step(use="adaptive_scale")])
        return
    assert factors([1.0] * layers, "adaptive_scale", **options) == pytest.approx([0.3 / 1.1] * layers)
