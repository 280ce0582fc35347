"""What directions promote, and what streams know: by the model's own head, planted tokens, and nothing in noise."""

from __future__ import annotations

from dataclasses import replace

import torch
from tests.support.contexts import (
    check_finding,
    context_of_model,
    with_same_groups,
)
from tests.support.plans import random_basis
from tests.support.refuser import asked, byte
from tests.support.tiny import tiny_subject

from obliteratus.analyze import AnalysisContext, analyses
from obliteratus.analyze.chance import draw_chance_directions
from obliteratus.analyze.lens import apply_logit_lens
from obliteratus.analyze.readout import compute_logit_effects
from obliteratus.analyze.samples import familywise_p_values, read_sample
from obliteratus.core.settings import Step
from obliteratus.distill import find_directions


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


def test_chance_is_that_of_random_labels() -> None:
    """The limits are those of `familywise_p_values` over the directions that random labels give."""
    context = with_token(stream=2)
    found = apply_logit_lens(context, draws=199, seed=3)
    sample = read_sample(context.activations, "lens")
    table = []
    for stream in (1, 2, 3):  # no direction at stream 0
        units = torch.cat([context.directions.basis[stream], draw_chance_directions(sample, stream, 199, 3)])
        table.append(torch.cat([x.abs().amax(1) for x in compute_logit_effects(context.subject, units)]))
    expected = familywise_p_values(torch.stack(table, 1).double())
    assert torch.allclose(found.p[1:], expected)
    assert found.p[0] == 1
    assert found.significant == (found.p <= 0.05).nonzero().flatten().tolist()


def test_no_direction_promotes_nothing() -> None:
    context = with_same_groups(with_token(stream=2))
    found = apply_logit_lens(replace(context, directions=find_directions(context.activations, [Step(use="mean_diff")])))
    assert found.significant == []
    assert all(tokens == () for tokens in found.promoted)
    assert "no direction" in found.summary()


# -------------------------------------------------------------------------------------------------- the tuned lens


def test_they_are_registered_with_their_cost() -> None:
    assert str(analyses["lens"].cost({})) == "nothing"
    assert str(analyses["tuned_lens"].cost({})) == "N_search forwards"
    assert analyses["tuned_lens"].needs == ("rows",)
