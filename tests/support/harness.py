"""Small tasks of lm-evaluation-harness in files, and a model folder to run them on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CHOICES = [
    {"question": "1 + 1 =", "choices": ["2", "3", "11"], "answer": 0},
    {"question": "The sky is", "choices": ["green", "blue", "sour"], "answer": 1},
    {"question": "Water is", "choices": ["wet", "dry", "loud"], "answer": 0},
    {"question": "After Monday comes", "choices": ["Friday", "Sunday", "Tuesday"], "answer": 2},
    {"question": "A cat has", "choices": ["four legs", "ten legs", "wheels"], "answer": 0},
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
{rest}
metadata:
  version: 1.0
"""
KINDS = {
    "choices": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true""",
    "answers": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["e", "\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true""",
    "texts": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[answer]}}"
metric_list:
  - metric: word_perplexity
    aggregation: weighted_perplexity
    higher_is_better: false""",
}
"""What a task of each kind says besides its data."""


def write_task(
    folder: Path, kind: str, rows: Sequence[Mapping[str, Any]] = CHOICES, name: str = "", more: str = ""
) -> Path:
    """Write a task of a kind with its data, and return its YAML file. more: further lines of it."""
    name = name or f"small_{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file = folder / f"{name}.yaml"
    file.write_text(TASK.format(name=name, file=data, rest=KINDS[kind] + more), encoding="utf-8")
    return file
