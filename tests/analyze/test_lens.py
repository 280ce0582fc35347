"""What directions promote, and what streams know: by the model's own head, planted tokens, and nothing in noise."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.conftest import random_basis
from tests.support.contexts import (
    check_finding,
    context_of_model,
    refusing_context,
    token_ids,
    with_random_direction,
    with_same_groups,
)
from tests.support.refuser import asked, byte
from tests.support.tiny import tiny_subject
from torch import Tensor

from obliteratus.analyze import AnalysisContext, analyses
from obliteratus.analyze.lens import apply_logit_lens, compute_random_limit
from obliteratus.analyze.readout import compute_logit_effects, compute_next_token_log_probs
from obliteratus.analyze.tuned_lens import fit_map, measure_tuned_lens, score_lenses
from obliteratus.core.settings import Step
from obliteratus.core.types import Directions
from obliteratus.distill import find_directions
from obliteratus.inference.logits import first_token_log_probs

KINDS = ("llama", "gemma2", "gpt2", "opt", "granitemoe", "lfm2")


# ---------------------------------------------------------------------------------------- the way to the vocabulary
@pytest.mark.parametrize("name", KINDS)
def test_the_last_stream_reads_out_as_the_model_does(name: str) -> None:
    context = context_of_model(tiny_subject(name), asked())
    rows = context.activations["target"].rows
    assert rows is not None
    truth = first_token_log_probs(context.subject, token_ids(context, "target"))
    assert torch.allclose(compute_next_token_log_probs(context.subject, rows[:, -1]), truth, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_logits_move_as_the_gradient_says(name: str) -> None:
    """The norm divides by the stream's length, which a small step at right angles to it does not change."""
    subject = tiny_subject(name)
    model = copy.deepcopy(subject.model).double()
    site = next(s for s in subject.sites if s.part == "unembed")
    stream, d = random_basis(subject.width, 2, 0, torch.float64) * subject.width**0.5
    if site.norm == "layer":  # and centres
        stream = stream - stream.mean()
        d = d - d.mean()
        d = d - stream * (stream @ d) / (stream @ stream)
    norm, head = model.get_submodule(site.gain), model.get_output_embeddings()
    step = 1e-2  # norms are computed in single precision, whatever the model's
    with torch.no_grad():
        moved = (head(norm(stream + step * d)) - head(norm(stream - step * d))) / (2 * step)
    expected = (moved - moved.mean()) / moved.std()
    found = torch.cat(list(compute_logit_effects(subject, d[None].float())))[0]
    assert torch.allclose(found.double(), expected, atol=1e-3)


# --------------------------------------------------------------------------------------------------- the logit lens
def with_token(stream: int) -> AnalysisContext:
    """A random model of which one token's row of the head lies along one direction, found at one stream alone."""
    subject = tiny_subject("llama")
    context = context_of_model(subject, asked())
    d, other = random_basis(subject.width, 2, 1)
    subject.model.lm_head.weight.data[byte(subject.tokenizer, "N")] = 6 * d / subject.model.model.norm.weight
    basis = torch.zeros_like(context.directions.basis)
    basis[1:, 0] = other
    basis[stream, 0] = d
    return replace(context, directions=replace(context.directions, basis=basis))


def test_the_token_that_a_direction_promotes_is_found() -> None:
    found = apply_logit_lens(with_token(stream=2))
    assert found.significant == [2]
    assert found.promoted[2][0] == "N"
    assert found.promoted[0] == ()
    assert "stream 2 promotes 'N'" in found.summary()
    check_finding(found, ["stream", "logit (standard deviations)"])


def test_the_other_sign_suppresses_it() -> None:
    context = with_token(stream=1)
    basis = -context.directions.basis
    found = apply_logit_lens(replace(context, directions=replace(context.directions, basis=basis)))
    assert found.suppressed[1][0] == "N"
    assert found.significant == [1]


def test_streams_that_agree_share_their_tokens() -> None:
    found = apply_logit_lens(with_token(stream=3), tokens=5)
    assert found.sharing[0] == found.sharing[1] == 0
    assert found.sharing[2] == 1
    assert found.sharing[3] < 0.5


def test_random_directions_promote_nothing() -> None:
    """200 sets of one direction a stream: 10 of them are expected to hold one beyond the limit."""
    context = with_token(stream=2)
    limit = compute_random_limit(context.subject, 4, 4000, 0)
    sets = torch.stack([random_basis(context.subject.width, 4, 100 + seed) for seed in range(200)])
    largest = torch.cat([x.abs().amax(1) for x in compute_logit_effects(context.subject, sets.flatten(0, 1))])
    beyond = (largest > limit).view(200, 4)
    assert beyond.any(1).sum() <= 18  # 18 or more by chance in one of a hundred
    for i in (0, int(beyond.any(1).float().argmax())):
        directions = Directions(sets[i][:, None], torch.ones(4), torch.ones(4), "known")
        found = apply_logit_lens(replace(context, directions=directions), random=4000)
        assert found.limit == limit
        assert found.significant == beyond[i].nonzero().flatten().tolist()
    assert compute_random_limit(context.subject, 4, 4000, 1) == pytest.approx(limit, rel=0.05)


