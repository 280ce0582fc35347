"""Batching is invisible: any batch size, order and prefix reuse gives what one prompt at a time gives.

The reference is an independent plain call of the model for each prompt, without any of our code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tests.conftest import PlanMaker
from tests.support.tiny import EOS, KINDS, tiny_subject
from torch import Tensor

from obliteratus.core.progress import Reporter, report_to
from obliteratus.core.types import ProbeRequest, PromptSet, Subject
from obliteratus.excise.live.hooks import applied
from obliteratus.inference import batching as forward
from obliteratus.inference import generate as generation
from obliteratus.inference import shared_prefix as prefixes
from obliteratus.inference import token_losses as losses
from obliteratus.inference.batching import decoder_blocks, make_batches
from obliteratus.inference.chat_template import Ids, render_prompts
from obliteratus.inference.generate import generate
from obliteratus.inference.hidden_states import read_hidden_states
from obliteratus.inference.logits import first_token_log_probs
from obliteratus.inference.shared_prefix import common_prefix_length, is_recurrent, prepare_prompts
from obliteratus.inference.token_losses import token_losses

NAMES = KINDS
SLIDING = ["gemma2", "gemma3_text"]
BUDGETS = [1, 60, 10_000]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def rows_of(prefix: int = 12, tails: Sequence[int] = (1, 9, 4, 4, 15, 2), seed: int = 0) -> Ids:
    """Rows of bytes that share their first ``prefix`` tokens, which is more than the tiny models' window of 8."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(0, 256, (prefix,), generator=generator).tolist()
    return [shared + torch.randint(0, 256, (n,), generator=generator).tolist() for n in tails]


# ------------------------------------------------------------------------------- the plain reference
@contextmanager
def recorded(module: Any) -> Iterator[list[Tensor]]:
    """Outputs of a module inside the block."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, a, y: seen.append(y[0] if isinstance(y, tuple) else y))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def plain_stream(subject: Subject, row: list[int], position: int = -1) -> Tensor:
    """[streams, width] of one prompt: the library's own hidden states, with the last one taken before the norm."""
    with recorded(decoder_blocks(subject)[-1]) as last:
        out = subject.model(input_ids=torch.tensor([row]), output_hidden_states=True)
    states = [*out.hidden_states[: subject.n_layers], last[0]]
    return torch.stack([h[0, max(len(row) + position, 0)] for h in states])


@torch.no_grad()
def plain_logits(subject: Subject, row: list[int]) -> Tensor:
    return subject.model(input_ids=torch.tensor([row])).logits[0]


@torch.no_grad()
def plain_answer(subject: Subject, row: list[int], max_new: int) -> list[int]:
    ids = torch.tensor([row])
    out = subject.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new, do_sample=False, pad_token_id=0
    )
    new = out[0, len(row) :].tolist()
    ends = subject.model.generation_config.eos_token_id
    return new[: new.index(ends)] if ends in new else new


def gathered(subject: Subject, ids: Ids, **options: Any) -> tuple[Tensor, Tensor]:
    """Stream and tapped outputs of all rows, in their order."""
    readings = list(read_hidden_states(subject, ids, **options))
    order = torch.tensor([i for r in readings for i in r.rows]).argsort()
    return torch.cat([r.stream for r in readings])[order], torch.cat([r.outputs for r in readings])[order]


@pytest.fixture(scope="module", params=NAMES)
def subject(request: pytest.FixtureRequest) -> Subject:
    return tiny_subject(request.param)


# ------------------------------------------------------------------------------------------ the stream
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("budget", BUDGETS)
def test_read_is_one_at_a_time(subject: Subject, budget: int, reuse: bool) -> None:
    ids = rows_of()
    expected = torch.stack([plain_stream(subject, row) for row in ids])
    found, _ = gathered(subject, ids, budget=budget, reuse=reuse)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_order_does_not_matter(subject: Subject) -> None:
    ids = rows_of()
    shuffled = [3, 0, 5, 1, 4, 2]
    found, _ = gathered(subject, [ids[i] for i in shuffled], budget=60)
    straight, _ = gathered(subject, ids, budget=60)
    torch.testing.assert_close(found, straight[shuffled], **CLOSE)
    assert not torch.allclose(found, straight, **CLOSE)  # the rows do differ


@pytest.mark.parametrize("reuse", [True, False])
def test_position(subject: Subject, reuse: bool) -> None:
    ids = rows_of(tails=(1, 2, 9))
    expected = torch.stack([plain_stream(subject, row, -3) for row in ids])
    found, _ = gathered(subject, ids, position=-3, reuse=reuse)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_rows_shorter_than_the_position_give_their_first_token(subject: Subject) -> None:
    ids = [[65], [65, 66], [65, 66, 67, 68]]
    expected = torch.stack([plain_stream(subject, row, -3) for row in ids])
    torch.testing.assert_close(gathered(subject, ids, position=-3)[0], expected, **CLOSE)


