"""Read a saved model or adapter with plain transformers and PEFT, without anything of ours: run by `bench.readers`.

python plain_reader.py SPEC.json OUT.npz, under the transformers release that PYTHONPATH puts first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM


def load(model: str, adapter: str) -> Any:
    """Return the model in fp32, with the adapter if there is one."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, adapter)
    return loaded.eval()


def answer(model: Any, rows: list[list[int]], tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return log-probabilities of the first tokens [rows, vocabulary], and greedy answers [rows, tokens]."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    options = {"do_sample": False, "temperature": None, "top_p": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": tokens}
    with torch.inference_mode():
        found = model.generate(input_ids=ids, attention_mask=mask, **options)
    return found.logits[0].float().log_softmax(-1).numpy(), found.sequences[:, longest:].numpy()


def answer_groups(spec: Path, out: Path) -> None:
    """Answer the rows of each group of the specification."""
    asked = json.loads(spec.read_text(encoding="utf-8"))
    model = load(asked["model"], asked["adapter"])
    found: dict[str, Any] = {"version": np.array(transformers.__version__)}
    for name, group in asked["groups"].items():
        found[f"{name}.first"], found[f"{name}.answers"] = answer(model, group["ids"], group["tokens"])
    np.savez(out, **found)


if __name__ == "__main__":
    answer_groups(Path(sys.argv[1]), Path(sys.argv[2]))
