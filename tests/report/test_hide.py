"""Pages show no absolute path and nothing that gives access to anything; all else stays as it is."""

from __future__ import annotations

import pytest

from obliteratus.report.hide import hide_private


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ann/models/llama", "…/llama"),
        ("--target '/data/secret project/x' --control ~/prompts/c.txt", None),
        ("~/prompts/c.txt", "…/c.txt"),
        (r"C:\Users\ann\m.gguf", r"…/m.gguf"),
        ('url = "https://ann:pw@judge.example/v1/chat?key=12345"', 'url = "https://judge.example/v1/chat"'),
        ("hf_abcdefghijklmnopqrstuvwx", "…"),
        ("sk-abcdefghijklmnopqrstuvwx", "…"),
    ],
)
def test_what_is_private_is_hidden(text: str, shown: str | None) -> None:
    found = hide_private(text)
    assert "ann" not in found.replace("…", "")
    assert "/home" not in found
    assert "~/" not in found
    if shown is not None:
        assert found == shown


@pytest.mark.parametrize(
    "text",
    [
        "organism:astronomy",
        "hub-owner/model-7b",
        "relative/folder/model",
        "1/2 and/or 3 / 4, 5 nats/token",
        "arXiv:2406.11717",
        "https://judge.example/v1/chat",
        "refusal.target 1.6 % (0.3–8.3)",
    ],
)
def test_everything_else_stays(text: str) -> None:
    assert hide_private(text) == text
