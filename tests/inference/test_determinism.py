"""Inside the block torch is deterministic where it can be, what cannot be is named, and afterwards all is as before."""

from __future__ import annotations

import os

import pytest
import torch
from tests.support.notes import Notes
from tests.support.tiny import tiny_subject

from obliteratus.core.progress import report_to
from obliteratus.inference.determinism import DETERMINISM, choose_memory, deterministic, fix_memory
from obliteratus.inference.memory import free_memory


def state() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_num_threads(),
        torch.backends.cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        os.environ.get("OBLITERATUS_PROBE_CACHE"),
        DETERMINISM.get(),
    )


def test_switches_are_set_and_set_back() -> None:
    before = state()
    with deterministic(threads=2) as fixed:
        assert torch.are_deterministic_algorithms_enabled()
        assert (torch.get_num_threads(), fixed.threads) == (2, 2)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert state() == before
    context = deterministic(threads=2)
    with pytest.raises(KeyError), context:
        raise KeyError
    assert state() == before


def test_what_cannot_be_deterministic_is_named() -> None:
    notes = Notes()
    with report_to(notes), deterministic() as fixed:
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([2.0, 3.0]))  # which of the two remains is not defined
        torch.zeros(4) + 1
    assert fixed.not_deterministic == ["put_"]
    assert any("put_ have no deterministic form" in text for text in notes.texts)


def test_nothing_is_named_where_all_is_deterministic() -> None:
    notes = Notes()
    with report_to(notes), deterministic() as fixed:
        torch.randn(8, 8) @ torch.randn(8, 8)
    assert fixed.not_deterministic == notes.texts == []


def test_the_same_memory_counts_as_free_whatever_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_subject("llama")
    found = []
    for free in (9 * 10**9, 11 * 10**9):
        monkeypatch.setattr("obliteratus.inference.memory.host_memory", lambda free=free: free)
        with deterministic() as fixed, fix_memory(subject):
            found.append((free_memory(subject), fixed.memory))
        assert free_memory(subject) == free
    assert found[0] == found[1] == (2**32, 2**32)


def test_without_determinism_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obliteratus.inference.memory.host_memory", lambda: 12345)
    with fix_memory(subject := tiny_subject("llama")):
        assert free_memory(subject) == 12345


def test_less_memory_than_then_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obliteratus.inference.memory.host_memory", lambda: 9 * 10**9)
    notes, subject = Notes(), tiny_subject("llama")
    with report_to(notes), deterministic(memory=2**33) as fixed, fix_memory(subject):
        assert fixed.memory == free_memory(subject) == 2**32
    assert any("batches are smaller" in text for text in notes.texts)


@pytest.mark.parametrize("free", [4, 5, 1000, 2**33 - 1, 2**33, 10**12])
def test_the_chosen_size_is_a_power_of_two_of_at_most_half(free: int) -> None:
    chosen = choose_memory(free)
    assert chosen.bit_count() == 1
    assert free / 4 < chosen <= free / 2
