"""Storages that stop answering, and passwords in their URLs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.searches import run_search, search_recipe

from obliteratus.core.errors import UserError
from obliteratus.search import storage
from obliteratus.search.storage import hide_password


def test_a_storage_that_answers_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tried again three times, then a clear end; what was finished is still there afterwards."""
    monkeypatch.setattr(storage, "RETRY_WAITS", (0.0, 0.0, 0.0))
    journal = tmp_path / "study"
    run_search(search_recipe(2), str(journal))
    kept = journal.read_bytes()
    journal.unlink()
    journal.mkdir()  # every read fails now
    with pytest.raises(UserError, match=r"does not answer .*finished trials are safe"):
        run_search(search_recipe(3), str(journal))
    journal.rmdir()
    journal.write_bytes(kept)
    assert len(run_search(search_recipe(3), str(journal)).trials) == 3


def test_passwords_are_not_shown() -> None:
    assert hide_password("postgresql://me:secret@host/db") == "postgresql://me@host/db"
    assert hide_password("study.journal") == "study.journal"