def test_no_direction_promotes_nothing() -> None:
    context = with_same_groups(with_token(stream=2))
    found = apply_logit_lens(replace(context, directions=find_directions(context.activations, [Step(use="mean_diff")])))
    assert found.significant == []
    assert all(tokens == () for tokens in found.promoted)
    assert "no direction" in found.summary()


# -------------------------------------------------------------------------------------------------- the tuned lens
def noise(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_a_map_is_found_and_predicts_new_rows() -> None:
    turn, x, new = noise(8, 8, 0), noise(60, 8, 1), noise(30, 8, 2)
    found = fit_map(x, x @ turn + 3)
    assert torch.allclose(found(new), new @ turn + 3, atol=0.01)
    assert not found.identity
    near = fit_map(x, x + 0.01 * noise(60, 8, 3) + 3)
    assert near.identity
    assert torch.allclose(near(new), new + 3, atol=0.02)


def test_the_dual_form_is_the_textbook_s() -> None:
    """(XᵀX + λI)⁻¹XᵀY, with every penalty's error by leaving the hat matrix' trace out, as published."""
    x, y = noise(12, 20, 0).double(), noise(12, 20, 1).double()
    found = fit_map(x.float(), y.float())
    xc, yc = x - x.mean(0), y - y.mean(0)
    unit = (xc @ xc.T).diagonal().mean()
    errors = []
    for identity in (True, False):
        rest = yc - xc if identity else yc
        for power in range(-8, 7):
            penalty = unit * 10 ** (power / 2)
            a = torch.linalg.solve(xc.T @ xc + penalty * torch.eye(20), xc.T @ rest)
            hat = xc @ torch.linalg.solve(xc.T @ xc + penalty * torch.eye(20), xc.T) + 1 / 12
            error = (rest - xc @ a).square().sum() / 12 / (1 - hat.trace() / 12) ** 2
            errors.append((float(error), identity, a))
    best, identity, a = min(errors, key=lambda e: e[0])
    assert found.error == pytest.approx(best, rel=1e-4)
    assert found.identity == identity
    new = noise(5, 20, 2).double()
    expected = y.mean(0) + (new - x.mean(0)) @ (a + identity * torch.eye(20))
    assert torch.allclose(found(new.float()).double(), expected, atol=1e-4)


def test_unrelated_rows_are_mapped_to_their_mean() -> None:
    """Where rows tell nothing, the map leaves at most a few hundredths of their spread."""
    found = fit_map(noise(200, 8, 0), noise(200, 8, 1))
    assert float((found(noise(50, 8, 2)) - found.target.float()).square().mean()) < 0.06


@pytest.mark.parametrize("block", [2, 5])
def test_the_stream_from_which_the_answer_is_known_is_found(block: int) -> None:
    context = refusing_context(block=block)
    found = measure_tuned_lens(context)
    assert found.significant == list(range(block + 1, 8))
    assert found.tuned[block + 1].value < 0.1 * found.constant.value
    assert found.constant.value == pytest.approx(found.tuned[block].value, abs=1e-3)
    assert found.promoted[-1][0] == "N"
    assert f"from stream {block + 1} on" in found.summary()
    check_finding(found, ["stream", "KL to the model (nats)"])


def test_kl_is_of_the_model_to_the_lens() -> None:
    context = context_of_model(tiny_subject("gemma2"), asked())
    found = measure_tuned_lens(context)
    model = copy.deepcopy(context.subject.model).double()
    rows = torch.cat([context.activations[g].rows for g in ("target", "control")]).double()
    with torch.no_grad():
        logits = [model.lm_head(model.model.norm(x)) for x in (rows[:, -1], rows[:, 1])]
    true, seen = (torch.log_softmax(30 * torch.tanh(x / 30), -1) for x in logits)  # Gemma 2's soft cap
    expected = (true.exp() * (true - seen)).sum(-1).mean()
    assert found.logit[1].value == pytest.approx(float(expected), rel=1e-3)


def test_pairs_that_do_not_belong_together_tell_nothing() -> None:
    context = context_of_model(tiny_subject("llama"), asked())
    fit = torch.cat([context.activations[g].rows for g in ("target", "control")])
    ends = fit[torch.randperm(len(fit), generator=torch.Generator().manual_seed(0)), -1]
    maps = [fit_map(fit[:, stream], ends) for stream in range(3)]
    assert score_lenses(context, maps, fit, compute_next_token_log_probs(context.subject, fit[:, -1])).significant == []


def test_prompts_that_are_all_the_same_tell_nothing() -> None:
    prompts = asked()
    same = replace(prompts, groups={g: (prompts["control"][0],) * 6 for g in ("target", "control")})
    found = measure_tuned_lens(with_random_direction(context_of_model(tiny_subject("llama"), same)))
    assert found.significant == []
    assert found.constant.value == pytest.approx(0, abs=1e-5)
    assert "no stream tells" in found.summary()


def test_they_are_registered_with_their_cost() -> None:
    assert str(analyses["lens"].cost({})) == "nothing"
    assert str(analyses["tuned_lens"].cost({})) == "N_search forwards"
    assert analyses["tuned_lens"].needs == ("rows",)
