"""Registries and plug-ins as they were before a test."""

from __future__ import annotations

import pytest

import obliteratus as ob
from obliteratus.core import plugins


def forget_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what the test registers and loads be gone after it."""
    for registry in (ob.extractors, ob.weighers, ob.scorers, ob.analyses, ob.strategies):
        monkeypatch.setattr(registry, "_entries", {name: registry[name] for name in registry})
    for name in ("_files", "_packages"):
        monkeypatch.setattr(plugins, name, dict(vars(plugins)[name]))
