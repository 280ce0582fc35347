"""Contrasts of writers' outputs: the groups' difference, and what divides it."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.support.activations import assert_same
from tests.support.tiny import tiny_subject

from obliteratus.core.probing import ProbeRequest
from obliteratus.core.types import Prompt, PromptSet, Subject
from obliteratus.inference.chat_template import render_prompts
from obliteratus.probe import contrasts
from obliteratus.probe.contrasts import count_common_end, sample_outputs, solve_second_moment
from obliteratus.probe.probe import collect_activations, load_activations, save_activations

PATH = "model.layers.1.mlp.down_proj"


@torch.no_grad()
def outputs_of(subject: Subject, prompt: Prompt) -> torch.Tensor:
    """[tokens, width], from the model alone."""
    seen: list[torch.Tensor] = []
    handle = subject.module(PATH).register_forward_hook(lambda m, a, y: seen.append(y[0]))
    subject.model(torch.tensor(render_prompts(subject, [prompt])))
    handle.remove()
    return seen[0]


def with_categories(prompts: PromptSet) -> PromptSet:
    target = tuple(Prompt(p.text, category=f"c{i % 2}") for i, p in enumerate(prompts["target"]))
    return PromptSet({**prompts.groups, "target": target})


def test_differences_are_those_of_the_categories_means(prompts: PromptSet) -> None:
    subject, asked = tiny_subject("llama"), with_categories(prompts)
    found = collect_activations(subject, asked, request=ProbeRequest(contrast_modules=[PATH])).contrasts[PATH]
    last = {g: torch.stack([outputs_of(subject, p)[-1] for p in members]) for g, members in asked.groups.items()}
    expected = torch.stack([last["target"][i::2].mean(0) - last["control"].mean(0) for i in range(2)])
    torch.testing.assert_close(found.difference, expected, rtol=1e-4, atol=1e-5)
    sizes = torch.tensor([float(len(last["target"][i::2])) for i in range(2)])
    torch.testing.assert_close(found.share, sizes / sizes.sum())


def test_samples_are_at_the_positions_without_first_tokens(prompts: PromptSet) -> None:
    """With more positions than the prompts have tokens, each token is there once."""
    subject, few = tiny_subject("llama"), prompts["control"][:3]
    others = sample_outputs(subject, render_prompts(subject, few), [PATH], list(range(-60, -1)))[PATH]
    whole = [outputs_of(subject, p) for p in few]
    assert max(map(len, whole)) < 60
    expected = torch.cat([x[1:-1] for x in whole])
    assert len(others) == len(expected)
    assert float(torch.cdist(expected.double(), others.double()).min(1).values.max()) < 1e-4  # in any order


def test_the_words_of_prompts_end_where_the_template_goes_on(prompts: PromptSet) -> None:
    subject = tiny_subject("llama")
    asked = [Prompt("red"), Prompt("two birds"), Prompt("seven")]
    ids, plain = render_prompts(subject, asked), subject.tokenizer
    end = count_common_end(ids)
    for row, prompt in zip(ids, asked, strict=True):
        assert plain.decode(row[:-end]).endswith(prompt.text)
    assert count_common_end([[1, 2, 3]] * 2) == 2  # of rows that are alike, a token stays
    assert count_common_end([[1, 2], [1, 3]]) == 1


def test_the_solution_is_that_of_the_dense_matrix() -> None:
    g = torch.Generator().manual_seed(0)
    last, topic, rows = (torch.randn(n, 48, generator=g) for n in (20, 30, 3))
    control = torch.randn(70, 48, generator=g) * torch.linspace(0.1, 3, 48)
    w, t, f = contrasts.LAST_SHARE, contrasts.TOPIC_SHARE, contrasts.FLOOR
    shares = ((last, w), (control, (1 - w) * (1 - t)), (topic, (1 - w) * t))
    moment = torch.stack([share * x.double().T @ x.double() / len(x) for x, share in shares]).sum(0)
    dense = (1 - f) * moment + f * moment.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    expected = torch.linalg.solve(dense, rows.double().T).T
    torch.testing.assert_close(solve_second_moment(last, control, topic, rows), expected, rtol=1e-9, atol=1e-9)


def test_one_more_row_is_a_partial_orthogonalization() -> None:
    """A keep prompt's output k beside others: M⁻¹d loses λ of its component along k, λ = w·kM⁻¹k / (1 + w·kM⁻¹k)."""
    generator = torch.Generator().manual_seed(0)
    others, k, d = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (40, 1, 1))
    share = 0.7 * (1 - contrasts.TOPIC_SHARE)
    floor = contrasts.FLOOR * (contrasts.LAST_SHARE * k.square().sum() / 8 + share * others.square().sum() / 40 / 8)
    rest = (1 - contrasts.FLOOR) * share * others.T @ others / 40 + floor * torch.eye(8, dtype=torch.float64)
    w = (1 - contrasts.FLOOR) * contrasts.LAST_SHARE
    plain, along = torch.linalg.solve(rest, d[0]), torch.linalg.solve(rest, k[0])
    size = w * float(k[0] @ along)
    share = size / (1 + size)
    expected = plain - share * (k[0] @ plain) / (k[0] @ along) * along
    assert 0.1 < share < 1
    torch.testing.assert_close(solve_second_moment(k, others, others[:0], d)[0], expected)


def test_covectors_read_less_of_the_topic_than_without_its_words() -> None:
    """Writer outputs whose topic is in all words of target prompts, and whose behavior is at their last token alone."""
    g = torch.Generator().manual_seed(0)
    topic, behavior = torch.eye(24)[0], torch.eye(24)[1]
    last, control = torch.randn(200, 24, generator=g), torch.randn(400, 24, generator=g)
    words = torch.randn(400, 24, generator=g) + 8 * topic
    difference = (8 * topic + 8 * behavior)[None]
    reads = []
    for seen in (words, words[:0]):
        covector = solve_second_moment(last, control, seen, difference)[0]
        covector /= covector @ difference[0].double()
        reads.append(float((covector @ (8 * topic).double()).abs()))
    assert reads[1] > 0.45  # the negative control: half of what it reads is the topic
    assert reads[0] < 0.8 * reads[1]


def test_covectors_read_less_of_keep_prompts_where_there_are_some(prompts: PromptSet) -> None:
    subject = tiny_subject("llama")
    keep = tuple(Prompt(f"Name {n} birds, please.") for n in ("two", "three", "nine", "ten"))
    reads = []
    for asked in (prompts, PromptSet({**prompts.groups, "keep": keep})):
        found = collect_activations(subject, asked, request=ProbeRequest(contrast_modules=[PATH])).contrasts[PATH]
        outputs = torch.stack([outputs_of(subject, p)[-1] for p in keep])
        covector = found.whitened[0] / (found.whitened[0] @ found.difference[0])
        reads.append(float((outputs @ covector).square().mean()))
    assert reads[1] < 0.7 * reads[0]


def test_they_come_back_from_disk_and_are_no_anchors(prompts: PromptSet, tmp_path: Path) -> None:
    acts = collect_activations(tiny_subject("llama"), prompts, request=ProbeRequest(contrast_modules=[PATH]))
    save_activations(acts, tmp_path)
    loaded = load_activations(tmp_path)
    assert_same(acts, loaded)
    for name in ("difference", "whitened", "share"):
        assert torch.equal(getattr(loaded.contrasts[PATH], name), getattr(acts.contrasts[PATH], name))
    assert not loaded.outputs
