"""FailSpy's choice: every layer's differences but the first's are tried, and the one that ends refusals is taken."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.support.hooked import ids_of, without
from tests.support.notes import Notes
from tests.support.refuser import REFUSAL, asked, byte, refuser
from tests.support.tiny import tiny_subject

from obliteratus.causal import FitContext
from obliteratus.causal.interventions import ablate
from obliteratus.causal.least_refusing import collect_candidates, measure_refusal_probability
from obliteratus.core.errors import UserError
from obliteratus.core.progress import report_to
from obliteratus.core.settings import Step
from obliteratus.core.types import Directions, PromptSet, Subject
from obliteratus.distill import find_directions
from obliteratus.inference.generate import generate
from obliteratus.pipeline.recipe import load_recipe
from obliteratus.probe.probe import collect_activations


def chosen(subject: Subject, asked: PromptSet, **options: Any) -> tuple[Directions, list[str]]:
    notes, step = Notes(), Step(use="least_refusing", **{"length": 1, **options})
    with report_to(notes):
        return find_directions(collect_activations(subject, asked), [step], FitContext(subject, asked)), notes.texts


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_candidates_are_all_differences_but_the_first_layers(name: str) -> None:
    """Streams 1 to L, and what attention and MLP add to them: of two streams these make the difference."""
    subject = tiny_subject(name)
    found = collect_candidates(subject, ids_of(subject, asked()))
    layers = subject.n_layers
    streams = [f"stream {i}" for i in range(1, layers + 1)]
    parts = {f"{part} of layer {i}" for i in range(1, layers) for part in ("attn.out", "mlp.out")}
    assert list(found)[:layers] == streams
    assert set(found) == {*streams, *parts}
    last = layers - 1
    added = found[f"attn.out of layer {last}"] + found[f"mlp.out of layer {last}"]
    torch.testing.assert_close(added, found[f"stream {layers}"] - found[f"stream {last}"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("length", [1, 5])
def test_the_score_is_the_highest_probability_of_any_word(length: int) -> None:
    """In double precision, one prompt and one token at a time, the direction ablated throughout."""
    subject, words = tiny_subject("llama_biased"), [3, 70, 100]
    ids = ids_of(subject, asked())["target"][:4]
    vector = torch.randn(32, generator=torch.Generator().manual_seed(4))
    with ablate(subject, vector):
        found = measure_refusal_probability(subject, ids, words, length)
    model, best = copy.deepcopy(subject.model).double(), 0.0
    with without(model, vector), torch.no_grad():
        for row in ids:
            text = list(row)
            for _ in range(length):
                p = model(torch.tensor([text])).logits[0, -1].softmax(-1)
                best = max(best, float(p[words].max()))
                text.append(int(p.argmax()))
    assert found == pytest.approx(best, rel=1e-4)
    assert measure_refusal_probability(subject, ids, words, length) != pytest.approx(found, rel=1e-3)  # not ablated


def test_a_token_that_ends_the_answer_counts() -> None:
    """The end token is predicted after the answer's last; an empty answer has it alone."""
    subject = tiny_subject("llama")
    subject.model.lm_head.weight[257] += 50 * subject.model.model.norm.weight.sign()
    ids = ids_of(subject, asked())["target"]
    ended = [i for i, a in enumerate(generate(subject, ids, 3)) if len(a) < 3]
    values = [measure_refusal_probability(subject, [ids[i]], [257], 3) for i in ended]
    assert ended
    assert min(values) > 0.5 * max(values) > 0.1


def test_it_takes_what_ends_refusals() -> None:
    """The planted direction, of which the part's own output is the purest source."""
    found, notes = chosen(refuser(2), asked())
    assert float(found.basis[0, 0, REFUSAL]) == pytest.approx(1, abs=1e-3)
    assert notes[0] == "least_refusing: refusal words: 'N'"
    assert float(found.raw[0]) < 0.01
    assert torch.equal(found.basis[0], found.basis[-1])


def test_words_can_be_named_and_must_be_known() -> None:
    subject = refuser()
    assert chosen(subject, asked(), tokens=("N",))[1][0] == "least_refusing: refusal words: 'N'"
    same = PromptSet({g: asked()["control"] for g in ("target", "control")})
    with pytest.raises(UserError, match="name those that begin its refusals"):
        chosen(subject, same)
    with pytest.raises(UserError, match="held_out=12 leaves none"):
        chosen(subject, asked(), prompts=12)
    assert byte(subject.tokenizer, "N") != byte(subject.tokenizer, "Y")


def test_the_recipe_is_the_authors() -> None:
    """All layers but the first, attention's and the MLP's output matrices, in full, no norm rule, no filter."""
    made = load_recipe("failspy")
    assert [s.use for s in made.distill] == ["least_refusing"]
    assert [(s.use, s.options) for s in made.weigh] == [("skip_first", {"n": 1})]
    assert made.excise.parts == ("attn.out", "mlp.out")
    assert (made.excise.strength, made.excise.norm, made.passes) == (1.0, "none", 1)
