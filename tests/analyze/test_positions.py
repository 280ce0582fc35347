"""Where the groups lie apart: planted at a block, by hand in double precision, and nothing where they are alike."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.support.contexts import (
    check_finding,
    context_of_model,
    refusing_context,
    token_ids,
    with_direction,
    with_random_direction,
    with_same_groups,
)
from tests.support.refuser import CLEAN, asked, shuffled
from tests.support.tiny import tiny_subject

from obliteratus.analyze import analyses
from obliteratus.analyze.positions import measure_positions

SUFFIX = len("\nassistant:")  # a token a byte


@pytest.mark.parametrize("block", [2, 5])
def test_tokens_behind_the_trigger_are_apart_from_the_block_on(block: int) -> None:
    """Attention writes the direction wherever a # came before, so at every token of the template."""
    found = measure_positions(refusing_context(block=block), last=SUFFIX)
    places = {found.locate(i) for i in found.contrast.significant}
    assert places == {(-p, s) for p in range(1, SUFFIX + 1) for s in range(block + 1, 9)}
    assert found.auc[:, block + 1 :].min() == 1
    assert torch.allclose(found.auc[:, : block + 1], torch.tensor(0.5))
    assert found.tokens[-1] == ":"
    assert "".join(found.tokens) == "\nassistant:"
    check_finding(found, ["stream", "token from the end", "AUC"])


def test_one_prompt_at_a_time_in_double_precision() -> None:
    context = context_of_model(tiny_subject("gemma2"), asked())
    found = measure_positions(context, last=4)
    model = copy.deepcopy(context.subject.model).double()
    means = []
    for group in ("target", "control"):
        with torch.no_grad():
            states = [
                model(torch.tensor([row]), output_hidden_states=True).hidden_states for row in token_ids(context, group)
            ]
        rows = torch.stack([torch.stack([h[0, -4:] for h in one[:3]]) for one in states])
        means.append(torch.einsum("nlpw,lw->npl", rows, context.directions.basis[:3, 0].double()).mean(0))
    value = found.contrast.value.view(4, 4)[:, :3]  # the last of theirs has passed the final norm
    assert torch.allclose(value.double(), means[0] - means[1], atol=1e-4)


def test_no_more_tokens_than_the_shortest_prompt_has() -> None:
    context = refusing_context()
    shortest = min(len(row) for group in ("target", "control") for row in token_ids(context, group))
    assert len(measure_positions(context, last=200).tokens) == shortest


# ------------------------------------------------------------------------------------------------------- nulls
def test_identical_groups_are_nowhere_apart() -> None:
    found = measure_positions(with_same_groups(refusing_context()))
    assert found.contrast.significant == []
    assert torch.allclose(found.auc, torch.tensor(0.5))
    assert "nothing beyond chance" in found.summary()


def test_shuffled_groups_are_nowhere_apart() -> None:
    for context in (refusing_context(), context_of_model(tiny_subject("llama"), asked())):
        null = context_of_model(context.subject, shuffled(asked()))
        assert measure_positions(with_direction(null, context.directions.basis[-1, 0])).contrast.significant == []


def test_a_random_direction_shows_nothing() -> None:
    assert measure_positions(with_random_direction(refusing_context()), last=SUFFIX).contrast.significant == []
    assert (
        measure_positions(with_direction(refusing_context(), torch.eye(32)[CLEAN]), last=SUFFIX).contrast.significant
        == []
    )


def test_it_is_registered_with_its_cost() -> None:
    assert str(analyses["positions"].cost({})) == "(N_search,target + N_search,control) forwards"
