"""The direction that Arditi et al. would choose: its scores are their definitions, and a planted one is found."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from tests.support.hooked import hooked, ids_of, without
from tests.support.notes import Notes
from tests.support.refuser import REFUSAL, asked, byte, refuser, shuffled
from tests.support.tiny import tiny_subject
from torch import Tensor

from obliteratus.causal import FitContext
from obliteratus.causal.candidates import (
    Candidate,
    CandidateFilter,
    CandidateGrid,
    at_least,
    at_most,
    choose_candidate,
    count_template_suffix,
    make_grid,
    score_candidates,
)
from obliteratus.causal.select import RefusalScorer
from obliteratus.core.errors import UserError
from obliteratus.core.progress import report_to
from obliteratus.core.settings import Step
from obliteratus.core.types import Directions, Prompt, PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.inference.shared_prefix import common_prefix_length
from obliteratus.probe.probe import collect_activations
from obliteratus.verify.openings import log_odds, opening_tokens, typical_openings

SUFFIX = len("\nassistant:")  # a token a byte
TOKENS = [70, 71, 100]


def chosen(subject: Subject, prompts: PromptSet, **options: Any) -> tuple[Directions, list[str]]:
    notes, step = Notes(), Step(use="select", **{"held_out": 4, **options})
    with report_to(notes):
        return find_directions(collect_activations(subject, prompts), [step], FitContext(subject, prompts)), notes.texts


# ------------------------------------------------------------------------------------ in double precision
def logits(model: Any, ids: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(torch.tensor([row])).logits[0, -1] for row in ids])


def odds(values: Tensor) -> float:
    p = values.softmax(-1)[:, TOKENS].sum(-1)
    return float((p.log() - (1 - p).log()).mean())


@pytest.fixture(scope="module")
def noise() -> tuple[Subject, CandidateGrid, RefusalScorer, Any]:
    subject = tiny_subject("llama_biased")
    prompts = asked()
    found = make_grid(subject, ids_of(subject, prompts), 3, 4, "select")
    return subject, found, RefusalScorer.for_grid(subject, found, TOKENS), copy.deepcopy(subject.model).double()


@pytest.mark.parametrize("i", [0, 2])
def test_scores_are_their_definitions(noise: tuple[Subject, CandidateGrid, RefusalScorer, Any], i: int) -> None:
    _, found, judge, model = noise
    best, held = found.candidates[i], found.held_out
    base = logits(model, held["control"]).log_softmax(-1)
    with without(model, best.vector):
        bypass, moved = odds(logits(model, held["target"])), logits(model, held["control"]).log_softmax(-1)
    block = model.model.layers[best.stream - 1]
    with hooked([(block, lambda m, a, y: y + best.vector.double())]):
        induce = odds(logits(model, held["control"]))
    divergence = (base.exp() * (base - moved)).sum(-1).mean()
    assert judge.bypass(best) == pytest.approx(bypass, rel=1e-4, abs=1e-5)
    assert judge.induce(best) == pytest.approx(induce, rel=1e-4, abs=1e-5)
    assert judge.trial.ablation_kl(best) == pytest.approx(float(divergence), rel=1e-3, abs=1e-6)
    assert float(divergence) > 1e-4  # there is something to compare


def test_the_wrong_sign_shows(noise: tuple[Subject, CandidateGrid, RefusalScorer, Any]) -> None:
    _, found, judge, _ = noise
    best = found.candidates[0]
    flipped = replace(best, vector=-best.vector)
    assert judge.bypass(flipped) == pytest.approx(judge.bypass(best), abs=1e-5)  # an ablation has no sign
    assert abs(judge.induce(flipped) - judge.induce(best)) > 1e-2


def test_candidates_are_differences_of_means(noise: tuple[Subject, CandidateGrid, RefusalScorer, Any]) -> None:
    """One prompt at a time, in double precision, held-out prompts left out."""
    subject, found, _, model = noise
    ids, deep = ids_of(subject, asked()), max(2, int(0.8 * subject.n_layers))
    means = {}
    for group, rows in ids.items():
        kept = [row for row in rows if row not in found.held_out[group]]
        assert len(kept) == len(rows) - 4
        states = [model(torch.tensor([r]), output_hidden_states=True).hidden_states for r in kept]
        means[group] = torch.stack([torch.stack(s)[:, 0, -3:] for s in states]).mean(0)
    delta = means["target"] - means["control"]
    assert {(c.position, c.stream) for c in found.candidates} == {(p, s) for p in (-3, -2, -1) for s in range(1, deep)}
    for c in found.candidates:
        torch.testing.assert_close(c.vector.double(), delta[c.stream, c.position], rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------- tokens
def test_log_odds_are_exact_where_one_sum_is_tiny() -> None:
    logp = torch.tensor([[0.0, 60.0, 30.0, 0.0], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64).log_softmax(-1)
    found = log_odds(logp, [1, 2])
    assert found[0] == pytest.approx(60 - math.log(2), rel=1e-9)  # 1 − p is 0 in double precision already
    assert found[1] == pytest.approx(math.log(math.exp(2) + math.exp(3)) - math.log(math.e + math.exp(4)), rel=1e-12)
    assert log_odds(logp, [0, 3])[0] == pytest.approx(-float(found[0]))


def test_typical_tokens_are_frequent_and_the_targets_own() -> None:
    target, control = torch.tensor([0.5, 0.3, 0.04, 0.1]), torch.tensor([0.2, 0.01, 0.0, 0.025])
    assert typical_openings(target, control, "x") == [1, 3]
    with pytest.raises(UserError, match="name those that begin its refusals"):
        typical_openings(control, target, "x")


def test_named_tokens_are_the_texts_first() -> None:
    subject = tiny_subject("llama")
    assert opening_tokens(subject, ("No", "N", "Y"), "x") == sorted(byte(subject.tokenizer, c) for c in "NY")
    with pytest.raises(UserError, match="the tokenizer returns no token"):
        opening_tokens(subject, ("",), "x")


# ------------------------------------------------------------------------------------------- positions
def test_the_template_ends_where_the_users_text_does() -> None:
    """All prompts end alike; what they share is more than the template's end."""
    subject = tiny_subject("llama")
    ids = render_prompts(subject, [Prompt("What is it about?"), Prompt("Tell me, what is it about?")])
    assert count_template_suffix(subject, ids) == SUFFIX
    assert common_prefix_length([row[::-1] for row in ids], leave=0) > SUFFIX


