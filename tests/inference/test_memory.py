"""A memory budget: batches shrink to keep within it, answers stay what they are, and too little is refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.tiny import tiny_subject

from obliteratus.core.choices import parse_size
from obliteratus.core.errors import UserError
from obliteratus.inference.generate import generate, group_answers, kv_bytes
from obliteratus.inference.memory import free_memory, held_bytes, host_memory, memory_limit
from obliteratus.inference.shared_prefix import prepare_prompts
from obliteratus.pipeline.offloaded import open_within_memory

MB = 1e6


def test_without_a_budget_all_that_is_free() -> None:
    subject = tiny_subject("llama")
    assert free_memory(subject) == pytest.approx(host_memory(), rel=0.1)  # others use some meanwhile
    with memory_limit(held_bytes(subject) + 100 * MB):
        assert free_memory(subject) == pytest.approx(100 * MB, rel=0.3)
    with memory_limit(held_bytes(subject) / 2):
        assert free_memory(subject) == 0


def test_what_is_freed_counts_as_free() -> None:
    subject = tiny_subject("llama")
    before = held_bytes(subject)
    waste = [bytearray(100_000) for _ in range(2000)]  # below the size that malloc gives back by itself
    assert held_bytes(subject) > before + 150 * MB
    del waste
    assert held_bytes(subject) < before + 50 * MB


def test_fewer_rows_at_a_time_and_the_same_answers() -> None:
    subject = tiny_subject("llama")
    ids = [[5 + i, 9, 7, 30 + i] for i in range(12)]
    alone = generate(subject, ids, 6)
    tokens = int(20 * MB / kv_bytes(subject))  # of one row: as much as a few hundred rows of the tiny model
    prompts = prepare_prompts(subject, ids)
    assert len(group_answers(subject, prompts, range(12), tokens)) == 1
    with memory_limit(held_bytes(subject) + 100 * MB):
        groups = group_answers(subject, prompts, range(12), tokens)
        assert 3 <= len(groups) <= 12
        assert sorted(row for group in groups for row in group) == list(range(12))
    with memory_limit(1.0):  # nothing is left: one row at a time
        assert len(group_answers(subject, prompts, range(12), 6)) == 12
        assert generate(subject, ids, 6) == alone


@pytest.mark.parametrize(("text", "size"), [("6GB", 6e9), ("1.5GiB", 1.5 * 2**30), ("900 MB", 9e8), ("1000", 1000)])
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "6 apples", "-1GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UserError, match="give a size such as 6GB"):
        parse_size(text)


def test_too_little_for_even_one_block_is_refused(tmp_path: Path) -> None:
    subject = tiny_subject("llama")
    subject.model.save_pretrained(tmp_path)
    with memory_limit(1e3), pytest.raises(UserError, match="even with the weights left on disk at least"):
        open_within_memory(str(tmp_path), {})
