"""The questions of the tasks that come with this package. The harness calls this from their YAML files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TASKS = Path(__file__).with_name("tasks")
"""Folder of the shipped tasks; `lm_eval --include_path` takes it too."""


def load_questions(file: str, **metadata: Any) -> dict[str, Any]:
    """Return the questions of one of our files as the split ``test``. metadata: what the harness passes on, unused."""
    from datasets import Dataset  # comes with the harness

    lines = (TASKS / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def count_questions(task: str, unknown: int) -> int:
    """Return how many items a shipped task has, or ``unknown`` for any other task."""
    file = TASKS / f"{task}.jsonl"
    return len(file.read_text(encoding="utf-8").splitlines()) if task in list_shipped_tasks() else unknown


def list_shipped_tasks() -> list[str]:
    """Return the names of the shipped tasks, which need no network."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))