def test_stream_zero_enters_the_first_block(subject: Subject) -> None:
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = decoder_blocks(subject)[0].register_forward_pre_hook(keep, with_kwargs=True)
    row = rows_of()[1]
    plain_logits(subject, row)
    handle.remove()
    found, _ = gathered(subject, [row])
    torch.testing.assert_close(found[0, 0], seen[0][0, -1], **CLOSE)


@pytest.mark.parametrize("last", [0, 1, 2])
def test_last_stops_early(subject: Subject, last: int) -> None:
    ids = rows_of()
    whole, _ = gathered(subject, ids, reuse=False)
    calls: list[int] = []
    handles = [b.register_forward_pre_hook(lambda m, a: calls.append(1)) for b in decoder_blocks(subject)]
    found, _ = gathered(subject, ids, last=last, budget=10_000, reuse=False)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, whole[:, : last + 1], **CLOSE)
    assert len(calls) <= max(last, 1)  # one batch: no block above the wanted stream ran


def test_taps_are_the_modules_outputs(subject: Subject) -> None:
    ids = rows_of(tails=(1, 9, 4))
    taps = [s.path for s in subject.sites if s.part == "attn.out"]
    _, found = gathered(subject, ids, request=ProbeRequest(taps), budget=60)
    for j, path in enumerate(taps):
        for i, row in enumerate(ids):
            with recorded(subject.module(path)) as seen:
                plain_logits(subject, row)
            torch.testing.assert_close(found[i, j], seen[0].reshape(len(row), -1)[-1], **CLOSE)


# -------------------------------------------------------------------------------------- log-probabilities
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("budget", BUDGETS)
def test_first_token_is_one_at_a_time(subject: Subject, budget: int, reuse: bool) -> None:
    ids = rows_of()
    expected = torch.stack([plain_logits(subject, row)[-1].log_softmax(-1) for row in ids])
    found = first_token_log_probs(subject, ids, budget=budget, reuse=reuse)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not subject.model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("words", [100, 10_000])
def test_losses_are_one_at_a_time(subject: Subject, budget: int, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "VOCABULARY_CHUNK", words)  # the vocabulary in three parts, and in one
    ids = rows_of()
    for row, loss in zip(ids, token_losses(subject, ids, budget=budget), strict=True):
        logp = plain_logits(subject, row)[:-1].double().log_softmax(-1)
        expected = -logp.gather(1, torch.tensor(row[1:])[:, None])[:, 0]
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_does_more_to_its_logits_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """gemma2 caps its logits: by its head alone they would be others."""
    ran: list[str] = []

    def watched(name: str) -> Callable[..., Any]:
        run = getattr(losses, name)
        return lambda *given: [ran.append(name), run(*given)][1]

    for name in ("_whole", "nll"):
        monkeypatch.setattr(losses, name, watched(name))
    token_losses(tiny_subject("gemma2"), rows_of(), budget=30)
    assert set(ran) == {"_whole"}
    ran.clear()
    token_losses(tiny_subject("llama"), rows_of(), budget=30)
    assert set(ran) == {"nll"}


