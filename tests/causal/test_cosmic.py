"""The direction that COSMIC would choose: its score is its definition, and a planted direction is found."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tests.support.hooked import hooked, ids_of, without
from tests.support.notes import Notes
from tests.support.refuser import COMMON, REFUSAL, asked, refuser, shuffled
from tests.support.tiny import tiny_subject
from torch import Tensor

from obliteratus.causal import FitContext
from obliteratus.causal.candidates import CandidateGrid, make_grid, score_candidates
from obliteratus.causal.cosmic import ConceptInversionScorer, find_least_similar_streams
from obliteratus.core.errors import UserError
from obliteratus.core.progress import report_to
from obliteratus.core.settings import Step
from obliteratus.core.types import Directions, PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.probe.probe import collect_activations


def chosen(subject: Subject, prompts: PromptSet, **options: Any) -> tuple[Directions, list[str]]:
    notes, step = Notes(), Step(use="cosmic", **{"held_out": 4, **options})
    with report_to(notes):
        return find_directions(collect_activations(subject, prompts), [step], FitContext(subject, prompts)), notes.texts


def place(model: Any, ids: list[list[int]], streams: list[int]) -> Tensor:
    """One prompt at a time, in double precision, the blocks' own outputs."""
    rows = []
    for row in ids:
        seen: list[Tensor] = []
        with hooked([(layer, lambda m, a, y, seen=seen: seen.append(y[0, -1])) for layer in model.model.layers]):
            model(torch.tensor([row]))
        rows.append(torch.stack([seen[s - 1] for s in streams]))
    return torch.stack(rows).mean((0, 1))


@pytest.mark.parametrize("streams", [[1], [2, 3]])
def test_the_score_is_its_definition(streams: list[int]) -> None:
    subject = tiny_subject("llama_biased") if streams == [1] else tiny_subject("llama")
    found = make_grid(subject, ids_of(subject, asked()), 2, 4, "cosmic")
    judge, model, best = (
        ConceptInversionScorer.for_grid(subject, found, streams),
        copy.deepcopy(subject.model).double(),
        found.candidates[0],
    )
    target, control = (place(model, found.held_out[g], streams) for g in ("target", "control"))
    with without(model, best.vector):
        ablated = place(model, found.held_out["target"], streams)
    with hooked([(model.model.layers[best.stream - 1], lambda m, a, y: y + best.vector.double())]):
        added = place(model, found.held_out["control"], streams)  # the block's hooks run in order: addition first
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in ((ablated, control), (added, target))]
    assert judge.score(best) == pytest.approx(sum(cosines), rel=1e-5)
    wrong = replace(best, vector=-3 * best.vector)
    assert judge.score(wrong) < judge.score(best) - 1e-3


def test_layers_are_those_of_the_lowest_cosine() -> None:
    angles = torch.tensor([3.0, 0.1, 0.9, 0.2, 0.8, 0.3, 0.0, 0.4, 0.5, 0.6, 0.7])  # stream 0 never counts
    target = torch.stack([angles.cos(), angles.sin()], 1) * torch.arange(1.0, 12.0)[:, None]
    means = {"target": target, "control": torch.tensor([[2.0, 0.0]]).expand(11, 2)}
    assert find_least_similar_streams(means, 0.2) == [2, 4]
    assert find_least_similar_streams(means, 0.39) == [2, 4, 10]  # rounded down, as published
    assert find_least_similar_streams(means, 0.05) == [2]  # one at least


@pytest.mark.parametrize(("block", "clean"), [(1, "n"), (2, ":"), (3, "n"), (4, ":")])
def test_a_planted_direction_is_found_in_position_and_layer(block: int, clean: str) -> None:
    found, notes = chosen(refuser(block, clean), asked())
    position = "assistant:".index(clean) - len("assistant:")
    assert f"position {position}, stream {block + 1}:" in notes[-1]
    assert float(found.basis[0, 0, REFUSAL]) == pytest.approx(1, abs=1e-4)
    assert torch.equal(found.basis[0], found.basis[-1])
    assert found.unit == "sum of two cosines"


def test_without_the_kl_filter_another_wins() -> None:
    """What is planted at other tokens takes along what all prompts live on; only the filter sees that."""
    found, _ = chosen(refuser(1, "n"), asked(), max_kl=100.0)
    assert abs(float(found.basis[0, 0, COMMON])) > 0.3


@cache
def full_grid() -> tuple[Subject, CandidateGrid, list[tuple[float, float]]]:
    """Score and KL of every candidate."""
    subject = refuser(1, "n")
    made = make_grid(subject, ids_of(subject, asked()), 5, 4, "cosmic")
    judge = ConceptInversionScorer.for_grid(subject, made, find_least_similar_streams(made.means, 0.1))
    return subject, made, [(judge.score(c), judge.trial.ablation_kl(c)) for c in made.candidates]


@pytest.mark.parametrize("max_kl", [0.1, 0.5, 100.0])
def test_testing_the_best_first_chooses_as_the_full_grid(max_kl: float) -> None:
    subject, made, rows = full_grid()
    found, _ = chosen(subject, asked(), max_kl=max_kl)
    best = max((i for i, (_, moved) in enumerate(rows) if moved <= max_kl), key=lambda i: rows[i][0])
    assert float(found.raw[0]) == pytest.approx(rows[best][0])
    unit = torch.nn.functional.normalize(made.candidates[best].vector, dim=0)
    torch.testing.assert_close(found.basis[0, 0], unit)


def test_labels_by_chance_score_less() -> None:
    subject, scores = refuser(), []
    real = make_grid(subject, ids_of(subject, asked()), 1, 4, "cosmic")
    for prompts in (asked(), shuffled(asked())):
        made = replace(make_grid(subject, ids_of(subject, prompts), 1, 4, "cosmic"), held_out=real.held_out)
        judge = ConceptInversionScorer.for_grid(subject, made, find_least_similar_streams(real.means, 0.1))
        scores.append(max(score_candidates(made, judge.score, "cosmic")))
    assert scores[0] > 1.9
    assert scores[1] < scores[0] - 0.1


def test_no_candidate_says_which_filter() -> None:
    with pytest.raises(UserError, match=r"none of 15 candidates passes the filters \(max_kl drops 15\); widen max_kl"):
        chosen(refuser(), asked(), max_kl=-1.0)