def test_without_a_template_the_last_token_is_the_prompts_own() -> None:
    subject = tiny_subject("llama")
    subject.tokenizer.chat_template = None
    assert count_template_suffix(subject, render_prompts(subject, [Prompt("What?"), Prompt("Why is that?")])) == 1


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("budget", [1, 60, 4096])
def test_several_positions_are_each_of_them(name: str, budget: int) -> None:
    subject = tiny_subject(name)
    ids = render_prompts(subject, [Prompt(x) for x in ("a", "What is a comet, and why?", "Rings?")])
    wanted = [-11, -3, -1]
    found = torch.empty(3, subject.n_layers + 1, 3, subject.width)
    for reading in read_hidden_states(subject, ids, position=wanted, budget=budget):
        found[reading.rows] = reading.stream
    for k, position in enumerate(wanted):
        for i, row in enumerate(ids):
            (alone,) = read_hidden_states(subject, [row], position=position)
            torch.testing.assert_close(found[i, :, k], alone.stream[0], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- choice
@pytest.mark.parametrize(("block", "clean"), [(1, "n"), (2, ":"), (3, "n"), (4, ":")])
def test_a_planted_direction_is_found_in_position_and_layer(block: int, clean: str) -> None:
    found, notes = chosen(refuser(block, clean), asked())
    position = "assistant:".index(clean) - len("assistant:")
    assert f"position {position}, stream {block + 1}:" in notes[-1]
    assert float(found.basis[0, 0, REFUSAL]) == pytest.approx(1, abs=1e-4)
    assert torch.equal(found.basis[0], found.basis[-1])
    assert notes[0] == "select: tokens that begin a refusal: 'N'"
    assert float(found.raw[0]) < -4  # refusing is less than one in fifty
    assert found.unit.startswith("nats")


@cache
def full_grid(seed: int) -> tuple[CandidateGrid, RefusalScorer, list[tuple[float, float, float]]]:
    """All three scores of every candidate on a random model."""
    subject = tiny_subject("gpt2", seed)  # two layers make one stream; more positions make up for it
    found = make_grid(subject, ids_of(subject, asked()), SUFFIX, 4, "select")
    judge = RefusalScorer.for_grid(subject, found, TOKENS)
    return found, judge, [(judge.bypass(c), judge.trial.ablation_kl(c), judge.induce(c)) for c in found.candidates]


def best_of(rows: list[tuple[float, float, float]], max_kl: float, min_induce: float) -> int:
    """The filters on all candidates, then the lowest bypass."""
    kept = [(b, i) for i, (b, divergence, induce) in enumerate(rows) if divergence <= max_kl and induce >= min_induce]
    return min(kept)[1]


@pytest.mark.parametrize(("quantile", "seed"), [(0.3, 0), (0.6, 0), (0.3, 1), (0.6, 2), (0.9, 3)])
def test_testing_the_best_first_chooses_as_the_full_grid(quantile: float, seed: int) -> None:
    """Limits that a part of the candidates passes, on random models."""
    found, judge, rows = full_grid(seed)
    _, divergence, induced = torch.tensor(rows).T
    limits = float(divergence.quantile(quantile)), float(induced.quantile(1 - quantile))
    wanted = best_of(rows, *limits)
    filters = (
        CandidateFilter("max_kl", judge.trial.ablation_kl, at_most(limits[0])),
        CandidateFilter("min_induce", judge.induce, at_least(limits[1])),
    )
    before = judge.trial.n_prompts_run
    best = choose_candidate(found, score_candidates(found, judge.bypass, "select"), filters, "select")
    assert best.candidate is found.candidates[wanted]
    assert judge.trial.n_prompts_run - before < 3 * 4 * len(found.candidates)


def fake(values: list[float]) -> CandidateGrid:
    return CandidateGrid(
        tuple(Candidate(-1, i + 1, torch.tensor([v])) for i, v in enumerate(values)), 0, {}, {}, torch.zeros(1, 1, 1)
    )


def test_the_winner_is_the_first_of_the_lowest_that_pass() -> None:
    seen = []

    def measure(candidate: Candidate) -> float:
        seen.append(candidate.stream)
        return float(candidate.vector)

    made = fake([9.0, 0.1, 0.1, 0.1, math.nan])
    best = choose_candidate(made, [1.0, 3.0, 2.0, 2.0, 0.0], (CandidateFilter("max_kl", measure, at_most(1.0)),), "x")
    assert best.candidate.stream == 3
    assert best.dropped == {"max_kl": 2}  # NaN and 9 were tried before it
    assert seen == [5, 1, 3]
    with pytest.raises(UserError, match=r"none of 5 candidates passes the filters \(max_kl drops 5\); widen max_kl"):
        choose_candidate(made, [1.0] * 5, (CandidateFilter("max_kl", measure, at_most(0.0)),), "x")
    with pytest.raises(UserError, match="scores are NaN"):
        choose_candidate(made, [math.nan] * 5, (), "x")


# --------------------------------------------------------------------------------------------- controls
def test_a_model_that_does_not_refuse_is_told_of() -> None:
    with pytest.raises(UserError, match="leaves none of 0 usable target prompts"):
        chosen(refuser(sign=-1), asked(), tokens=("N",))
    with pytest.raises(UserError, match="no token is typical"):
        chosen(refuser(sign=-1), asked())


def test_groups_that_do_not_differ_have_no_candidates() -> None:
    both = asked()["control"]
    texts = tuple(Prompt(p.text, category="twin") for p in both)
    with pytest.raises(UserError, match=r"no token is typical|do not differ"):
        chosen(refuser(), PromptSet({"target": texts, "control": both}))
    subject = refuser()
    ids = ids_of(subject, PromptSet({"target": texts, "control": both}))
    with pytest.raises(UserError, match="do not differ at any template token"):
        make_grid(subject, ids, 5, 4, "select")


def test_labels_by_chance_induce_nothing() -> None:
    """Mixed groups, not sorted by what the model does: their difference is too short to make it refuse."""
    subject, answering = refuser(), ids_of(refuser(), asked())["control"]
    induced = []
    for prompts in (asked(), shuffled(asked())):
        found = make_grid(subject, ids_of(subject, prompts), 1, 4, "select")
        judge = RefusalScorer.for_grid(
            subject, replace(found, held_out={"control": answering}), [byte(subject.tokenizer, "N")]
        )
        induced.append(max(judge.induce(c) for c in found.candidates))
    assert induced[1] < -2 < 1 < induced[0]


def test_prompts_that_behave_otherwise_are_left_out() -> None:
    """Refused controls and answered targets would dilute the means: a swapped pair changes nothing but the count."""
    prompts, subject = asked(), refuser()
    swapped = PromptSet(
        {
            "target": (*prompts["target"][:-1], prompts["control"][-1]),
            "control": (*prompts["control"][:-1], prompts["target"][-1]),
        }
    )
    found, _ = chosen(subject, swapped)
    assert float(found.basis[0, 0, REFUSAL]) == pytest.approx(1, abs=1e-4)


def test_too_few_prompts_say_so() -> None:
    with pytest.raises(UserError, match=r"held_out=32 leaves none of 1\d usable target prompts"):
        chosen(refuser(), asked(), held_out=32)
