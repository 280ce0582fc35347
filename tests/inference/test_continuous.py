"""Rows that join and leave a running batch get the answers that they get alone."""

from __future__ import annotations

import random

import pytest
import torch
from tests.support.tiny import tiny_subject

from obliteratus.core.types import Subject
from obliteratus.inference import continuous
from obliteratus.inference.continuous import RunningBatch
from obliteratus.inference.generate import generate

# Full attention, windows, latent attention, blocks that use another block's keys.
KINDS = ("llama", "gemma3_text", "deepseek_v3", "gemma4_text")
TOKENS = 14


def make_rows(n: int = 9) -> list[list[int]]:
    chance = random.Random(0)
    return [[256, *(chance.randrange(256) for _ in range(chance.randrange(3, 40)))] for _ in range(n)]


def endless(name: str) -> Subject:
    """A model whose answers have no end, so that each row takes all its tokens."""
    subject = tiny_subject(name)
    subject.model.generation_config.eos_token_id = None
    subject.tokenizer.eos_token = None
    return subject


def write_in_turns(subject: Subject, rows: list[list[int]], seed: int) -> list[list[int]]:
    """Answers, of which each takes another number of tokens, in a batch that rows join at random."""
    chance, batch = random.Random(seed), RunningBatch(subject)
    answers: list[list[int]] = [[] for _ in rows]
    waiting, running = list(range(len(rows))), list[int]()
    while waiting or running:
        if waiting and chance.random() < 0.4:
            group = sorted(waiting[: chance.randrange(1, 4)], key=lambda i: -len(rows[i]))
            waiting = [i for i in waiting if i not in group]
            started, logits = batch.run_prompts([rows[i] for i in group])
            batch.join(started)
            running += group
            for i, token in zip(group, logits.argmax(-1).tolist(), strict=True):
                answers[i].append(token)
        elif running:
            logits = batch.advance([answers[i][-1] for i in running])
            for i, token in zip(running, logits.argmax(-1).tolist(), strict=True):
                answers[i].append(token)
            done = [place for place, i in enumerate(running) if len(answers[i]) >= TOKENS - i % 4]
            running = [running[place] for place in batch.leave(done)] if done else running
    assert batch.cache is None
    return answers


@pytest.mark.parametrize("room", [2, 256])
@pytest.mark.parametrize("name", KINDS)
def test_answers_are_those_of_each_row_alone(name: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous, "ROOM", room)
    subject, rows = endless(name), make_rows()
    alone = [generate(subject, [row], TOKENS)[0] for row in rows]
    found = write_in_turns(subject, rows, seed=room)
    assert [answer[: TOKENS - 3] for answer in found] == [answer[: TOKENS - 3] for answer in alone]
    assert len({tuple(answer) for answer in alone}) > 1  # one answer for all would pass


def test_padding_that_is_seen_would_change_answers() -> None:
    """Negative control: without the mask the short row sees what lies in front of it."""
    subject, rows = endless("llama"), sorted(make_rows(), key=len, reverse=True)
    first = {}
    for masked in (True, False):
        batch = RunningBatch(subject)
        started, logits = batch.run_prompts(rows)
        batch.join(started)
        if not masked:
            subject.model.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
            )
        first[masked] = batch.advance(logits.argmax(-1).tolist())
    assert torch.allclose(first[True][0], first[False][0], atol=1e-5)  # the longest row has no padding
    assert not torch.allclose(first[True][-1], first[False][-1], atol=1e-2)


def test_a_recurrent_models_rows_run_together_if_they_have_one_length() -> None:
    subject = endless("lfm2")
    rows = [row[:4] for row in make_rows(3)]
    batch = RunningBatch(subject)
    started, logits = batch.run_prompts(rows)
    batch.join(started)
    answers = [[token] for token in logits.argmax(-1).tolist()]
    for _ in range(4):
        for answer, token in zip(answers, batch.advance([a[-1] for a in answers]).argmax(-1).tolist(), strict=True):
            answer.append(token)
    assert batch.leave([0]) == [1, 2]
    for answer, token in zip(answers[1:], batch.advance([a[-1] for a in answers[1:]]).argmax(-1), strict=True):
        answer.append(int(token))
    alone = [generate(subject, [row], 6)[0] for row in rows]
    assert answers == [alone[0][:5], *alone[1:]]
    assert len(set(map(tuple, alone))) > 1
    with pytest.raises(AssertionError, match="recurrent"):
        batch.join(started)


def test_the_longest_prompts_come_first() -> None:
    with pytest.raises(ValueError, match="longest first"):
        RunningBatch(tiny_subject("llama")).run_prompts([[1, 2], [1, 2, 3]])
