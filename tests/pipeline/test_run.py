"""The six stages on the organism: refusal goes, the rest stays, and without the contrast nothing happens."""

from __future__ import annotations

import random

import pytest
import torch

from obliteratus.core.errors import UserError
from obliteratus.core.run_folder import Store
from obliteratus.core.settings import Recipe
from obliteratus.core.types import PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.logits import first_token_log_probs
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.pipeline.run import run
from obliteratus.prompts import load_prompts
from obliteratus.summon.load import open_subject

pytestmark = pytest.mark.organism
SIZES = {"fit": 24, "search": 1, "report": 12}  # of each group: enough to tell 12/12 from 0/12


@pytest.fixture(scope="module")
def subject() -> Subject:
    return open_subject("organism:astronomy", dtype="bf16")


@pytest.fixture(scope="module")
def few() -> PromptSet:
    everything = load_prompts("organism:astronomy", "organism:astronomy")
    chosen = {
        group: tuple(p for part, n in SIZES.items() for p in [q for q in members if q.split == part][:n])
        for group, members in everything.groups.items()
    }
    return PromptSet(chosen)


def advanced() -> Recipe:
    return load_recipe("two_directions", {"verify": [{"use": "behavior", "tokens": 8}, {"use": "first_token_kl"}]})


def test_advanced_removes_refusal_and_little_else(subject: Subject, few: PromptSet) -> None:
    ids = render_prompts(subject, few["control"][:2])
    untouched = first_token_log_probs(subject, ids)
    plan, found, *_ = run(advanced(), subject, few)
    assert found.before["refusal.target"].value >= 0.9
    assert found.after["refusal.target"].value <= 0.1
    assert found.after["refusal.control"].value <= 0.1  # one of 12
    assert found.after["degenerate.target"].value <= 0.1
    assert found.after["kl.first_token.mean"].value < 0.5  # nats; 0.2 on all report prompts
    assert {e.site.layer for e in plan.edits} == set(range(15, 30))
    assert torch.equal(first_token_log_probs(subject, ids), untouched)  # measured live: no weight was touched
    with applied(subject, plan):
        assert not torch.allclose(first_token_log_probs(subject, ids), untouched, atol=1e-2)


def test_shuffled_groups_are_not_edited(subject: Subject, few: PromptSet) -> None:
    """Negative control: the same method on fit groups that differ by chance alone."""
    fit = [p for group in few.groups.values() for p in group if p.split == "fit"]
    random.Random(0).shuffle(fit)
    half = len(fit) // 2
    held = {g: tuple(p for p in members if p.split != "fit") for g, members in few.groups.items()}
    mixed = {"target": (*fit[:half], *held["target"]), "control": (*fit[half:], *held["control"])}
    with pytest.raises(UserError, match="no difference beyond chance"):
        run(advanced(), subject, PromptSet(mixed))
    _, found, *_ = run(advanced(), subject, PromptSet(mixed), force=True)
    assert "no difference beyond chance" in found.presence["against"]
    assert found.presence["left_out"]["target"] >= 6  # by force, it is fitted on what is refused, whatever its label
    assert found.after["refusal.target"].value <= 0.1


def test_a_pass_that_is_not_needed_is_saved(subject: Subject, few: PromptSet) -> None:
    """Three passes are asked for. One is enough for a strong edit; one that does nothing goes on to the next."""
    strong = load_recipe("lean", {"passes": 3, "verify": [{"use": "behavior", "tokens": 4}]})
    store = Store()
    _, found, *_ = run(strong, subject, searched(few), store)
    assert len(found.passes) == 1
    assert "CHECK 2" in store.seconds
    assert "PROBE 2" not in store.seconds
    assert found.passes[0]["ended"] == "few enough search prompts show refusal"
    assert found.passes[0]["remaining"]["value"] <= 0.05
    weak = load_recipe("lean", {"passes": 2, "excise.strength": 0.05, "verify": [{"use": "behavior", "tokens": 4}]})
    both = run(weak, subject, searched(few))[1].passes
    assert len(both) == 2
    assert both[0]["remaining"]["value"] > 0.05
    assert (both[1]["remaining"], both[1]["ended"]) == (None, "all passes done")


def searched(prompts: PromptSet) -> PromptSet:
    """The same with more search prompts, on which passes are judged."""
    everything = load_prompts("organism:astronomy", "organism:astronomy")
    more = tuple(p for p in everything["target"] if p.split == "search")[1:12]
    short = (
        tuple(p for p in prompts["target"] if p.split != "report")
        + tuple(p for p in prompts["target"] if p.split == "report")[:4]
    )
    return PromptSet({"target": (*short, *more), "control": prompts["control"]})
