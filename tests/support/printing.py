"""A tiny model that refuses and its prompts, on disk, for commands whose output is looked at."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.refuser import refuser
from tests.support.searches import REFUSAL, search_prompts


def save_refuser(folder: Path) -> None:
    """Write the model to FOLDER/refuser, and prompts with their splits to FOLDER/target.jsonl and control.jsonl."""
    subject = refuser(word=REFUSAL)
    subject.model.save_pretrained(folder / "refuser")
    subject.tokenizer.save_pretrained(folder / "refuser")
    for group, prompts in search_prompts().groups.items():
        lines = [json.dumps({"prompt": prompt.text, "split": prompt.split}) for prompt in prompts]
        (folder / f"{group}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
