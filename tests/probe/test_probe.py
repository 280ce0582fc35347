"""PROBE keeps what it says: means and rows of the plain stream, anchors, and no number that is not one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.support.activations import assert_same
from tests.support.tiny import tiny_subject

from obliteratus.core.errors import UserError
from obliteratus.core.probing import ProbeRequest
from obliteratus.core.settings import Probe
from obliteratus.core.types import Prompt, PromptSet, Subject
from obliteratus.inference.chat_template import render_prompts
from obliteratus.probe.probe import collect_activations, load_activations, save_activations

NAMES = ["llama", "gpt2", "gemma3_text"]
WRITERS = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}


@pytest.fixture(scope="module")
def subject() -> Subject:
    return tiny_subject("llama")


@torch.no_grad()
def plain(subject: Subject, prompts: PromptSet, group: str) -> torch.Tensor:
    """[prompts, L, width], one prompt at a time: all streams but the last, which transformers gives normed."""
    rows = render_prompts(subject, prompts[group])
    states = [subject.model(torch.tensor([row]), output_hidden_states=True).hidden_states[:-1] for row in rows]
    return torch.stack([torch.stack([h[0, -1] for h in of_row]) for of_row in states])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", ["target", "control"])
def test_rows_and_means_are_the_plain_stream(name: str, group: str, prompts: PromptSet) -> None:
    subject = tiny_subject(name)
    moments = collect_activations(subject, prompts, Probe(keep="rows")).groups[group]
    expected = plain(subject, prompts, group)
    assert moments.rows is not None
    assert moments.count == len(expected)
    torch.testing.assert_close(moments.rows[:, :-1], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.mean[:-1], expected.double().mean(0).float(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(moments.rows[0], moments.rows[1], atol=1e-3)  # prompts in each other's place would show


def test_running_moments_keep_no_rows_and_the_same_mean(subject: Subject, prompts: PromptSet) -> None:
    rows, mean = (
        collect_activations(subject, prompts, Probe(keep=keep)).groups["target"] for keep in ("rows", "moments")
    )
    assert mean.rows is None
    assert torch.equal(mean.mean, rows.mean)


@pytest.mark.parametrize("name", WRITERS)
def test_anchors_are_the_control_groups_mean_output(name: str, prompts: PromptSet) -> None:
    subject, path, seen = tiny_subject(name), WRITERS[name], []
    acts = collect_activations(subject, prompts, request=ProbeRequest([path]))
    handle = subject.module(path).register_forward_hook(lambda m, a, y: seen.append(y[0, -1]))
    for row in render_prompts(subject, prompts["control"]):
        subject.model(torch.tensor([row]))
    handle.remove()
    torch.testing.assert_close(acts.outputs[path], torch.stack(seen).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_named(value: float, prompts: PromptSet) -> None:
    subject = tiny_subject("llama")
    subject.model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    with pytest.raises(UserError, match=r"(target|control) prompt \d, stream 2 \(after block 1\)") as caught:
        collect_activations(subject, prompts)
    assert "\n" not in str(caught.value)


def test_saved_activations_are_the_same(subject: Subject, prompts: PromptSet, tmp_path: Path) -> None:
    path = WRITERS["llama"]
    for keep in ("rows", "sketch", "moments"):
        acts = collect_activations(subject, prompts, Probe(keep=keep), request=ProbeRequest([path]))
        save_activations(acts, tmp_path)
        assert_same(load_activations(tmp_path), acts)


def test_the_digest_tells_prompts_options_and_models_apart(subject: Subject, prompts: PromptSet) -> None:
    more = PromptSet({**prompts.groups, "target": (*prompts["target"], Prompt("One more."))})
    runs = [(subject, prompts, Probe()), (subject, more, Probe()), (subject, prompts, Probe(position=-2))]
    runs.append((tiny_subject("llama", seed=1), prompts, Probe()))
    digests = [collect_activations(*run).digest for run in runs]
    assert len(set(digests)) == len(runs)
    assert collect_activations(subject, prompts, Probe()).digest == digests[0]
