"""Wang et al.'s false refusal vector: its orthogonalization by the formula, and its choice."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tests.support.hooked import ids_of
from tests.support.notes import Notes
from tests.support.refuser import asked, refuser

from obliteratus.causal import FitContext
from obliteratus.causal.candidates import Candidate, CandidateGrid, compute_stream_means, split_for_candidates
from obliteratus.causal.false_refusal import orthogonalize_candidates
from obliteratus.core.errors import UserError
from obliteratus.core.progress import report_to
from obliteratus.core.settings import Step
from obliteratus.core.types import Directions, Prompt, PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.distill.steps import check_needs
from obliteratus.inference.chat_template import render_prompts
from obliteratus.probe.probe import collect_activations


def grid(seed: int = 0) -> tuple[CandidateGrid, torch.Tensor]:
    """Candidates at two positions and three streams, and the keep group's means."""
    draw = torch.Generator().manual_seed(seed)
    places = [(p, s) for p in (-2, -1) for s in (1, 2)]
    candidates = tuple(Candidate(p, s, torch.randn(16, generator=draw)) for p, s in places)
    return CandidateGrid(candidates, 0, {}, {}, torch.randn(2, 3, 16, generator=draw)), torch.randn(
        2, 3, 16, generator=draw
    )


@pytest.mark.parametrize("control", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_orthogonalization_is_the_published_formula(share: float, control: bool) -> None:
    """w − λ r rᵀw / rᵀr at each place, in float64; with ``control`` without the control mean in either."""
    before, keep = grid()
    after = orthogonalize_candidates(before, keep, share, control)
    for old, new in zip(before.candidates, after.candidates, strict=True):
        w, mean = old.vector.double(), before.control[old.position, old.stream].double()
        r = keep[old.position, old.stream].double() - mean
        if control:
            p = torch.eye(16).double() - torch.outer(mean, mean) / (mean @ mean)
            w, r = p @ w, p @ r
        expected = w - share * (r @ w) / (r @ r) * r
        torch.testing.assert_close(new.vector.double(), expected, rtol=1e-5, atol=1e-6)
        assert (new.position, new.stream) == (old.position, old.stream)
        if share == 1:
            cosine = float(expected @ r) / float(expected.norm() * r.norm())
            assert abs(cosine) < 1e-12
            assert abs(float(new.vector.double() @ r)) < 1e-5 * float(r.norm() * new.vector.norm())
            assert abs(float(old.vector.double() @ r)) > 1e-2 * float(r.norm() * old.vector.norm())


def test_a_keep_group_that_equals_control_takes_nothing() -> None:
    before, _ = grid()
    after = orthogonalize_candidates(before, before.control, 1.0, False)
    for old, new in zip(before.candidates, after.candidates, strict=True):
        torch.testing.assert_close(new.vector, old.vector)


@cache
def subject() -> Subject:
    return refuser()


def prompts() -> PromptSet:
    """The refuser refuses target and keep prompts by one and the same direction."""
    groups = asked().groups
    keep = tuple(Prompt(f"{p.text} too") for p in groups["target"])
    return PromptSet({**groups, "keep": keep})


def chosen(**options: object) -> tuple[Directions, list[str]]:
    notes, step = Notes(), Step(use=str(options.pop("use")), **{"held_out": 4, "max_kl": 50.0, **options})
    with report_to(notes):
        acts = collect_activations(subject(), prompts())
        return find_directions(acts, [step], FitContext(subject(), prompts())), notes.texts


def test_without_orthogonalization_it_is_the_choice_of_select() -> None:
    """λ = 0 keeps every candidate, and only the filter of `select` for added directions is missing."""
    ours, notes = chosen(use="false_refusal", share=0.0)
    theirs, _ = chosen(use="select", min_induce=-1e9)
    torch.testing.assert_close(ours.basis, theirs.basis)
    assert ours.origin == theirs.origin
    assert any("position" in text and "bypass" in text for text in notes)


def test_the_choice_is_apart_from_the_keep_group() -> None:
    """At the place that it comes from; without orthogonalization it lies mostly along the keep group's difference.

    Means are over all prompts here, and over those that behave there.
    """
    apart, rest = (chosen(use="false_refusal", share=share, positions=1)[0] for share in (1.0, 0.0))
    fit, _ = split_for_candidates(ids_of(subject(), prompts()), 4, "false_refusal")
    keep = compute_stream_means(subject(), render_prompts(subject(), prompts()["keep"]), [-1])[0]
    control = compute_stream_means(subject(), fit["control"], [-1])[0]

    def cosine(found: Directions) -> float:
        assert found.origin is not None
        stream = found.origin[0]
        away = keep[stream] - control[stream]
        return abs(float(torch.nn.functional.cosine_similarity(found.basis[stream, 0], away, dim=0)))

    assert cosine(apart) < 0.02
    assert cosine(rest) > 0.5


def test_it_needs_prompts_to_keep() -> None:
    step = [Step(use="false_refusal")]
    check_needs(step, ["target", "control", "keep"], "moments")
    with pytest.raises(UserError, match="needs the group 'keep', which has no prompts; give them with --keep"):
        check_needs(step, ["target", "control"], "moments")
