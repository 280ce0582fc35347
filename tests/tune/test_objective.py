"""The loss against plain logits: KL, hinge and drift."""

from __future__ import annotations

import pytest
import torch
from tests.support.tiny import tiny_subject
from tests.support.tuning import control_terms, plan_for, target_terms

from obliteratus.causal.losses import ReferenceLogits
from obliteratus.core.types import Plan, Prompt
from obliteratus.excise.live.hooks import applied
from obliteratus.inference.chat_template import render_prompts
from obliteratus.inference.generate import generate
from obliteratus.tune.parameters import EditParameters


def test_the_hinge_rests_beyond_its_lead() -> None:
    """No gradient where lead by the margin, one where they do not."""
    subject = tiny_subject("llama")
    plan = plan_for(subject, "orthogonal")
    pairs = [(render_prompts(subject, [Prompt("Tell me about stars?")])[0], [5, 9, 12, 40, 41, 42])]
    for margin, rests in ((-100.0, True), (100.0, False)):
        parameters = EditParameters(plan, subject.device, "both")
        loss = target_terms(subject, ReferenceLogits(subject), parameters.to_live_plan(), pairs, margin)
        loss.hinge.backward()
        gradient = parameters.edits[0].strength.grad
        assert (float(loss.hinge) == 0.0) == rests
        assert (gradient is None or float(gradient) == 0.0) == rests


def test_pulls_by_hand() -> None:
    """Golden: KL and hinge from the model's plain logits in float64."""
    subject = tiny_subject("llama")
    plan = plan_for(subject, "orthogonal")
    prompt, answer = render_prompts(subject, [Prompt("Tell me about stars?")])[0], [5, 9, 12, 40, 41, 42]

    def logp(plan: Plan) -> torch.Tensor:
        with applied(subject, plan), torch.no_grad():
            found = subject.model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        return found[len(prompt) - 1 : -1]

    base, edited = logp(Plan((), subject.source.digest)), logp(plan)
    each = (base.exp() * (base - edited)).sum(-1)
    own, pairs = ReferenceLogits(subject), [(prompt, answer)]
    assert float(control_terms(subject, own, plan, pairs).kl) == pytest.approx(float(each[0] + each.mean()), rel=1e-3)
    loss = target_terms(subject, own, plan, pairs, 0.5)
    rivals = base.argmax(-1).tolist()
    decides = [i for i, a in enumerate(answer) if a != rivals[i]]
    assert len(decides) > 3  # random tokens are not what the base would say
    lacks = [max(0.0, 0.5 + float(edited[i, rivals[i]] - edited[i, answer[i]])) for i in decides]
    assert float(loss.hinge) == pytest.approx(sum(lacks), rel=1e-3)
    assert float(loss.nll) == pytest.approx(-sum(float(edited[i, answer[i]]) for i in decides), rel=1e-3)
    same = [i for i in range(6) if i not in decides]
    assert float(loss.drift) == pytest.approx(float(each[same].mean()) if same else 0.0, rel=1e-3)


def test_what_the_base_would_say_has_no_rival() -> None:
    """Its own greedy answer pulls by its drift alone; with another first token, by that token's margin too."""
    subject = tiny_subject("llama")
    plan = plan_for(subject, "orthogonal", strength=2.0)
    prompt = render_prompts(subject, [Prompt("Tell me about stars?")])[0]
    own, greedy = ReferenceLogits(subject), generate(subject, [prompt], 6)[0]
    loss = target_terms(subject, own, plan, [(prompt, greedy)], 50.0)
    assert float(loss.hinge) == float(loss.nll) == 0.0 < float(loss.drift)
    other = (greedy[0] + 1) % 200
    led_on = [other, *generate(subject, [[*prompt, other]], 5)[0]]
    loss = target_terms(subject, own, plan, [(prompt, led_on)], 50.0)
    with applied(subject, plan), torch.no_grad():
        first = subject.model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
    assert float(loss.hinge) == pytest.approx(50 + float(first[greedy[0]] - first[other]), rel=1e-3)