@pytest.mark.parametrize("bias", [True, False])
def test_losses_in_parts_against_float64(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "VOCABULARY_CHUNK", 7)
    torch.manual_seed(0)
    head, states, targets = torch.nn.Linear(8, 30, bias=bias), 9 * torch.randn(11, 8), torch.randint(30, (11,))
    with torch.no_grad():
        found = losses.negative_log_likelihood(states, targets, head)
        logp = head.double()(states.double()).log_softmax(-1)
    torch.testing.assert_close(found.double(), -logp[torch.arange(11), targets], rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------- answers
@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize(("tokens", "rows"), [(1, 256), (30, 4), (10_000, 256)])
def test_answers_are_one_at_a_time(
    subject: Subject, reuse: bool, tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever part of the prompts passes at once, and however many rows are written together."""
    monkeypatch.setattr(forward, "CPU_TOKENS", tokens)
    monkeypatch.setattr(generation, "MAX_ROWS", rows)
    ids = rows_of()
    expected = [plain_answer(subject, row, 12) for row in ids]
    assert generate(subject, ids, 12, reuse=reuse) == expected
    assert generate(subject, ids[::-1], 12, reuse=reuse) == expected[::-1]


@pytest.mark.parametrize("tokens", [1, 30, 10_000])
def test_first_logits_come_with_the_answers(subject: Subject, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "CPU_TOKENS", tokens)
    ids, seen = rows_of(), {}
    generate(subject, ids, 2, on_first_logits=lambda rows, logits: seen.update(zip(rows, logits, strict=True)))
    found = torch.stack([seen[i] for i in range(len(ids))]).log_softmax(-1)
    torch.testing.assert_close(found, first_token_log_probs(subject, ids), rtol=1e-4, atol=1e-4)


def test_answers_end_at_the_end_token() -> None:
    subject = tiny_subject("llama")
    ids = rows_of()
    free = generate(subject, ids, 12)
    end = free[1][3]
    subject.model.generation_config.eos_token_id = end
    found = generate(subject, ids, 12)
    assert found == [row[: row.index(end)] if end in row else row for row in free]
    assert found == [plain_answer(subject, row, 12) for row in ids]
    assert len(found[1]) <= 3
    assert any(len(row) == 12 for row in found)  # the others were not cut


def test_the_tokenizers_end_token_ends_too() -> None:
    subject = tiny_subject("llama")
    subject.model.generation_config.eos_token_id = None
    subject.model.lm_head.weight[EOS] = 0
    row = rows_of()[:1]
    free = generate(subject, row, 4)
    subject.model.lm_head.weight[EOS] = 2 * subject.model.lm_head.weight[free[0][0]]
    assert generate(subject, row, 4) == [[]]


def batch_sizes(subject: Subject, ids: Ids, **options: Any) -> tuple[Ids, list[int]]:
    """The answers, and the number of rows in each pass."""
    sizes: list[int] = []
    handle = decoder_blocks(subject)[-1].register_forward_hook(
        lambda m, a, y: sizes.append((y[0] if isinstance(y, tuple) else y).shape[0])
    )
    answers = generate(subject, ids, 12, reuse=False, **options)
    handle.remove()
    return answers, sizes


def test_done_stops_rows_and_finished_rows_leave(subject: Subject) -> None:
    ids = rows_of(tails=(4,) * 8 if is_recurrent(subject) else (1, 9, 4, 6, 15, 2, 3, 8))
    free, sizes = batch_sizes(subject, ids)
    chosen = {tuple(row[:2]) for row in free[:6]}
    stopped, fewer = batch_sizes(subject, ids, done=lambda new: tuple(new) in chosen)
    assert stopped == [row[:2] if tuple(row[:2]) in chosen else row for row in free]
    assert sizes[-1] > fewer[-1]
    assert fewer[-1] <= 2


def test_all_done_ends_the_batch() -> None:
    subject = tiny_subject("llama")
    answers, sizes = batch_sizes(subject, rows_of(), done=lambda new: True)
    assert {len(row) for row in answers} == {1}
    assert len(sizes) == 1  # the prefill alone


# ------------------------------------------------------------------------------------------ prefixes
def test_a_window_in_every_layer() -> None:
    subject = tiny_subject("mistral")
    ids = rows_of(tails=(1, 6, 20))
    whole = gathered(subject, ids)[0]
    subject.model.config.sliding_window = 8
    found = gathered(subject, ids)[0]
    torch.testing.assert_close(found, torch.stack([plain_stream(subject, row) for row in ids]), **CLOSE)
    assert generate(subject, ids, 8) == [plain_answer(subject, row, 8) for row in ids]
    assert not torch.allclose(found, whole, **CLOSE)  # the window does cut something


@pytest.mark.parametrize("name", NAMES)
def test_the_prefix_is_reused_or_refused(name: str) -> None:
    subject = tiny_subject(name)
    with torch.inference_mode():
        prompts = prepare_prompts(subject, rows_of(prefix=12, tails=(1, 6, 20)))
    assert prompts.prefix_length in (0, 12)
    assert prompts.prefix_length == 12 or name in SLIDING or is_recurrent(subject)  # full attention is always reused
    assert prompts.prefix_length == 0 or not is_recurrent(subject)


@pytest.mark.parametrize("name", SLIDING)
def test_a_cut_window_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: states that lost what lies outside the window, as a sliding cache keeps them."""
    subject = tiny_subject(name)
    ids = rows_of(prefix=12, tails=(1, 6, 20))
    states = prefixes.prefix_states

    def cut(subject: Subject, prefix: list[int]) -> Any:
        def zeroed(x: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(x[:, :, :8]), x[:, :, 8:]], 2)

        return [(zeroed(k), zeroed(v)) for k, v in states(subject, prefix)]

    monkeypatch.setattr(prefixes, "prefix_states", cut)
    with torch.inference_mode():
        assert prepare_prompts(subject, ids).prefix_length == 0
        monkeypatch.setattr(prefixes, "_matches_without_prefix", lambda *args: True)
        assert prepare_prompts(subject, ids).prefix_length == 12
    forced, _ = gathered(subject, ids)
    expected = torch.stack([plain_stream(subject, row) for row in ids])
    assert not torch.allclose(forced, expected, **CLOSE)


def test_common_prefix_leaves_the_tokens_that_are_read() -> None:
    assert common_prefix_length([[1, 2, 3, 4], [1, 2, 3, 5]]) == 3
    assert common_prefix_length([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix_length([[1, 2, 3], [1, 2, 3, 4]], leave=3) == 0
    assert common_prefix_length([[2], [1, 2]]) == 0


def test_batches_hold_each_row_once_within_the_budget() -> None:
    lengths = [5, 1, 9, 9, 2, 30, 4]
    groups = make_batches(lengths, 20)
    assert sorted(i for g in groups for i in g) == list(range(7))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 20 for g in groups)
    assert [5] in groups  # longer than the budget: alone, and whole


# ------------------------------------------------------------------------------------------- memory
@contextmanager
def memory_for(subject: Subject, rows: int) -> Iterator[list[int]]:
    """Inside, the model runs out of memory on more rows than this. Gives the sizes that were tried."""
    tried: list[int] = []

    def refuse(module: Any, args: Any, kwargs: Any) -> None:
        tried.append((args[0] if args else kwargs["hidden_states"]).shape[0])
        if tried[-1] > rows:
            raise torch.OutOfMemoryError("planted")

    handle = decoder_blocks(subject)[0].register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield tried
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_out_of_memory_halves_the_batch(name: str) -> None:
    subject = tiny_subject(name)
    ids = rows_of()
    calm = (
        gathered(subject, ids, budget=10_000)[0],
        first_token_log_probs(subject, ids, budget=10_000),
        generate(subject, ids, 6),
        token_losses(subject, ids, budget=10_000),
    )
    with memory_for(subject, 2) as tried:
        torch.testing.assert_close(gathered(subject, ids, budget=10_000)[0], calm[0], **CLOSE)
        torch.testing.assert_close(first_token_log_probs(subject, ids, budget=10_000), calm[1], rtol=1e-4, atol=1e-4)
        assert generate(subject, ids, 6) == calm[2]
        for found, expected in zip(token_losses(subject, ids, budget=10_000), calm[3], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert max(tried) == 6


def test_a_single_row_without_memory_is_an_error() -> None:
    subject = tiny_subject("llama")
    with memory_for(subject, 0), pytest.raises(torch.OutOfMemoryError, match="planted"):
        gathered(subject, rows_of(), reuse=False)
    assert not any(b._forward_hooks or b._forward_pre_hooks for b in decoder_blocks(subject))


# ------------------------------------------------------------------------------------------ live edits
def test_live_edits_reach_prefix_and_answers(subject: Subject, make_plan: PlanMaker) -> None:
    ids = rows_of()
    plan = make_plan(subject, ("embed", "attn.out", "mlp.out"), strength=2.0)
    before = gathered(subject, ids)[0]
    with applied(subject, plan):
        expected = torch.stack([plain_stream(subject, row) for row in ids])
        answers = [plain_answer(subject, row, 8) for row in ids]
        # Reflection doubles what rounding leaves, and delta nets add it up over tokens: 2e-5 was seen.
        torch.testing.assert_close(gathered(subject, ids)[0], expected, rtol=1e-4, atol=1e-4)
        assert generate(subject, ids, 8) == answers
    assert not torch.allclose(before, expected, **CLOSE)
    assert generate(subject, ids, 8) != answers


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_padding_side_does_not_matter(name: str, prompts: PromptSet) -> None:
    right, left = (tiny_subject(name, padding_side=side) for side in ("right", "left"))
    ids = [render_prompts(s, prompts["control"]) for s in (right, left)]
    assert ids[0] == ids[1]
    expected = torch.stack([plain_stream(right, row) for row in ids[0]])
    for subject, rows in zip((right, left), ids, strict=True):
        torch.testing.assert_close(gathered(subject, rows)[0], expected, **CLOSE)
        assert generate(subject, rows, 8) == [plain_answer(subject, row, 8) for row in rows]


def test_progress_of_answers_reaches_its_total(subject: Subject) -> None:
    """Whether rows end by themselves, by a verdict or by their length: every token is settled once."""
    seen: list[tuple[int, list[int]]] = []

    class Counter(Reporter):
        def bar(self, title: str, total: int) -> Any:
            steps: list[int] = []
            seen.append((total, steps))
            return nullcontext(steps.append)

    with report_to(Counter()):
        generate(subject, rows_of(), 12, done=lambda new: new[-1] % 5 == 0)
    total, steps = seen[-1]
    assert sum(steps) == total == 6 * 12
    assert len(steps) > 1  # it moves before the end
