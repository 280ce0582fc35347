"""Gemma 3 270M, a real model whose writers stand behind norms: what an edit leaves with their gains and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.gemma import INSTALLED, NOT_INSTALLED, open_gemma
from tests.support.tiny import run_of

from obliteratus.core.settings import Excise, Step
from obliteratus.core.types import Directions, Plan, Prompt, PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.excise.live.hooks import applied
from obliteratus.excise.plan import plan_edits
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.probe.probe import collect_activations
from obliteratus.prompts import load_prompts
from obliteratus.rebirth.save import save

pytestmark = pytest.mark.skipif(not INSTALLED, reason=NOT_INSTALLED)
FEW = 12  # prompts of each group: the topics are told apart by far fewer


@pytest.fixture(scope="module")
def subject() -> Subject:
    return open_gemma()


@pytest.fixture(scope="module")
def groups() -> PromptSet:
    every = load_prompts("organism:astronomy", "organism:astronomy")
    return PromptSet({group: every[group][:FEW] for group in ("target", "control")})


@pytest.fixture(scope="module")
def found(subject: Subject, groups: PromptSet) -> Directions:
    return find_directions(collect_activations(subject, groups), (Step(use="mean_diff"),))


def planned(subject: Subject, found: Directions, groups: PromptSet) -> Plan:
    return plan_edits(
        subject, found, torch.ones(len(subject.sites)), collect_activations(subject, groups), Excise(norm="columns")
    )


def left(subject: Subject, plan: Plan, found: Directions, prompts: tuple[Prompt, ...]) -> float:
    """Of what each block adds to the stream, the largest share along its direction, at the prompts' last tokens."""
    with applied(subject, plan):
        stream = torch.cat([r.stream for r in read_hidden_states(subject, render_prompts(subject, prompts))])
    added = stream[:, 1:] - stream[:, :-1]
    along = torch.einsum("plw,lkw->plk", added, found.basis[1:]).norm(dim=-1)
    return float((along / added.norm(dim=-1)).max())


def test_with_the_gains_nothing_is_written_and_without_them_much(
    subject: Subject, found: Directions, groups: PromptSet
) -> None:
    assert all(site.gain for site in subject.sites if site.role == "writes" and site.part != "embed")
    naive = replace(subject, sites=tuple(replace(site, gain=None) for site in subject.sites))
    some = groups["target"][:8]
    with_gains, without, unedited = (
        left(subject, plan, found, some)
        for plan in (planned(subject, found, groups), planned(naive, found, groups), Plan())
    )
    assert with_gains < 1e-3
    assert 0.05 < without < unedited


def test_saved_it_answers_as_it_did_live(
    subject: Subject, found: Directions, groups: PromptSet, tmp_path: Path
) -> None:
    saved = save(subject, planned(subject, found, groups), run_of(subject), tmp_path / "out", prompts=groups)
    assert saved.saved["rescore"]["max_kl"] < 1e-5
